"""E.T. Chat for the Hugging Face ecosystem: ask "when?" of a video and get seconds back.

Classes are loaded when they are used, here and by the Auto classes: `import etchat_hf` loads neither torch nor a video
decoder.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

from .lazy_names import lazy_names

if TYPE_CHECKING:
    from .clip_encoder import ClipEncoder
    from .configuration_etchat import ETChatConfig
    from .generation_etchat import ETChatGenerateOutput, VidMatch
    from .modeling_etchat import ETChatForConditionalGeneration, ETChatModel
    from .processing_etchat import EncodedClip, ETChatProcessor
    from .video_processing_etchat import ETChatVideoProcessor

__version__ = "0.1.0"

__all__ = [
    "ClipEncoder",
    "ETChatConfig",
    "ETChatForConditionalGeneration",
    "ETChatGenerateOutput",
    "ETChatModel",
    "ETChatProcessor",
    "ETChatVideoProcessor",
    "EncodedClip",
    "VidMatch",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ClipEncoder": "clip_encoder",
        "ETChatConfig": "configuration_etchat",
        "ETChatForConditionalGeneration": "modeling_etchat",
        "ETChatGenerateOutput": "generation_etchat",
        "ETChatModel": "modeling_etchat",
        "ETChatProcessor": "processing_etchat",
        "ETChatVideoProcessor": "video_processing_etchat",
        "EncodedClip": "processing_etchat",
        "VidMatch": "generation_etchat",
    },
)
# transformers finds its own models by name: in tables of names, and in a module for each below `transformers.models`.
_AUTO = "transformers.models.auto"
_TABLES = {
    f"{_AUTO}.auto_mappings": {
        "CONFIG_MAPPING_NAMES": "ETChatConfig",
        "PROCESSOR_MAPPING_NAMES": "ETChatProcessor",
    },
    f"{_AUTO}.modeling_auto": {
        "MODEL_MAPPING_NAMES": "ETChatForConditionalGeneration",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "ETChatForConditionalGeneration",
    },
}


class _NamesForAutoClasses(MetaPathFinder):
    """Writes our names into transformers' tables as these are imported, which takes as long as transformers itself."""

    def find_spec(self, name, path, target=None):
        if name not in _TABLES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_and_extend(module):
            exec_module(module)
            for table, class_name in _TABLES[name].items():
                vars(module)[table]["etchat"] = class_name

        spec.loader.exec_module = exec_and_extend
        return spec


def _register() -> None:
    """Registers with Auto classes that were imported before."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from .configuration_etchat import ETChatConfig
    from .modeling_etchat import ETChatForConditionalGeneration
    from .processing_etchat import ETChatProcessor

    AutoConfig.register("etchat", ETChatConfig)
    AutoModel.register(ETChatConfig, ETChatForConditionalGeneration)
    AutoModelForImageTextToText.register(ETChatConfig, ETChatForConditionalGeneration)
    AutoProcessor.register(ETChatConfig, ETChatProcessor)


if _AUTO in sys.modules:
    _register()
else:
    sys.modules["transformers.models.etchat"] = sys.modules[__name__]
    sys.meta_path.insert(0, _NamesForAutoClasses())
