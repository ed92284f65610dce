"""Encoded samples -> one padded batch."""

import torch
from torch.nn.utils.rnn import pad_sequence

from etchat_hf.data.encoding import IGNORED


class ETChatDataCollator:
    """
    Merges what [`SampleEncoder`] made, padding on the right; clips one after the other.

    Args:
        processor ([`ETChatProcessor`]): its tokenizers' padding tokens are used.
        pad_to_multiple_of (`int`, *optional*): round the length up, as tensor cores like it.
    """

    def __init__(self, processor, pad_to_multiple_of: int | None = None):
        tokenizer = processor.tokenizer
        # Padding is masked everywhere, so any token will do where the tokenizer has none for it
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.qformer_pad_token_id = processor.qformer_tokenizer.pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, samples: list[dict]) -> dict:
        """
        Returns:
            `dict` with `input_ids`, `attention_mask`, `labels` `(B, L)`; where there are clips `pixel_values`
            `(N, 3, size, size)`, `frame_times`, `placeholder_clips`, `qformer_input_ids` and `qformer_attention_mask`
            `(placeholders, words)`; where there are `<vid>` `vid_times`.
        """
        input_ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": self._pad(input_ids, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(ids) for ids in input_ids], 0),
            "labels": self._pad([sample["labels"] for sample in samples], IGNORED),
        }
        with_clip = [sample for sample in samples if "pixel_values" in sample]
        if with_clip:
            batch |= self._merge_clips(samples, with_clip)
        vid_times = [sample.get("vid_times", []) for sample in samples]
        return batch | ({"vid_times": vid_times} if any(vid_times) else {})

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        return torch.nn.functional.pad(padded, (0, -padded.shape[1] % self.pad_to_multiple_of), value=value)

    def _merge_clips(self, samples: list[dict], with_clip: list[dict]) -> dict:
        placeholder_clips, num_clips = [], 0
        for sample in samples:
            placeholder_clips.append([num_clips + clip for clip in sample.get("placeholder_clips", [])])
            num_clips += len(sample.get("frame_times", []))
        words = [text for sample in with_clip for text in sample["qformer_input_ids"]]
        masks = [mask for sample in with_clip for mask in sample["qformer_attention_mask"]]
        return {
            "pixel_values": torch.cat([sample["pixel_values"] for sample in with_clip]),
            "frame_times": [times for sample in with_clip for times in sample["frame_times"]],
            "placeholder_clips": placeholder_clips,
            "qformer_input_ids": pad_sequence(words, batch_first=True, padding_value=self.qformer_pad_token_id),
            "qformer_attention_mask": pad_sequence(masks, batch_first=True, padding_value=0),
        }
