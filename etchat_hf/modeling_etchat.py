"""E.T. Chat in PyTorch: frames -> one token per frame -> language model -> `<vid>` matched to a frame.

The way of a batch, top to bottom: `FrameLayout` says where the frames stand in the token sequences, the frame
compressor makes one embedding per frame, `ETChatModel` merges them and runs the decoder blocks, and
`ETChatForConditionalGeneration` adds the language-model head and the two heads that match `<vid>` to a frame.
This file travels with every saved model, so it imports only its neighbours and public packages.
"""

import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, InstructBlipQFormerModel, InstructBlipVisionModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.masking_utils import create_masks_for_generate, or_masks
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerMultiHeadAttention
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import maybe_autocast
from transformers.utils.output_capturing import capture_outputs

from .configuration_etchat import ETChatConfig
from .generation_etchat import ETChatGenerationMixin

logger = logging.get_logger(__name__)

LAYER_NORM_EPS = 1e-5
# Frames that are encoded at once: enough to fill a GPU, few enough to bound the activations. On a CPU so few that they
# stay in its caches, which saves the encoder a seventh of its time.
CHUNK_FRAMES, CPU_CHUNK_FRAMES = 64, 8
FRAME_BLOCK_ATTENTION = ("eager", "sdpa", "flex_attention")


@dataclass
class ETChatModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`ETChatModel`]; B sequences of L tokens, of which the longest reference clip has T frames.

    Args:
        match_states (`torch.FloatTensor` of shape `(B, L, hidden)`):
            The second-to-last block's output; the position left of a `<vid>` is what its match is read from.
        frame_states (`torch.FloatTensor` of shape `(B, T, hidden)`, *optional*):
            The last block's output, before the final norm, at the frames of each sequence's reference clip, that of
            its last placeholder. Only where the frames were part of the input.
        frame_embeds (`torch.FloatTensor` of shape `(B, T, hidden)`):
            The embeddings of these frames, as merged into the input; zeros where there is no frame.
        frame_mask (`torch.BoolTensor` of shape `(B, T)`):
            Which of these frames exist.
        vid_frames (`torch.FloatTensor` of shape `(B, L)`):
            The (fractional) frame that a `<vid>` of the input stands for; 0 at all other tokens.
    """

    match_states: torch.FloatTensor | None = None
    frame_states: torch.FloatTensor | None = None
    frame_embeds: torch.FloatTensor | None = None
    frame_mask: torch.BoolTensor | None = None
    vid_frames: torch.FloatTensor | None = None


@dataclass
class ETChatCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of [`ETChatForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            `lm_loss + match_loss`, given `labels`.
        lm_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Next-token cross entropy.
        match_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Soft-label cross entropy of the `<vid>` targets; only with `use_matching`.
        logits (`torch.FloatTensor` of shape `(B, kept, vocab_size)`, *optional*):
            Next-token scores; none with `skip_logits`.
        match_scores (`torch.FloatTensor`, float32, *optional*):
            Score of each frame of the reference clip, `-inf` where there is no frame. Without labels of shape
            `(B, kept, T)`, aligned with `logits`; with labels of shape `(targets, T)`, a row for each `<vid>` of the
            labels in order; with `match_states` and `skip_match_scores` of shape `(B, 1, T)`, of the input's last
            token. Their softmax is the distribution over frames.
        match_states (`torch.FloatTensor` of shape `(B, 1, hidden)`):
            The second-to-last block's output at the last position: by it the next token is matched, if it is `<vid>`.
        frame_keys (`torch.FloatTensor` of shape `(B, T, hidden)`, float32, *optional*):
            `frm_head` of the frames; with `frame_embeds`, `frame_mask` and `vid_frames` (see
            [`ETChatModelOutputWithPast`]) all that a later decoding step needs to know of the clip.
    """

    lm_loss: torch.FloatTensor | None = None
    match_loss: torch.FloatTensor | None = None
    match_scores: torch.FloatTensor | None = None
    match_states: torch.FloatTensor | None = None
    frame_keys: torch.FloatTensor | None = None
    frame_embeds: torch.FloatTensor | None = None
    frame_mask: torch.BoolTensor | None = None
    vid_frames: torch.FloatTensor | None = None


