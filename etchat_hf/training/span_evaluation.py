"""Answering an evaluation sample, to compare its spans with the annotated ones."""

import torch

from ..processing_etchat import SPAN, ETChatProcessor


@torch.no_grad()
def answer_spans(model, processor: ETChatProcessor, batch: dict, max_new_tokens: int) -> tuple[list, list]:
    """
    Generates the first answer of a sample anew.

    Args:
        model ([`ETChatForConditionalGeneration`] or `PeftModel`): in evaluation mode.
        processor ([`ETChatProcessor`]): the model's.
        batch (`dict`): a collated batch of one sample, with labels.
        max_new_tokens (`int`): longest answer.

    Returns:
        The predicted and the annotated spans, `[start, end]` in seconds. Both are empty where the annotation has none.
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
        return [], []
    prompt = {key: value for key, value in batch.items() if key not in ("labels", "vid_times")}
    prompt |= {key: batch[key][:, :start] for key in ("input_ids", "attention_mask")}
    outputs = model.generate(
        **prompt,
        vid_times=[times[:num_given]],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    return processor.post_process(outputs)[0]["spans"], truth


def _spans(text: str, times: list[float]) -> list[list[float]]:
    """The spans of an annotated answer, if all its times belong to spans."""
    if 2 * len(SPAN.findall(text)) != len(times):
        return []
    return [list(pair) for pair in zip(times[::2], times[1::2], strict=True)]
