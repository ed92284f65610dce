from pathlib import Path

import pytest
import torch

from etchat_hf.toy.generate import generate
from etchat_hf.toy.tiny_model import build_model, build_processor


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy_data")
    generate(folder, seed=0, num_train=6, num_unseen=2, track=lambda values, description: values)
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A tiny model without matching, as stage 1 begins with."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    processor = build_processor()
    build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
