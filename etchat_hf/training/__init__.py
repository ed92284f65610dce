"""Training in stages: which parameters, which losses, and checkpoints that load on their own and resume exactly.

`examples/train.py` puts it together; see [`ETChatModelArguments`], [`ETChatTrainingArguments`], [`ETChatTrainer`].
"""

from .arguments import ETChatModelArguments, ETChatTrainingArguments
from .checkpoints import merge_checkpoint
from .model import load_model, load_processor
from .parser import ETChatParser
from .trainer import ETChatTrainer

__all__ = [
    "ETChatModelArguments",
    "ETChatParser",
    "ETChatTrainer",
    "ETChatTrainingArguments",
    "load_model",
    "load_processor",
    "merge_checkpoint",
]
