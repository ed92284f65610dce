"""E.T. Chat for the Hugging Face ecosystem: ask "when?" of a video and get seconds back."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_etchat import ETChatConfig
from .generation_etchat import ETChatGenerateOutput, VidMatch
from .modeling_etchat import ETChatForConditionalGeneration, ETChatModel
from .processing_etchat import ETChatProcessor
from .video_processing_etchat import ETChatVideoProcessor

__version__ = "0.1.0"

AutoConfig.register("etchat", ETChatConfig)
AutoModel.register(ETChatConfig, ETChatForConditionalGeneration)
AutoModelForImageTextToText.register(ETChatConfig, ETChatForConditionalGeneration)
AutoProcessor.register(ETChatConfig, ETChatProcessor)

__all__ = [
    "ETChatConfig",
    "ETChatForConditionalGeneration",
    "ETChatGenerateOutput",
    "ETChatModel",
    "ETChatProcessor",
    "ETChatVideoProcessor",
    "VidMatch",
]