@dataclass
class FrameLayout:
    """
    Where the frames of a batch stand in its token sequences.

    Args:
        is_frame (`torch.BoolTensor` of shape `(B, L)`): the frame tokens.
        blocks (`torch.LongTensor` of shape `(2, B, K)`): first column and end of each placeholder's attention block.
        positions (`torch.LongTensor` of shape `(B, T)`): columns of the reference clip's frames.
        mask (`torch.BoolTensor` of shape `(B, T)`): which of `positions` exist.
        frame_index (`torch.LongTensor` of shape `(frame tokens,)`): frame of the batch that each frame token shows.
        text_index (`torch.LongTensor` of shape `(frame tokens,)`): placeholder that each frame token belongs to.
    """

    is_frame: torch.BoolTensor
    blocks: torch.LongTensor
    positions: torch.LongTensor
    mask: torch.BoolTensor
    frame_index: torch.LongTensor
    text_index: torch.LongTensor

    @classmethod
    def locate(
        cls, input_ids, attention_mask, image_token_id, frame_times, placeholder_clips, prompt_length=None
    ) -> "FrameLayout":
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): tokens with one placeholder per frame.
            attention_mask (`torch.LongTensor` of shape `(B, L)`, *optional*): 0 for padding.
            frame_times, placeholder_clips, prompt_length: see [`ETChatForConditionalGeneration.forward`].

        Raises:
            ValueError: if a row's placeholder tokens are not as many as the frames of its clips.
        """
        clip_sizes = [len(times) for times in frame_times]
        sizes = [[clip_sizes[clip] for clip in clips] for clips in placeholder_clips]
        is_frame = input_ids == image_token_id
        if prompt_length is not None:
            is_frame[:, prompt_length:] = False
        found, expected = is_frame.sum(1).tolist(), [sum(row) for row in sizes]
        if found != expected:
            raise ValueError(
                f"The rows of input_ids hold {found} placeholder tokens, but their clips have {expected} frames; "
                "pass frame_times and placeholder_clips as the processor returned them."
            )
        device = input_ids.device
        columns = (~is_frame).to(torch.uint8).argsort(dim=1, stable=True)  # the frames first, in order
        counts = torch.tensor([row[-1] if row else 0 for row in sizes], device=device)
        offsets = torch.arange(max([1, *(row[-1] for row in sizes if row)]), device=device)
        rank = torch.tensor(expected, device=device)[:, None] - counts[:, None] + offsets
        starts = np.cumsum([0, *clip_sizes])
        frames = [np.arange(starts[clip], starts[clip + 1]) for clips in placeholder_clips for clip in clips]
        return cls(
            is_frame=is_frame,
            blocks=_attention_blocks(columns, attention_mask, sizes),
            positions=columns.gather(1, rank.clamp(max=input_ids.shape[1] - 1)),
            mask=offsets < counts[:, None],
            frame_index=torch.from_numpy(np.concatenate([*frames, np.zeros(0, np.int64)])).to(device),
            text_index=torch.arange(len(frames), device=device).repeat_interleave(
                torch.tensor([len(f) for f in frames], dtype=torch.long, device=device)
            ),
        )


def _attention_blocks(columns, attention_mask, sizes: list[list[int]]) -> torch.LongTensor:
    """
    Where the frames of each placeholder see each other: `(2, B, K)`, first column and end, equal where there is none.

    A row's first block is its first placeholder. A further block has its placeholder's length, but begins where the
    text between the two placeholders would end if the row began with that text: so the published weights were
    trained, and figures of conversations with several placeholders agree with the original only this way.
    """
    num_blocks = max([0, *map(len, sizes)])
    lengths = torch.zeros(len(sizes), num_blocks, dtype=torch.long)
    for row, counts in enumerate(sizes):
        lengths[row, : len(counts)] = torch.tensor(counts, dtype=torch.long)
    lengths = lengths.to(columns.device)
    first = columns.gather(1, (lengths.cumsum(1) - lengths).clamp(max=columns.shape[1] - 1))
    padding = columns.new_zeros(len(columns), 1)
    if attention_mask is not None:
        padding = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
    previous_end = torch.cat([padding, (first + lengths)[:, :-1]], dim=1)[:, :num_blocks]
    start = first - previous_end + padding
    return torch.stack([start, start + lengths])


def _block_overlay(blocks: torch.LongTensor):
    """Mask function, in transformers' form, that opens the blocks of `_attention_blocks` in both directions."""

    def one_block(start, end):
        def inner(batch_idx, head_idx, q_idx, kv_idx):
            first, last = start[batch_idx], end[batch_idx]
            return (first <= q_idx) & (q_idx < last) & (first <= kv_idx) & (kv_idx < last)

        return inner

    starts, ends = blocks.unbind()
    return or_masks(*map(one_block, starts.unbind(1), ends.unbind(1)))


@dataclass
class QueryFolding:
    """
    Which of N texts are about which of F frames, so that what is computed of a frame serves all its texts.

    Args:
        places (`torch.LongTensor` of shape `(N,)`): place of each text among those of all frames.
        frames (`int`): F.
        texts (`int`): the most texts that one frame has.
    """

    places: torch.LongTensor
    frames: int
    texts: int

    @classmethod
    def of(cls, frame_index: torch.LongTensor, frames: int) -> "QueryFolding":
        """`frame_index` (N,) says which frame each text is about."""
        counts = torch.bincount(frame_index, minlength=frames)
        order = frame_index.argsort(stable=True)
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[frame_index[order]]
        texts = int(counts.max())
        return cls(frame_index * texts + ranks, frames, texts)

    def fold(self, queries: torch.Tensor) -> torch.Tensor:
        """The queries `(N, q, width)` of all texts beside each other: `(F, texts * q, width)`."""
        beside = queries.new_zeros(self.frames * self.texts, *queries.shape[1:])
        return beside.index_copy(0, self.places.to(queries.device), queries).view(self.frames, -1, queries.shape[-1])

    def unfold(self, states: torch.Tensor) -> torch.Tensor:
        """Back to `(N, q, width)`."""
        states = states.reshape(self.frames * self.texts, -1, states.shape[-1])
        return states[self.places.to(states.device)]


