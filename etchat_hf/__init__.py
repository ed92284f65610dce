"""E.T. Chat for the Hugging Face ecosystem: ask "when?" of a video and get seconds back.

Classes are loaded when they are used, here and by the Auto classes: `import etchat_hf` costs what `import transformers`
costs, and loads neither torch nor a video decoder.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from transformers.models.auto import auto_mappings

if TYPE_CHECKING:
    from .configuration_etchat import ETChatConfig
    from .generation_etchat import ETChatGenerateOutput, VidMatch
    from .modeling_etchat import ETChatForConditionalGeneration, ETChatModel
    from .processing_etchat import EncodedClip, ETChatProcessor
    from .video_processing_etchat import ETChatVideoProcessor

__version__ = "0.1.0"

__all__ = [
    "ETChatConfig",
    "ETChatForConditionalGeneration",
    "ETChatGenerateOutput",
    "ETChatModel",
    "ETChatProcessor",
    "ETChatVideoProcessor",
    "EncodedClip",
    "VidMatch",
]

_MODULES = {
    "ETChatConfig": "configuration_etchat",
    "ETChatForConditionalGeneration": "modeling_etchat",
    "ETChatGenerateOutput": "generation_etchat",
    "ETChatModel": "modeling_etchat",
    "ETChatProcessor": "processing_etchat",
    "ETChatVideoProcessor": "video_processing_etchat",
    "EncodedClip": "processing_etchat",
    "VidMatch": "generation_etchat",
}
_MODEL_TYPE, _MODEL_CLASS = "etchat", "ETChatForConditionalGeneration"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    _name_models()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Makes the Auto classes know ours, without loading any of them.

    transformers finds its own models by name: tables of names, read by the Auto classes when these are first loaded,
    and a module for each below `transformers.models`, which this package stands in for. Where the Auto classes have
    been loaded before, classes are registered with them.
    """
    if "transformers.models.auto.configuration_auto" in sys.modules:
        _register_classes()
        return
    sys.modules[f"transformers.models.{_MODEL_TYPE}"] = sys.modules[__name__]
    auto_mappings.CONFIG_MAPPING_NAMES[_MODEL_TYPE] = "ETChatConfig"
    auto_mappings.PROCESSOR_MAPPING_NAMES[_MODEL_TYPE] = "ETChatProcessor"


def _name_models() -> None:
    """The tables of models come with torch, so they wait for the first use of a class; a model's is its configuration."""
    from transformers.models.auto import modeling_auto

    modeling_auto.MODEL_MAPPING_NAMES[_MODEL_TYPE] = _MODEL_CLASS
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[_MODEL_TYPE] = _MODEL_CLASS


def _register_classes() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from .configuration_etchat import ETChatConfig
    from .modeling_etchat import ETChatForConditionalGeneration
    from .processing_etchat import ETChatProcessor

    AutoConfig.register(_MODEL_TYPE, ETChatConfig)
    AutoModel.register(ETChatConfig, ETChatForConditionalGeneration)
    AutoModelForImageTextToText.register(ETChatConfig, ETChatForConditionalGeneration)
    AutoProcessor.register(ETChatConfig, ETChatProcessor)


_register()
