import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from etchat_hf.conversion.convert import Options, convert_checkpoint

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(Path(__file__).parent))
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """The golden stage-3 checkpoint, converted."""
    target = tmp_path_factory.mktemp("converted") / "phi3_stage3"
    options = Options(qformer_tokenizer=str(GOLDEN / "bert"), vision_heads=4, qformer_heads=4)
    convert_checkpoint(GOLDEN / "phi3_stage3" / "original", target, options=options)
    return target
