import pytest
from original_checkpoints import GOLDEN, Checkpoint

from etchat_hf.conversion.convert import Options, convert_checkpoint


@pytest.fixture
def golden():
    return GOLDEN


@pytest.fixture
def options():
    """What no tiny checkpoint says itself."""
    return Options(qformer_tokenizer=str(GOLDEN / "bert"), vision_heads=4, qformer_heads=4)


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """`phi3_stage3` in our layout; read only."""
    destination = tmp_path_factory.mktemp("converted") / "phi3_stage3"
    options = Options(qformer_tokenizer=str(GOLDEN / "bert"), vision_heads=4, qformer_heads=4)
    convert_checkpoint(GOLDEN / "phi3_stage3" / "original", destination, options=options)
    return destination


@pytest.fixture
def checkpoint(tmp_path):
    """A changeable copy of `phi3_stage3`."""
    return Checkpoint(GOLDEN / "phi3_stage3" / "original", tmp_path / "source")
