import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from etchat_hf.conversion.convert import Options, convert_checkpoint
from etchat_hf.verification import write_clip

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


@pytest.fixture(scope="session")
def eager_vid(converted, tmp_path_factory) -> Path:
    """The converted checkpoint, made to answer `<vid>` at every step; read only."""
    folder = shutil.copytree(converted, tmp_path_factory.mktemp("eager") / "model")
    config = json.loads((folder / "config.json").read_text())
    others = [token for token in range(config["text_config"]["vocab_size"]) if token != config["match_token_id"]]
    generation = json.loads((folder / "generation_config.json").read_text()) | {"suppress_tokens": others}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """12 s of H.264 at 10 fps."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path, fps=10, size=64)
    return path
