"""Answering evaluation samples whose answers are spans, and scoring them as E.T. Bench does."""

from collections.abc import Sequence

import torch

from ..evaluation import evaluate_etbench
from ..processing_etchat import SPAN, ETChatProcessor

SOURCE = "eval"


@torch.no_grad()
def answer_sample(model, processor: ETChatProcessor, batch: dict, max_new_tokens: int) -> dict | None:
    """
    Generates the first answer of a sample anew.

    Args:
        model ([`ETChatForConditionalGeneration`] or `PeftModel`): in evaluation mode.
        processor ([`ETChatProcessor`]): the model's.
        batch (`dict`): a collated batch of one sample, with labels.
        max_new_tokens (`int`): longest answer.

    Returns:
        `dict`: a row of E.T. Bench but for `idx` and `video`: one annotated span makes it grounding (TVG), several
        localization (TAL). `None` where the annotation is not made of spans.
    """
    labels = batch["labels"][0]
    start = int((labels != -100).int().argmax())
    answer = labels[start:]
    end = int((answer == -100).int().argmax()) or len(answer)
    is_vid = batch["input_ids"][0] == processor.match_token_id
    num_given = int(is_vid[:start].sum())
    times = batch.get("vid_times", [[]])[0]
    truth = _spans(processor.tokenizer.decode(answer[:end]), times[num_given:])
    if not truth:
        return None
    prompt = {key: value for key, value in batch.items() if key not in ("labels", "vid_times")}
    prompt |= {key: batch[key][:, :start] for key in ("input_ids", "attention_mask")}
    outputs = model.generate(
        **prompt,
        vid_times=[times[:num_given]],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    answer = processor.post_process(outputs)[0]["text"]
    return {"task": "tvg" if len(truth) == 1 else "tal", "source": SOURCE, "tgt": truth, "a": answer}


def score_samples(rows: Sequence[dict]) -> dict[str, float]:
    """
    What [`evaluate_etbench`] makes of answered samples.

    Args:
        rows (sequence of `dict`): see [`answer_sample`], with `idx` and `video`.

    Returns:
        `dict`: `TVG` and `TAL`, the F1 of both tasks, and of TVG `mIoU`, `R@0.5` and `R@0.7`, the share of answers
        whose IoU reaches it; each in [0, 1], and only where there is a sample of that task.
    """
    if not rows:
        return {}
    scores = evaluate_etbench(rows, similarity="jaccard")
    figures = scores["overall"]
    if "tvg" in scores["by_source"]:
        grounding = scores["by_source"]["tvg"][SOURCE]
        figures |= {"mIoU": grounding["mIoU"]} | {f"R@{t}": grounding[f"F1@{t}"] for t in (0.5, 0.7)}
    return figures


def _spans(text: str, times: list[float]) -> list[list[float]]:
    """The spans of an annotated answer, if all its times belong to spans."""
    if 2 * len(SPAN.findall(text)) != len(times):
        return []
    return [list(pair) for pair in zip(times[::2], times[1::2], strict=True)]
