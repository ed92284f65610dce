"""Configuration of E.T. Chat: a vision encoder, a frame compressor and a language model, plus `<vid>` matching.

The defaults describe the published Phi-3-mini model. This file travels with every saved model, so it imports only
public packages.
"""

import re

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, InstructBlipQFormerConfig, InstructBlipVisionConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

TEXT_MODEL_TYPES = ("phi3", "llama", "gemma2", "qwen2")

# Where the Auto classes find the code inside a saved folder; without a repository prefix, so that a copy stays whole.
AUTO_MAP = {
    "AutoConfig": "configuration_etchat.ETChatConfig",
    "AutoModel": "modeling_etchat.ETChatForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_etchat.ETChatForConditionalGeneration",
    "AutoProcessor": "processing_etchat.ETChatProcessor",
    "AutoVideoProcessor": "video_processing_etchat.ETChatVideoProcessor",
}


@strict
class ETChatConfig(PreTrainedConfig):
    r"""
    Configuration of [`ETChatForConditionalGeneration`] (E.T. Bench, NeurIPS 2024).

    Args:
        vision_config (`InstructBlipVisionConfig` or `dict`, *optional*):
            EVA-ViT-g/14. `num_hidden_layers` counts the blocks that are **used** (39 of the published 40).
        qformer_config (`InstructBlipQFormerConfig` or `dict`, *optional*):
            The question-conditioned Q-Former; unused by the pooled projector.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The language model: a phi3, llama, gemma2 or qwen2 configuration.
        image_token_id (`int`, *optional*, defaults to 32012):
            Id of the placeholder token `<image>`, one per frame. It needs no embedding row.
        num_query_tokens (`int`, *optional*, defaults to 32):
            Learned queries of the Q-Former.
        projector_type (`str`, *optional*, defaults to `"qformer"`):
            `"qformer"`, or `"mlpNx_gelu"`: the mean of a frame's patches through N linear layers with GELU between.
        use_matching (`bool`, *optional*, defaults to `True`):
            Whether `<vid>` tokens are matched to frames by the two heads.
        match_token_id (`int`, *optional*, defaults to 32011):
            Id of `<vid>`; may be `None` only without matching.
        bi_attention (`bool`, *optional*, defaults to `True`):
            Whether the frame tokens of one placeholder see each other in both directions.
        use_time_tag (`bool`, *optional*, defaults to `False`):
            Whether the Q-Former reads `Current time: {t}s. {question}` for each frame.
        alpha (`float`, *optional*, defaults to 2.0):
            Base of the match loss' soft labels, `alpha ** -|frame - target|`; greater than 1.
        fps (`float`, *optional*, defaults to 1.0):
            Frames per second that the model was trained with.

    Raises:
        ValueError: for a combination that cannot work; the message names the fields.
    """

    model_type = "etchat"
    sub_configs_defaults = {
        "vision_config": InstructBlipVisionConfig,
        "qformer_config": InstructBlipQFormerConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="phi3"),
    }
    _auto_class = "AutoConfig"

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32012
    num_query_tokens: int = 32
    projector_type: str = "qformer"
    use_matching: bool = True
    match_token_id: int | None = 32011
    bi_attention: bool = True
    use_time_tag: bool = False
    alpha: float | int = 2.0
    fps: float | int = 1.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.qformer_config is None:
            self.qformer_config = {"vocab_size": 30523}  # bert-base-uncased and its added [DEC]
        self._check_text_model_type()
        super().__post_init__(**kwargs)
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.auto_map = dict(AUTO_MAP)
        self.validate_combinations()

    @property
    def num_projector_layers(self) -> int:
        """Linear layers of the pooled projector; 0 for the Q-Former."""
        match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.projector_type)
        return int(match.group(1)) if match else 0

    def _check_text_model_type(self):
        text = self.text_config
        model_type = text.get("model_type", "phi3") if isinstance(text, dict) else text.model_type if text else "phi3"
        if model_type not in TEXT_MODEL_TYPES:
            raise ValueError(
                f"text_config.model_type is {model_type!r}; it must be one of {', '.join(TEXT_MODEL_TYPES)}."
            )

    def validate_combinations(self):
        """Checks that the fields go together; `ValueError` if not. Call it after changing one."""
        vision, text = self.vision_config, self.text_config
        if self.projector_type != "qformer" and not self.num_projector_layers:
            raise ValueError(
                f"projector_type is {self.projector_type!r}; it must be 'qformer' or 'mlpNx_gelu', N >= 1."
            )
        if self.use_time_tag and self.projector_type != "qformer":
            raise ValueError("use_time_tag tells the Q-Former the time: it needs projector_type='qformer'.")
        if vision.image_size % vision.patch_size:
            raise ValueError(
                f"vision_config.image_size {vision.image_size} is no multiple of its patch_size {vision.patch_size}."
            )
        self._check_heads()
        if self.num_query_tokens < 1 and self.projector_type == "qformer":
            raise ValueError(f"num_query_tokens is {self.num_query_tokens}; the Q-Former needs at least one.")
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"fps is {self.fps}; it must be greater than 0.")
        if self.image_token_id < 0:
            raise ValueError(f"image_token_id is {self.image_token_id}; it must be the placeholder's id.")
        if not 1 < self.alpha < float("inf"):
            raise ValueError(f"alpha is {self.alpha}; it must be greater than 1 for the nearest frame to weigh most.")
        if self.use_matching:
            self._check_matching(text)

    def _check_heads(self):
        parts = {"vision_config": self.vision_config, "qformer_config": self.qformer_config}
        for name, part in parts.items():
            if part.num_hidden_layers < 1:
                raise ValueError(f"{name}.num_hidden_layers is {part.num_hidden_layers}; it must be at least 1.")
            if part.num_attention_heads < 1 or part.hidden_size % part.num_attention_heads:
                raise ValueError(
                    f"{name}.hidden_size {part.hidden_size} is no multiple of its {part.num_attention_heads} heads."
                )

    def _check_matching(self, text: PreTrainedConfig):
        if self.match_token_id is None:
            raise ValueError("use_matching needs match_token_id, the id of <vid>.")
        if not 0 <= self.match_token_id < text.vocab_size:
            raise ValueError(
                f"match_token_id {self.match_token_id} has no embedding row: vocab_size is {text.vocab_size}."
            )
        if self.match_token_id == self.image_token_id:
            raise ValueError(f"match_token_id and image_token_id are both {self.image_token_id}; they must differ.")
        if text.num_hidden_layers < 2:
            raise ValueError(
                "use_matching reads the last two blocks: text_config.num_hidden_layers must be at least 2."
            )


__all__ = ["AUTO_MAP", "TEXT_MODEL_TYPES", "ETChatConfig"]
