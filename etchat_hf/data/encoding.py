"""One row and its clip -> one training sample: token ids, labels, frames, times."""

import numpy as np

from etchat_hf.data.rows import check_clip, modality_of, read_times, read_turns
from etchat_hf.processing_etchat import IMAGE_TOKEN

IGNORED = -100


class SampleEncoder:
    """
    Encodes rows one by one, with the same processor calls as inference.

    Args:
        processor ([`ETChatProcessor`]): with the stage's chat template and frame rate.
        max_length (`int`, *optional*, defaults to 2048): longest sequence, frames included.
        use_matching (`bool`, *optional*, defaults to `True`): whether each `<vid>` has a time in `src` or `tgt`.

    Raises:
        ValueError: for a length that holds nothing.
    """

    def __init__(self, processor, max_length: int = 2048, use_matching: bool = True):
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be at least 1.")
        self.processor = processor
        self.max_length = max_length
        self.use_matching = use_matching

    def __call__(self, row: dict, clip, rng: np.random.Generator) -> dict:
        """
        Args:
            row (`dict`): an annotation row.
            clip: its image or video as [`ETChatVideoProcessor`] takes it; `None` for text alone.
            rng (`np.random.Generator`): says where missing placeholders go.

        Returns:
            `dict` with `input_ids` and `labels` `(L,)`, `was_cut` (`bool`); for a clip `pixel_values`
            `(T, 3, size, size)`, `frame_times` (one list), `placeholder_clips` (a 0 per placeholder),
            `qformer_input_ids` and `qformer_attention_mask` `(placeholders, words)`; with matching `vid_times`, the
            seconds of each `<vid>` left.

        Raises:
            ValueError: if the row is malformed, the clip unreadable, or no answer is left within `max_length`.
        """
        turns = read_turns(row)
        check_clip(row, turns)
        times = read_times(row, turns, self.use_matching)
        messages = [_message(role, text, clip, modality_of(row), rng) for role, text in turns]
        inputs = self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # Checked for inference, where a time outside the clip is a mistake; in training the model clamps it
            src=[0.0] * len(times) or None,
        )
        return self._cut(inputs, times)

    def _cut(self, inputs: dict, times: list[float]) -> dict:
        """The sample within `max_length`; it never ends inside a clip's frames, but before them."""
        input_ids = inputs["input_ids"][0]
        placeholders = inputs["placeholder_clips"][0] if "pixel_values" in inputs else []
        frames = (input_ids == self.processor.image_token_id).nonzero().view(max(1, len(placeholders)), -1)
        kept = int((frames[:, -1:] < self.max_length).sum())
        end = self.max_length if kept == len(placeholders) else int(frames[kept, 0].clamp(max=self.max_length))
        sample = {
            "input_ids": input_ids[:end],
            "labels": input_ids.masked_fill(inputs["assistant_masks"][0] == 0, IGNORED)[:end],
            "was_cut": len(input_ids) > end,
        }
        if (sample["labels"] == IGNORED).all():
            raise ValueError(f"frames and question alone fill max_length ({self.max_length}); no answer is left")
        if kept:
            # With time tags there is a text per frame
            texts = kept * len(inputs["qformer_input_ids"]) // len(placeholders)
            sample |= {key: inputs[key] for key in ("pixel_values", "frame_times")}
            sample |= {key: inputs[key][:texts] for key in ("qformer_input_ids", "qformer_attention_mask")}
            sample["placeholder_clips"] = placeholders[:kept]
        if self.use_matching:
            sample["vid_times"] = times[: int((sample["input_ids"] == self.processor.match_token_id).sum())]
        return sample


def _message(role: str, text: str, clip, modality: str, rng: np.random.Generator) -> dict:
    if role == "assistant" or clip is None:
        return {"role": role, "content": text}
    if IMAGE_TOKEN not in text:
        text = f"{IMAGE_TOKEN}\n{text}" if rng.random() < 0.5 else f"{text}\n{IMAGE_TOKEN}"
    return {"role": role, "content": _parts(text, {"type": modality, modality: clip})}


def _parts(text: str, clip: dict) -> list[dict]:
    """A text with placeholders as content parts, between which the chat templates put the line breaks again."""
    parts = []
    pieces = text.split(IMAGE_TOKEN)
    for index, piece in enumerate(pieces):
        after_clip, before_clip = index > 0, index < len(pieces) - 1
        if after_clip and before_clip and piece == "\n":
            piece = ""
        elif piece or (after_clip and before_clip):
            piece = piece[after_clip : len(piece) - before_clip]
            parts.append({"type": "text", "text": piece})
        if before_clip:
            parts.append(clip)
    return parts