class SharedCrossAttention(InstructBlipQFormerMultiHeadAttention):
    """Cross-attention for which a frame's keys and values are computed once for all its texts."""

    def forward(self, hidden_states, attention_mask=None, *, folding: QueryFolding | None = None, **kwargs):
        if folding is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        output, weights = super().forward(folding.fold(hidden_states), attention_mask, **kwargs)
        return folding.unfold(output), weights


class ETChatFrameCompressor(nn.Module):
    """One embedding per frame for a question: Q-Former, aggregator, projector (E.T. Bench paper, section 4)."""

    def __init__(self, config: ETChatConfig):
        super().__init__()
        width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
        query_width = config.qformer_config.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, query_width))
        self.vision_layernorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.qformer = InstructBlipQFormerModel(config.qformer_config)
        # The last block's text half feeds nothing: without a gradient it must not wait for one under DDP.
        last = self.qformer.encoder.layer[-1]
        last.intermediate.requires_grad_(False)
        last.output.requires_grad_(False)
        for layer in self.qformer.encoder.layer:
            if layer.has_cross_attention:
                layer.crossattention.attention = SharedCrossAttention(config.qformer_config, is_cross_attention=True)
        self.query_projection = nn.Linear(query_width, width)
        self.aggregator_query = _norm_linear(width, width)
        self.aggregator_key = _norm_linear(width, width)
        self.projector = _norm_linear(width, text_width)

    def forward(self, vision_features, qformer_input_ids, qformer_attention_mask, frame_index=None):
        """
        Args:
            vision_features (`torch.FloatTensor` of shape `(F, patches, C)`): F frames, before any norm.
            qformer_input_ids (`torch.LongTensor` of shape `(N, words)`): N questions, each about one frame.
            qformer_attention_mask (`torch.LongTensor` of shape `(N, words)`): 1 for words, 0 for padding.
            frame_index (`torch.LongTensor` of shape `(N,)`, *optional*): the frame that each question is about; by
                default a question for each frame in order.

        Returns:
            `torch.FloatTensor` of shape `(N, text hidden)`.
        """
        folding = None if frame_index is None else QueryFolding.of(frame_index, len(vision_features))
        queries = self.query_tokens.expand(len(qformer_input_ids), -1, -1)
        num_queries = queries.shape[1]
        hidden = self.qformer(
            input_ids=qformer_input_ids,
            attention_mask=nn.functional.pad(qformer_attention_mask, (num_queries, 0), value=1),
            query_embeds=queries,
            encoder_hidden_states=self.vision_layernorm(vision_features),
            folding=folding,
        ).last_hidden_state[:, :num_queries]
        queries = self.query_projection(hidden)
        sought = self.aggregator_query(queries)
        if folding is not None:
            sought = folding.fold(sought)
        scores = sought @ self.aggregator_key(vision_features).mT
        found = (scores / math.sqrt(vision_features.shape[-1])).softmax(-1) @ vision_features
        if folding is not None:
            found = folding.unfold(found)
        return self.projector((found + queries).mean(1))


class ETChatPooledProjector(nn.Module):
    """One embedding per frame without a question: the mean of its patches through N linear layers."""

    def __init__(self, config: ETChatConfig):
        super().__init__()
        width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
        layers = [nn.Linear(width, text_width)]
        for _ in range(config.num_projector_layers - 1):
            layers += [nn.GELU(), nn.Linear(text_width, text_width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, vision_features):
        """`(F, patches, C)` to `(F, text hidden)`."""
        return self.layers(vision_features.mean(1))


def _norm_linear(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_features, eps=LAYER_NORM_EPS), nn.Linear(in_features, out_features))


class ETChatMatchHead(nn.Sequential):
    """Where `<vid>` and frames are compared; stays in floating point where the rest is quantised."""

    def __init__(self, width: int):
        super().__init__(
            nn.LayerNorm(width, eps=LAYER_NORM_EPS),
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width),
        )

    def forward(self, states):
        """`(..., width)` to `(..., width)`, in the dtype of the head."""
        return super().forward(states.to(self[0].weight.dtype))


def check_frame_blocks(config: ETChatConfig, attn_implementation: str):
    """
    Raises:
        ValueError: if the attention backend cannot express the frame blocks that the configuration asks for.
    """
    if config.bi_attention and attn_implementation not in FRAME_BLOCK_ATTENTION:
        raise ValueError(
            f"attn_implementation {attn_implementation!r} cannot express the bidirectional frame blocks of "
            f"bi_attention; choose one of {FRAME_BLOCK_ATTENTION}."
        )


