"""Decoding with `<vid>`: each one produced is matched to a frame and fed back as `embed(<vid>) + frame`.

A token is matched in the step that reads it, from the states that chose it. On a CPU, which sees the token without
waiting, only a `<vid>` is; an accelerator matches all and keeps the frames: no host synchronisation per token.
Everything that one call of `generate` needs travels in its own keyword arguments, so calls may run side by side.
"""

from dataclasses import dataclass, field

import torch
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

PER_CLIP_INPUTS = ("pixel_values", "vision_features", "frame_times")
PER_PLACEHOLDER_INPUTS = ("qformer_input_ids", "qformer_attention_mask")
PER_ROW_LISTS = ("placeholder_clips", "vid_times")
PROMPT_INPUTS = (*PER_CLIP_INPUTS, *PER_PLACEHOLDER_INPUTS, *PER_ROW_LISTS, "prompt_length")


@dataclass
class VidMatch:
    """
    The moment that one generated `<vid>` stands for.

    Args:
        position (`int`): column of the `<vid>` in `sequences`.
        frame (`int`): index of the matched frame among the clip's sampled frames.
        seconds (`float`): time of that frame, since the clip's first frame.
        probabilities (`torch.FloatTensor` of shape `(frames,)`): distribution over the clip's frames, on the CPU.
    """

    position: int
    frame: int
    seconds: float
    probabilities: torch.FloatTensor


@dataclass
class ETChatGenerateOutput(GenerateDecoderOnlyOutput):
    """
    transformers' output of `generate`, and:

    Args:
        matches (`list` of `list` of [`VidMatch`]): for each sequence its generated `<vid>` tokens in order. Empty for
            a sequence without a clip.
        prompt_length (`int`): columns of `sequences` that belong to the prompt.
    """

    matches: list[list[VidMatch]] | None = None
    prompt_length: int | None = None


@dataclass
class MatchRecorder:
    """
    What the steps of one call of `generate` leave behind.

    Args:
        can_skip (`bool`): whether a process may match other tokens than the others do: not where they share the head.
        scores (`list` of `torch.FloatTensor` of shape `(B, 1, T)`): for each step those of the token that it read;
            None where none was matched.
        unread (`tuple` of `torch.Tensor`): what `score_frames` takes for the last token, which no step reads.
    """

    can_skip: bool
    scores: list[torch.FloatTensor | None] = field(default_factory=list)
    unread: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


