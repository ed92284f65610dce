"""Asking a batch of questions about clips whose vision features are already there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..modeling_etchat import ETChatForConditionalGeneration
from ..processing_etchat import IMAGE_TOKEN, VID_TOKEN, EncodedClip, ETChatProcessor
from ..video_processing_etchat import SampledClip
from .decoding import RowBudgets, RowRepetitionPenalty, RowSampler
from .tasks import Answer, Request

# The original's sampling.
TEMPERATURE = 0.2


@dataclass(frozen=True)
class Prompt:
    """One row, checked and written out for its clip.

    Attributes:
        text: What the language model reads, one placeholder per frame.
        questions: What the Q-Former reads: a text per placeholder, or per frame of each with `use_time_tag`.
        num_placeholders: How often the clip is shown.
        src: Seconds of each `<vid>` of the question.
        max_new_tokens: Longest answer, within the model's context.
        repetition_penalty: See `Request`.
        seed: Of the sampling; None for greedy search.
    """

    text: str
    questions: list[str]
    num_placeholders: int
    src: tuple[float, ...]
    max_new_tokens: int
    repetition_penalty: float
    seed: tuple[int, ...] | None


def write_prompt(
    processor: ETChatProcessor,
    config,
    request: Request,
    clip: SampledClip | EncodedClip,
    max_new_tokens: int,
    seed: tuple[int, ...] | None = None,
) -> Prompt:
    """Writes out what a row asks about its clip.

    Args:
        processor: Of the model.
        config: The model's `ETChatConfig`.
        request: The row.
        clip: Its video.
        max_new_tokens: Longest answer.
        seed: Samples with it; None for greedy search.

    Raises:
        ValueError: If the row's times do not fit question, video or model, or the question or the video is too long
            for the model.
    """
    _check_times(request, clip, config.use_matching)
    shown = request.question if IMAGE_TOKEN in request.question else f"{IMAGE_TOKEN}\n{request.question}"
    text = processor.apply_chat_template([{"role": "user", "content": shown}], add_generation_prompt=True)
    if request.answer_start:
        text += request.answer_start if text.endswith("\n") else f" {request.answer_start}"
    question = request.question.replace(IMAGE_TOKEN, "").strip()
    questions = [question]
    if config.use_time_tag:
        questions = [f"Current time: {round(time, 1)}s. {question}" for time in clip.frame_times]
    num_frames, num_placeholders = len(clip.frame_times), text.count(IMAGE_TOKEN)
    text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * num_frames)
    length, limit = len(processor.tokenizer(text).input_ids), config.text_config.max_position_embeddings
    _check_length(length, num_frames * num_placeholders, num_placeholders, limit)
    return Prompt(
        text=text,
        questions=questions * num_placeholders,
        num_placeholders=num_placeholders,
        src=request.src,
        max_new_tokens=min(max_new_tokens, limit - length),
        repetition_penalty=request.repetition_penalty,
        seed=seed,
    )


def _check_length(length: int, num_frames: int, num_placeholders: int, limit: int) -> None:
    if length < limit:
        return
    if length - num_frames + num_placeholders >= limit:  # one frame of each clip would still be too much
        raise ValueError(
            f"the question is too long: its text takes {length - num_frames} tokens, and the model reads at most "
            f"{limit}, frames included"
        )
    raise ValueError(
        f"the prompt takes {length} tokens, {num_frames} of them frames; the model reads at most {limit}: lower "
        "--fps or set --max-frames"
    )


def _check_times(request: Request, clip: SampledClip | EncodedClip, use_matching: bool) -> None:
    if (count := request.question.count(VID_TOKEN)) != len(request.src):
        raise ValueError(f"the question holds {count} {VID_TOKEN}, but there are {len(request.src)} times for them")
    if request.src and not use_matching:
        raise ValueError(f"the question holds {VID_TOKEN}, but the model was trained without matching")
    # A copy of the video may be a little shorter than the annotated one; such times mean its last frame.
    end = max(clip.duration, clip.frame_times[-1], request.duration or 0.0)
    for time in request.src:
        if not 0 <= time <= end:
            raise ValueError(f"src holds {time} s, but the video lasts from 0 to {end:.2f} s")


def build_inputs(
    processor: ETChatProcessor, prompts: Sequence[Prompt], clips: Sequence[int], frame_times: Sequence[list[float]]
) -> dict:
    """Tokenises prompts about clips whose pixels are no longer needed.

    The processor builds the same inputs from pixels; here they were encoded once, for all questions on a video.

    Args:
        processor: Of the model.
        prompts: B rows.
        clips: For each row the index of its clip.
        frame_times: Seconds of each clip's frames.

    Returns:
        What `ETChatForConditionalGeneration.forward` takes, but `vision_features`; padded on the left, on the CPU.
    """
    tokens = processor.tokenizer(
        [prompt.text for prompt in prompts], padding=True, padding_side="left", return_tensors="pt"
    )
    questions = processor.qformer_tokenizer(
        [question for prompt in prompts for question in prompt.questions],
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    inputs = {
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask,
        "qformer_input_ids": questions.input_ids,
        "qformer_attention_mask": questions.attention_mask,
        "frame_times": list(frame_times),
        "placeholder_clips": [[clip] * prompt.num_placeholders for prompt, clip in zip(prompts, clips, strict=True)],
    }
    if any(prompt.src for prompt in prompts):
        inputs["vid_times"] = [list(prompt.src) for prompt in prompts]
    return inputs


def answer_batch(
    model: ETChatForConditionalGeneration,
    processor: ETChatProcessor,
    prompts: Sequence[Prompt],
    clips: Sequence[int],
    frame_times: Sequence[list[float]],
    vision_features: torch.Tensor,
) -> list[Answer]:
    """Answers a batch of questions.

    Args:
        model: In evaluation mode.
        processor: Of the model.
        prompts: B rows, all sampled or all greedy.
        clips: For each row the index of its clip.
        frame_times: Seconds of each clip's frames.
        vision_features: `model.get_vision_features` of all clips' frames, one clip after the other (N, patches, C).

    Returns:
        One answer per row.
    """
    inputs = build_inputs(processor, prompts, clips, frame_times)
    inputs = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in inputs.items()}
    ids = inputs["input_ids"]
    processors = []
    if any(prompt.repetition_penalty != 1.0 for prompt in prompts):
        words = inputs["attention_mask"].bool() & (ids != model.config.image_token_id)
        penalties = [prompt.repetition_penalty for prompt in prompts]
        processors.append(RowRepetitionPenalty(penalties, words, model.config.match_token_id))
    if prompts[0].seed is not None:
        processors.append(RowSampler([prompt.seed for prompt in prompts], TEMPERATURE))
    budgets = [prompt.max_new_tokens for prompt in prompts]
    outputs = model.generate(
        **inputs,
        vision_features=vision_features,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(budgets),
        pad_token_id=processor.tokenizer.pad_token_id,
        logits_processor=processors,
        stopping_criteria=[RowBudgets(budgets, ids.shape[1], ids.device)],
        return_dict_in_generate=True,
    )
    return [Answer(answer["text"], answer["timestamps"]) for answer in processor.post_process(outputs)]
