"""Checkpoints of the original, as they are and made from them."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

GOLDEN = Path(__file__).parents[1] / "golden"


class Checkpoint:
    """A copy of a golden checkpoint whose config.json and tensors can be changed."""

    def __init__(self, source: Path, folder: Path):
        shutil.copytree(source, folder)
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")

    def save(self, **config) -> Path:
        self.config |= config
        (self.folder / "config.json").write_text(json.dumps(self.config))
        (self.folder / "model.safetensors").unlink(missing_ok=True)
        save_file(self.tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        return self.folder

    def without_matching(self) -> "Checkpoint":
        """As stage 1 leaves it: no heads, no `<vid>`."""
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if "_head." not in name or "lm_" in name}
        self.config |= {"use_matching": False, "bi_attention": False}
        del self.config["match_token_id"]
        tokens = json.loads((self.folder / "tokenizer.json").read_text())
        tokens["added_tokens"] = [token for token in tokens["added_tokens"] if token["content"] != "<vid>"]
        (self.folder / "tokenizer.json").write_text(json.dumps(tokens))
        settings = json.loads((self.folder / "tokenizer_config.json").read_text())
        settings["additional_special_tokens"].remove("<vid>")
        del settings["added_tokens_decoder"]["524"]
        (self.folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (self.folder / "special_tokens_map.json").unlink()
        return self

    def with_language_model(self, text: PreTrainedConfig, conv_type: str) -> "Checkpoint":
        """The same around another language model, freshly initialised."""
        llm = AutoModelForCausalLM.from_config(text).state_dict()
        old = ("model.layers.", "model.norm.", "model.embed_tokens.", "lm_head.")
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(old)}
        self.tensors |= {name: tensor.clone() for name, tensor in llm.items()}
        new = {"rope_parameters", "layer_types", "dtype", "architectures", "transformers_version"}
        own = {key: value for key, value in text.to_dict().items() if key not in new}
        del self.config["sliding_window"]
        self.config |= own | {"model_type": f"etchat_{text.model_type}", "conv_type": conv_type, "rope_theta": 10000.0}
        return self

    def save_bin(self, shards: int = 1) -> Path:
        (self.folder / "model.safetensors").unlink()
        names = sorted(self.tensors)
        files = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(names)}
        if shards == 1:
            files = dict.fromkeys(names, "pytorch_model.bin")
        else:
            (self.folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
        for file in set(files.values()):
            torch.save({name: self.tensors[name] for name in names if files[name] == file}, self.folder / file)
        return self.folder

    def save_sharded(self) -> Path:
        (self.folder / "model.safetensors").unlink()
        names = sorted(self.tensors)
        files = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(names)}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        for file in set(files.values()):
            save_file({name: self.tensors[name] for name in names if files[name] == file}, self.folder / file)
        return self.folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder with safetensors files."""
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Same names, dtypes, shapes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