class ETChatGenerationMixin(GenerationMixin):
    """`generate` for [`ETChatForConditionalGeneration`]: greedy search and sampling, any padding side."""

    @torch.no_grad()
    def generate(self, inputs: torch.LongTensor | None = None, generation_config=None, **kwargs):
        """
        As `transformers.GenerationMixin.generate`; with `return_dict_in_generate=True` the result is an
        [`ETChatGenerateOutput`], which also carries the match of every `<vid>`.

        Raises:
            ValueError: for beam search, assisted decoding and continuing from a filled cache, which would match
                frames wrongly; and if placeholders, clips, texts and times do not go together.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        prompt = kwargs.get("input_ids")
        prompt_length = 1 if prompt is None else prompt.shape[1]  # without a prompt it is the first token, <bos>
        if (cache := kwargs.get("past_key_values")) is not None and cache.get_seq_length() > 0:
            raise ValueError("generate() cannot continue from a filled past_key_values; pass the whole conversation.")
        self._align_left(kwargs)
        recorder = MatchRecorder(can_skip=not self._is_sharded())
        if not recorder.can_skip:
            _gather_for(self, "_score_unread")
        outputs = super().generate(
            generation_config=generation_config, match_recorder=recorder, prompt_length=prompt_length, **kwargs
        )
        if isinstance(outputs, torch.Tensor):
            return outputs
        matches = self._collect_matches(outputs.sequences, recorder, prompt_length, kwargs)
        return ETChatGenerateOutput(**outputs, matches=matches, prompt_length=prompt_length)

    @staticmethod
    def _align_left(kwargs: dict):
        """Moves padding from the right to the left, where the next token is read from the last column."""
        mask = kwargs.get("attention_mask")
        if mask is None or kwargs.get("input_ids") is None or bool(mask[:, -1].all()):
            return
        order = mask.sort(dim=1, stable=True).indices
        kwargs["input_ids"] = kwargs["input_ids"].gather(1, order)
        kwargs["attention_mask"] = mask.gather(1, order)
        kwargs.pop("position_ids", None)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"E.T. Chat decodes by greedy search or sampling; {generation_mode.value} would lose the frames "
                "that its <vid> tokens were matched to. Set num_beams=1 and no assistant model."
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("E.T. Chat's frame blocks cannot be cut: set prefill_chunk_size=None.")

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        if expand_size == 1:
            return input_ids, model_kwargs
        kept = {key: model_kwargs.pop(key) for key in PER_CLIP_INPUTS if key in model_kwargs}
        if (clips := model_kwargs.get("placeholder_clips")) is not None:
            # A row's texts are copied together, row by row, while its clips are encoded once for all copies.
            texts = model_kwargs.get("qformer_input_ids")
            sizes = [len(row) for row in clips]
            if self.config.use_time_tag:
                sizes = [sum(len(kept["frame_times"][clip]) for clip in row) for row in clips]
            if texts is not None:
                index = torch.arange(len(texts), device=texts.device).split(sizes)
                index = torch.cat([rows for rows in index for _ in range(expand_size)])
                kept |= {key: model_kwargs.pop(key)[index] for key in PER_PLACEHOLDER_INPUTS}
        for key in PER_ROW_LISTS:
            if (rows := model_kwargs.pop(key, None)) is not None:
                kept[key] = [row for row in rows for _ in range(expand_size)]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | kept

    def prepare_inputs_for_generation(
        self,
        input_ids,
        is_first_iteration=False,
        match_recorder=None,
        vid_frames=None,
        match_states=None,
        frame_keys=None,
        frame_mask=None,
        **kwargs,
    ):
        if not is_first_iteration and kwargs.get("use_cache", True):
            for key in PROMPT_INPUTS:
                kwargs.pop(key, None)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration:  # a mask made ahead for a compilable cache would lack the frame blocks
            model_inputs["attention_mask"] = kwargs.get("attention_mask")
        model_inputs["skip_match_scores"] = True
        if vid_frames is not None:
            model_inputs |= {"vid_frames": vid_frames, "frame_keys": frame_keys, "frame_mask": frame_mask}
            cache = kwargs.get("past_key_values")
            compiles = cache is not None and cache.is_compileable  # to a single graph of all steps
            skips = match_recorder.can_skip and input_ids.device.type == "cpu" and not compiles
            if not skips or self.config.match_token_id in input_ids[:, -1].numpy():
                model_inputs["match_states"] = match_states
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if outputs.frame_keys is None:
            return model_kwargs
        use_cache = model_kwargs.get("use_cache", True)
        if "frame_keys" not in model_kwargs:  # the prompt's, which no later step changes
            kept = ("frame_embeds", "frame_keys", "frame_mask") if use_cache else ("frame_keys", "frame_mask")
            model_kwargs |= {key: outputs[key] for key in kept}
        # The next replay of a CUDA graph writes over its outputs
        states, scores = outputs.match_states.clone(), outputs.match_scores
        recorder = model_kwargs["match_recorder"]
        recorder.scores.append(None if scores is None else scores.clone())
        recorder.unread = states, model_kwargs["frame_keys"], model_kwargs["frame_mask"]
        unmatched = torch.zeros_like(outputs.vid_frames[:, -1:])
        frames = unmatched if use_cache else torch.cat([outputs.vid_frames, unmatched], dim=1)
        return model_kwargs | {"match_states": states, "vid_frames": frames}

    def _score_unread(self, states, frame_keys, frame_mask):
        return self.score_frames(states, frame_keys, frame_mask)

    def _collect_matches(self, sequences, recorder, prompt_length: int, kwargs: dict) -> list[list[VidMatch]]:
        matches = [[] for _ in sequences]
        clips = kwargs.get("placeholder_clips")
        if recorder.unread is None or clips is None:
            return matches
        copies = len(sequences) // len(clips)
        generated = sequences[:, prompt_length:].cpu() == self.config.match_token_id
        # Processes that share the head use it together
        scores_last = not recorder.can_skip or bool(generated[:, -1].any())
        scores = [*recorder.scores[1:], self._score_unread(*recorder.unread) if scores_last else None]
        scores = {step: scores[step][:, 0].cpu() for step in generated.any(0).nonzero().flatten().tolist()}
        for row, step in generated.nonzero().tolist():
            if not clips[row // copies]:
                continue
            times = kwargs["frame_times"][clips[row // copies][-1]]
            row_scores = scores[step][row, : len(times)]
            frame = int(row_scores.argmax())
            matches[row].append(VidMatch(prompt_length + step, frame, times[frame], row_scores.softmax(-1)))
        return matches


def _gather_for(model: torch.nn.Module, method: str) -> None:
    """Under FSDP2, has the model's parameters gathered for another method than `forward`, too."""
    # Heavy, and needed for nothing else
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, method)


__all__ = ["ETChatGenerateOutput", "ETChatGenerationMixin", "VidMatch"]