class ETChatPreTrainedModel(PreTrainedModel):
    config: ETChatConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["InstructBlipEncoderLayer", "InstructBlipQFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        if attn_implementation is not None:
            check_frame_blocks(self.config, attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ETChatFrameCompressor):
            init.normal_(module.query_tokens, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`; a folder that holds an adapter and a config.json but no weights, as the
        checkpoints of LoRA training, is loaded upon the base that its adapter_config.json names.
        """
        folder = Path(pretrained_model_name_or_path or "")
        is_stage = all((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
        if not is_stage or any(folder.glob("model*.safetensors*")):
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        # The folder's own configuration tells of heads and rows that the base lacks and the adapter fills.
        config = kwargs.pop("config", None) or ETChatConfig.from_pretrained(folder)
        wants_info = kwargs.pop("output_loading_info", False)
        for name in ("adapter_kwargs", "revision", "_commit_hash"):  # they speak of the folder
            kwargs.pop(name, None)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # else what the adapter fills is reported as missing
        try:
            model, info = super().from_pretrained(
                base, *model_args, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        finally:
            logging.set_verbosity(verbosity)
        model.load_adapter(str(folder))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as adapter:
            filled = {key.removeprefix("base_model.model.") for key in adapter.keys()}
        info["missing_keys"] = [key for key in info["missing_keys"] if key not in filled]
        info["mismatched_keys"] = [entry for entry in info["mismatched_keys"] if entry[0] not in filled]
        if info["missing_keys"] or info["mismatched_keys"]:
            missing = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
            logger.warning("%s: neither it nor %s holds %s, which start fresh", folder, base, ", ".join(missing))
        return (model.eval(), info) if wants_info else model.eval()


class ETChatModel(ETChatPreTrainedModel):
    """Vision encoder, frame compressor and decoder blocks; no heads."""

    # Of the language model's blocks, whose own class says which modules give them.
    _can_record_outputs = {"hidden_states": "language_model.layers", "attentions": "language_model.layers.self_attn"}

    def __init__(self, config: ETChatConfig):
        super().__init__(config)
        self.vision_tower = InstructBlipVisionModel(config.vision_config)
        # Frames are the raw patch features (SPEC: no final norm); the encoder is frozen in every stage.
        self.vision_tower.post_layernorm = nn.Identity()
        self.vision_tower.requires_grad_(False)
        compressor = ETChatFrameCompressor if config.projector_type == "qformer" else ETChatPooledProjector
        self.compressor = compressor(config)
        self.language_model = AutoModel.from_config(config.text_config)
        # Gemma-2 scales inside its embedding module, which the frames do not pass.
        self.embed_scale = config.text_config.hidden_size**0.5 if config.text_config.model_type == "gemma2" else None
        self.post_init()

    @torch.no_grad()
    def get_vision_features(self, pixel_values: torch.FloatTensor) -> torch.FloatTensor:
        """
        Encodes frames, once for any number of questions: pass the result on as `vision_features`. Beyond the result
        it takes the memory of a few frames only. The encoder computes in its own dtype, under autocast too: frozen as
        it is, frames have the same features in training, evaluation and inference.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(N, 3, size, size)`): normalised frames.

        Returns:
            `torch.FloatTensor` of shape `(N, patches, C)`, without gradient.
        """
        size = CPU_CHUNK_FRAMES if pixel_values.device.type == "cpu" else CHUNK_FRAMES
        if _is_sharded(self.vision_tower):  # the others may have other numbers of frames, hence of chunks
            size = len(pixel_values)
        features = None
        for number, chunk in enumerate(pixel_values.split(size)):
            with maybe_autocast(chunk.device.type, enabled=False):
                patches = self.vision_tower(chunk.to(self.vision_tower.dtype)).last_hidden_state[:, 1:]
            if features is None:
                features = patches.new_empty(len(pixel_values), *patches.shape[1:])
            features[number * size : number * size + len(patches)] = patches
        return features

    def get_frame_embeds(self, vision_features, qformer_input_ids=None, qformer_attention_mask=None, frame_index=None):
        """
        Compresses frames, each once for all questions about it.

        Args:
            vision_features (`torch.FloatTensor` of shape `(F, patches, C)`): what [`get_vision_features`] returned.
            qformer_input_ids, qformer_attention_mask (`torch.LongTensor` of shape `(N, words)`, *optional*):
                N questions, each about one frame; the pooled projector needs none.
            frame_index (`torch.LongTensor` of shape `(N,)`, *optional*):
                The frame that each question is about; by default a question for each frame in order.

        Returns:
            `torch.FloatTensor` of shape `(N, text hidden)`.

        Raises:
            ValueError: if the question-conditioned compressor gets no text.
        """
        if self.config.projector_type != "qformer":
            embeds = self.compressor(vision_features)
            return embeds if frame_index is None else embeds[frame_index.to(embeds.device)]
        if qformer_input_ids is None:
            raise ValueError("Frames need qformer_input_ids and qformer_attention_mask, a text per placeholder.")
        texts = qformer_input_ids, qformer_attention_mask
        frames, asked = len(vision_features), len(qformer_input_ids)
        size = max(1, CHUNK_FRAMES * frames // max(frames, asked))
        # Training keeps all activations anyway, and processes in lockstep must make the same steps.
        if size >= frames or torch.is_grad_enabled() or _in_lockstep(self):
            return self.compressor(vision_features, *texts, frame_index)
        if frame_index is None:
            frame_index = torch.arange(frames, device=qformer_input_ids.device)
        order, embeds = [], []
        for number, chunk in enumerate(vision_features.split(size)):
            rows = (frame_index // size == number).nonzero().flatten()
            if len(rows):
                index = frame_index[rows] - number * size
                embeds.append(self.compressor(chunk, *(text[rows] for text in texts), index))
                order.append(rows)
        return torch.cat(embeds)[torch.cat(order).argsort().to(embeds[0].device)]

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        frame_times: list[list[float]] | None = None,
        placeholder_clips: list[list[int]] | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.LongTensor | None = None,
        vid_times: list[list[float]] | None = None,
        vid_frames: torch.FloatTensor | None = None,
        frame_embeds: torch.FloatTensor | None = None,
        frame_mask: torch.BoolTensor | None = None,
        prompt_length: int | None = None,
        **kwargs,
    ) -> ETChatModelOutputWithPast:
        """See [`ETChatForConditionalGeneration.forward`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if vid_times is not None and any(vid_times) and not self.config.use_matching:
            raise ValueError("vid_times gives times, but this model was trained without <vid> matching.")
        layout = None
        if inputs_embeds is None:
            clips = frame_times or [], placeholder_clips or [[]] * len(input_ids)
            if frame_embeds is None and (
                frame_times is not None or past_key_values is None or self.config.use_matching
            ):
                layout = FrameLayout.locate(
                    input_ids, attention_mask, self.config.image_token_id, *clips, prompt_length
                )
            inputs_embeds = self._embed_tokens(input_ids, layout)
        if layout is not None and layout.frame_index.numel():
            features = vision_features if vision_features is not None else self._encode(pixel_values)
            inputs_embeds = self._merge_frames(
                inputs_embeds, layout, features, qformer_input_ids, qformer_attention_mask
            )
        elif frame_embeds is None and past_key_values is None and _in_lockstep(self):
            inputs_embeds = inputs_embeds + self._idle_compressor().to(inputs_embeds)
        if layout is not None:
            frame_mask = layout.mask
            frame_embeds = _gather(inputs_embeds, layout.positions) * frame_mask[..., None]
        if self.config.use_matching and input_ids is not None:
            is_vid = input_ids == self.config.match_token_id
            if vid_frames is None:
                vid_frames = self._locate_vids(is_vid, vid_times, *clips)
            shown = _gather(frame_embeds, vid_frames.round().long())
            inputs_embeds = torch.where(is_vid[..., None], inputs_embeds + shown, inputs_embeds)

        last_hidden, match_states, last_states, past_key_values = self._decode(
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            use_cache,
            layout.blocks if layout is not None else None,
            **kwargs,
        )
        return ETChatModelOutputWithPast(
            last_hidden_state=last_hidden,
            past_key_values=past_key_values,
            match_states=match_states,
            frame_states=_gather(last_states, layout.positions) if layout is not None else None,
            frame_embeds=frame_embeds,
            frame_mask=frame_mask,
            vid_frames=vid_frames,
        )

    def _encode(self, pixel_values):
        if pixel_values is None:
            raise ValueError("frame_times names frames, but neither pixel_values nor vision_features holds them.")
        return self.get_vision_features(pixel_values)

    def _idle_compressor(self):
        """0, by way of an empty frame: in a batch without a clip, too, processes must make the same steps together."""
        size = self.config.vision_config.image_size
        parameter = self.vision_tower.embeddings.class_embedding
        features = self.get_vision_features(torch.zeros(1, 3, size, size, device=parameter.device))
        text = torch.zeros(1, 1, dtype=torch.long, device=parameter.device)
        return self.get_frame_embeds(features, text, torch.ones_like(text)).sum() * 0.0

    def _embed_tokens(self, input_ids, layout: FrameLayout | None):
        if layout is not None:
            input_ids = input_ids.masked_fill(layout.is_frame, 0)  # the placeholder's id may have no row
        return self.get_input_embeddings()(input_ids)

    def _merge_frames(self, inputs_embeds, layout: FrameLayout, features, texts, text_mask):
        num_frames = int(layout.frame_index.max()) + 1
        if len(features) < num_frames:
            raise ValueError(f"frame_times names {num_frames} frames, but only {len(features)} were passed.")
        if texts is not None:
            expected = len(layout.text_index) if self.config.use_time_tag else int(layout.text_index[-1]) + 1
            if len(texts) != expected:
                unit = "frame" if self.config.use_time_tag else "placeholder"
                raise ValueError(f"qformer_input_ids holds {len(texts)} texts for {expected} {unit}s.")
            if not self.config.use_time_tag:
                texts, text_mask = texts[layout.text_index], text_mask[layout.text_index]
        in_order = torch.arange(len(features), device=layout.frame_index.device)
        index = None if torch.equal(layout.frame_index, in_order) else layout.frame_index
        frames = self.get_frame_embeds(features, texts, text_mask, index).to(inputs_embeds)
        if self.embed_scale is not None:
            frames = frames * torch.tensor(self.embed_scale, dtype=frames.dtype, device=frames.device)
        return inputs_embeds.masked_scatter(layout.is_frame[..., None], frames)

    def _locate_vids(self, is_vid, vid_times: list | None, frame_times: list, placeholder_clips: list):
        """Times of the input's `<vid>` as frames of the reference clip: interpolated, and clamped to the clip."""
        vid_times = vid_times or [[]] * len(is_vid)
        found, expected = is_vid.sum(1).tolist(), [len(times) for times in vid_times]
        if found != expected:
            raise ValueError(f"The rows of input_ids hold {found} <vid> tokens, but vid_times gives {expected} times.")
        frames = []
        for row, (times, clips) in enumerate(zip(vid_times, placeholder_clips, strict=True)):
            if times and not clips:
                raise ValueError(f"Row {row} holds <vid>, a moment of a clip, but no clip.")
            if times:
                clip = frame_times[clips[-1]]
                frames.extend(np.interp(times, clip, np.arange(len(clip))))
        vid_frames = torch.zeros(is_vid.shape, dtype=torch.float32, device=is_vid.device)
        vid_frames[is_vid] = torch.tensor(frames, dtype=torch.float32, device=is_vid.device)
        return vid_frames

    def _decode(
        self,
        inputs_embeds,
        attention_mask,
        position_ids,
        past_key_values,
        use_cache,
        blocks,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Cache | None]:
        """
        The decoder blocks, one by one, because matching reads the last two of them before the final norm.

        Returns:
            The output of the final norm, of the last block but one and of the last block, `(B, L, hidden)` each, and
            the cache.
        """
        decoder = self.language_model
        if use_cache is None:
            use_cache = decoder.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=decoder.config)
        if position_ids is None:
            position_ids = _position_ids(inputs_embeds, attention_mask, past_key_values)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = self.create_masks(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids, blocks
            )
        layer_types = decoder.config.layer_types if len(masks) > 1 else list(masks) * len(decoder.layers)
        position_embeddings = decoder.rotary_emb(inputs_embeds, position_ids)

        hidden = match_states = inputs_embeds
        for layer, layer_type in zip(decoder.layers, layer_types, strict=True):
            match_states = hidden
            hidden = layer(
                hidden,
                attention_mask=masks[layer_type],
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return decoder.norm(hidden), match_states, hidden, past_key_values if use_cache else None

    @staticmethod
    def create_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids, blocks=None) -> dict:
        """
        Attention masks by layer type: causal, and open in both directions within a frame block.

        Raises:
            ValueError: see [`check_frame_blocks`].
        """
        check_frame_blocks(config, config.text_config._attn_implementation)
        opens = config.bi_attention and blocks is not None and blocks.shape[-1] > 0
        masks = create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            or_mask_function=_block_overlay(blocks) if opens else None,
        )
        return masks if isinstance(masks, dict) else {"full_attention": masks}


