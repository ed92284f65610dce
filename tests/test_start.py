"""What `import etchat_hf` loads, and that the Auto classes know its classes whatever is imported first."""

import subprocess
import sys

import pytest

import etchat_hf
import etchat_hf.data
from etchat_hf.toy import bundled_checkpoint

AUTO_CLASSES = "from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor"
LOADED = f"""
path = {str(bundled_checkpoint())!r}
assert type(AutoConfig.from_pretrained(path)).__name__ == "ETChatConfig"
for auto_class in (AutoModel, AutoModelForImageTextToText):
    assert type(auto_class.from_pretrained(path)).__module__ == "etchat_hf.modeling_etchat"
assert type(AutoProcessor.from_pretrained(path)).__module__ == "etchat_hf.processing_etchat"
"""


def in_fresh_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["etchat_hf", "etchat_hf.cli"])
def test_the_package_and_its_command_line_load_nothing_slow(module):
    slow = {"torch", "transformers", "datasets", "av", "decord"}
    in_fresh_process(f"import sys, {module}; assert not {slow} & sys.modules.keys()")


def test_the_classes_load_no_decoder():
    names = ", ".join(etchat_hf.__all__)
    in_fresh_process(
        f"import sys; from etchat_hf import {names}; assert not {{'av', 'decord', 'torchcodec'}} & sys.modules.keys()"
    )


@pytest.mark.parametrize(
    "imports",
    [
        f"import etchat_hf; {AUTO_CLASSES}",
        f"{AUTO_CLASSES}; import etchat_hf",
    ],
)
def test_the_auto_classes_find_a_checkpoint_in_any_order_of_imports(imports):
    in_fresh_process(imports + LOADED)


def test_an_auto_class_makes_a_model_of_our_configuration():
    imports = f"from etchat_hf.configuration_etchat import ETChatConfig; {AUTO_CLASSES}"
    config = f"ETChatConfig.from_pretrained({str(bundled_checkpoint())!r})"
    in_fresh_process(f"{imports}; assert AutoModel.from_config({config}).config.use_matching")


def test_names_are_listed_and_unknown_ones_refused():
    assert set(etchat_hf.__all__) <= set(dir(etchat_hf))
    assert all(getattr(etchat_hf, name).__name__ == name for name in etchat_hf.__all__)
    assert all(getattr(etchat_hf.data, name) is not None for name in etchat_hf.data.__all__)
    with pytest.raises(AttributeError, match="ETChatModle"):
        etchat_hf.ETChatModle  # noqa: B018