def _in_lockstep(model: nn.Module) -> bool:
    """Whether other processes may wait for this one to use all parameters."""
    return model.training or (torch.distributed.is_available() and torch.distributed.is_initialized())


def _is_sharded(module: nn.Module) -> bool:
    """Whether processes hold a part of each parameter (FSDP2, ZeRO-3), so that all must run the module as often."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return is_deepspeed_zero3_enabled() or any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _position_ids(inputs_embeds, attention_mask, past_key_values):
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past)[None]


def _gather(states: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
    """Rows `index` (B, n) of `states` (B, m, width): (B, n, width)."""
    return states.gather(1, index.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))


class ETChatForConditionalGeneration(ETChatGenerationMixin, ETChatPreTrainedModel):
    """E.T. Chat with its language-model head and, with `use_matching`, the heads that match `<vid>` to a frame."""

    # Beside float16's range, this is how transformers learns what not to quantise.
    _keep_in_fp32_modules = ["vid_head", "frm_head"]
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _auto_class = "AutoModel"

    def __init__(self, config: ETChatConfig):
        super().__init__(config)
        text = config.text_config
        self.model = ETChatModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.use_matching:
            self.vid_head = ETChatMatchHead(text.hidden_size)
            self.frm_head = ETChatMatchHead(text.hidden_size)
        self.post_init()

    @torch.no_grad()
    def enable_matching(self, match_token_id: int) -> None:
        """
        Turns matching on in a model that was trained without: fresh heads, and a `<vid>` row where it has none.

        Args:
            match_token_id (`int`): id of `<vid>`; rows that are missing for it become the mean of the others.

        Raises:
            ValueError: if matching is on already, or the language model is too shallow for it.
        """
        if self.config.use_matching:
            raise ValueError("Matching is on already: the model has its heads.")
        text = self.config.text_config
        rows = text.vocab_size
        if match_token_id >= rows:
            self.resize_token_embeddings(match_token_id + 1, mean_resizing=False)
            for weight in {self.get_input_embeddings().weight, self.lm_head.weight}:
                weight[rows:] = weight[:rows].mean(0)
        self.config.match_token_id, self.config.use_matching = match_token_id, True
        self.config.validate_combinations()
        for name in ("vid_head", "frm_head"):
            head = ETChatMatchHead(text.hidden_size).to(self.lm_head.weight)
            head.apply(self._init_weights)
            setattr(self, name, head)

    def get_vision_features(self, pixel_values: torch.FloatTensor) -> torch.FloatTensor:
        """See [`ETChatModel.get_vision_features`]."""
        return self.model.get_vision_features(pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        pixel_values: torch.FloatTensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        frame_times: list[list[float]] | None = None,
        placeholder_clips: list[list[int]] | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.LongTensor | None = None,
        vid_times: list[list[float]] | None = None,
        vid_frames: torch.FloatTensor | None = None,
        frame_embeds: torch.FloatTensor | None = None,
        frame_keys: torch.FloatTensor | None = None,
        frame_mask: torch.BoolTensor | None = None,
        match_states: torch.FloatTensor | None = None,
        prompt_length: int | None = None,
        skip_logits: bool = False,
        skip_match_scores: bool = False,
        num_matched_samples_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ETChatCausalLMOutputWithPast:
        r"""
        Times are Python lists, not tensors, so that casting a batch to half precision cannot blur them.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Token ids, with one placeholder token (`config.image_token_id`) per frame.
            attention_mask (`torch.LongTensor` of shape `(B, L)`, *optional*):
                1 for tokens, 0 for padding on either side; masks by layer type once prepared by `generate`.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Targets, -100 where none. Every `<vid>` in them is also a match target, at its `vid_times`.
            pixel_values (`torch.FloatTensor` of shape `(N, 3, size, size)`, *optional*):
                The normalised frames of all clips, one clip after the other.
            vision_features (`torch.FloatTensor` of shape `(N, patches, C)`, *optional*):
                In place of `pixel_values`: what [`get_vision_features`] made of them.
            frame_times (`list` of `list` of `float`, *optional*):
                For each clip the time of each of its frames, in seconds since the first.
            placeholder_clips (`list` of `list` of `int`, *optional*):
                For each row the clip that each of its placeholders shows, in order.
            qformer_input_ids, qformer_attention_mask (`torch.LongTensor` of shape `(placeholders, words)`):
                The question of each placeholder, row after row; of each frame token with `use_time_tag`.
            vid_times (`list` of `list` of `float`, *optional*):
                For each row the times of its `<vid>` tokens in order, in seconds; clamped to the clip.
            vid_frames, frame_embeds, frame_keys, frame_mask:
                What an earlier step returned, for steps that continue it from `past_key_values`.
            match_states (`torch.FloatTensor` of shape `(B, 1, hidden)`, *optional*):
                What the step before returned: where the input's last token is `<vid>`, it is matched by them, and the
                frame replaces the last column of `vid_frames`.
            prompt_length (`int`, *optional*):
                Columns that were given, where generated ones follow: a placeholder among those shows no frame.
            skip_logits (`bool`, *optional*, defaults to `False`):
                Whether to apply the language-model head only where there are labels, and return no logits.
            skip_match_scores (`bool`, *optional*, defaults to `False`):
                Whether to leave the positions that choose the next token unmatched.
            num_matched_samples_in_batch (`int` or `torch.Tensor`, *optional*):
                What the match loss is divided by, as the LM loss is by `num_items_in_batch`: the samples with `<vid>`
                targets in all processes and accumulation steps. By default those of this batch.

        Raises:
            ValueError: if placeholders, clips, texts, `<vid>` and times do not go together.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits=True leaves nothing to return without labels.")
        if labels is not None and inputs_embeds is not None and self.config.use_matching:
            raise ValueError("The match loss finds its frames by input_ids: pass these, or labels without matching.")
        match_scores = None
        if match_states is not None:
            if any(part is None for part in (vid_frames, frame_keys, frame_mask)):
                raise ValueError("match_states needs vid_frames, frame_keys and frame_mask of the step before.")
            match_scores = self.score_frames(match_states, frame_keys, frame_mask)
            vid_frames = torch.cat([vid_frames[:, :-1], match_scores.argmax(-1).to(vid_frames)], dim=1)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            vision_features=vision_features,
            frame_times=frame_times,
            placeholder_clips=placeholder_clips,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            vid_times=vid_times,
            vid_frames=vid_frames,
            frame_embeds=frame_embeds,
            frame_mask=frame_mask,
            prompt_length=prompt_length,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = logits = lm_loss = match_loss = None
        if not skip_logits:
            logits = self._logits(outputs.last_hidden_state[:, keep])

        if self.config.use_matching and outputs.frame_mask is not None:
            if frame_keys is None:
                frame_keys = self.frm_head(outputs.frame_states).float()
            if labels is None and not skip_match_scores:
                match_scores = self.score_frames(outputs.match_states[:, keep], frame_keys, outputs.frame_mask)
        if labels is not None:
            loss = lm_loss = self._lm_loss(outputs.last_hidden_state, logits, labels, **kwargs)
            if self.config.use_matching:
                match_loss, match_scores = self._match_loss(outputs, frame_keys, labels, num_matched_samples_in_batch)
                loss = lm_loss + match_loss
        return ETChatCausalLMOutputWithPast(
            loss=loss,
            lm_loss=lm_loss,
            match_loss=match_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            match_scores=match_scores,
            match_states=outputs.match_states[:, -1:],
            frame_keys=frame_keys,
            frame_embeds=outputs.frame_embeds,
            frame_mask=outputs.frame_mask,
            vid_frames=outputs.vid_frames,
        )

    def _logits(self, hidden):
        logits = self.lm_head(hidden)
        if self.config.text_config.model_type == "gemma2" and (cap := self.config.text_config.final_logit_softcapping):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _lm_loss(self, hidden, logits, labels, **kwargs):
        """Next-token cross entropy; given no logits, they are computed where there are labels only."""
        vocab_size = self.config.text_config.vocab_size
        if logits is not None:
            return self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        targets = labels[:, 1:]
        kept = targets != -100
        logits = self._logits(hidden[:, :-1][kept])
        return self.loss_function(
            logits=logits, labels=None, vocab_size=vocab_size, shift_labels=targets[kept].to(logits.device), **kwargs
        )

    def _is_sharded(self) -> bool:
        return _is_sharded(self)

    def score_frames(self, states, frame_keys, frame_mask):
        """
        Score of each frame for each position: `vid_head(s) . frm_head(r)` (E.T. Bench, section 4).

        Args:
            states (`torch.FloatTensor` of shape `(B, n, hidden)`): second-to-last block's output at the positions.
            frame_keys (`torch.FloatTensor` of shape `(B, T, hidden)`): `frm_head` of the frames, float32.
            frame_mask (`torch.BoolTensor` of shape `(B, T)`): which frames exist.

        Returns:
            `torch.FloatTensor` of shape `(B, n, T)`, float32, `-inf` where there is no frame.
        """
        scores = self.vid_head(states).float() @ frame_keys.mT
        return torch.where(frame_mask[:, None].to(scores.device), scores, float("-inf"))

    def _match_loss(self, outputs: ETChatModelOutputWithPast, frame_keys, labels, num_samples=None):
        """Soft-label cross entropy of the labels' `<vid>`: mean over a sample's targets, then over the samples."""
        labels = labels.to(frame_keys.device)
        rows, columns = (labels[:, 1:] == self.config.match_token_id).nonzero(as_tuple=True)
        if rows.numel() == 0:  # the heads still take part, so that every DDP rank has all gradients
            idle = self.vid_head(outputs.match_states[:, :1]).sum() + frame_keys.sum()
            return idle * 0.0, frame_keys.new_zeros((0, frame_keys.shape[1]))
        mask = outputs.frame_mask.to(labels.device)[rows]
        scores = self.score_frames(outputs.match_states[rows, columns][:, None], frame_keys[rows], mask)[:, 0]
        targets = outputs.vid_frames.to(labels.device)[rows, columns + 1]
        distance = (torch.arange(scores.shape[1], device=scores.device) - targets[:, None]).abs()
        log_probs = (scores / math.sqrt(frame_keys.shape[-1])).log_softmax(-1).masked_fill(~mask, 0.0)
        losses = -(self.config.alpha**-distance * log_probs).sum(-1)
        counts = torch.bincount(rows, minlength=len(labels))
        per_sample = losses.new_zeros(len(labels)).index_add(0, rows, losses)[counts > 0] / counts[counts > 0]
        return per_sample.sum() / (len(per_sample) if num_samples is None else num_samples), scores


# `generate` asks for it at each token of a model whose code travels with it; to make it anew takes 1 % of a token.
ETChatForConditionalGeneration.forward.__signature__ = inspect.signature(ETChatForConditionalGeneration.forward)

__all__ = ["ETChatForConditionalGeneration", "ETChatModel", "ETChatPreTrainedModel"]
