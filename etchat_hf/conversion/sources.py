"""Reading the layouts that an original checkpoint comes in, as names -> lazy tensors."""

import json
import math
import pickle
import re
import struct
import zipfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from .lazy_tensor import LazyTensor, StoredBytes, merge_lora

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_FILES = ("pytorch_model.safetensors", "pytorch_model.bin")
REPOSITORY_ID = r"\w[\w.-]*/\w[\w.-]*"
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
PEFT_PREFIX = "base_model.model."

# What an adapter may say and still be `W + scaling * B @ A` on the plain weights of its base.
PLAIN_LORA = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "init_lora_weights": (True, False, "gaussian"),
}


def resolve_folder(source: str | Path, files: list[str] = CHECKPOINT_FILES, id_pattern: str = REPOSITORY_ID) -> Path:
    """
    The local folder of `source`: itself, or a snapshot of the Hub repository of that id.

    Args:
        source (`str` or `Path`): folder or Hub id.
        files (`list[str]`): what to fetch of a repository.
        id_pattern (`str`): what an id looks like.

    Raises:
        FileNotFoundError: neither exists.
        NotADirectoryError: it is a file.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path}: not a folder.")
    if re.fullmatch(id_pattern, str(source)) is None:
        raise FileNotFoundError(f"{source}: no such folder.")
    try:
        return Path(snapshot_download(str(source), allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{source}: no such folder, and not to be had from the Hub ({reason}).") from error


def read_json(path: Path) -> dict:
    """
    The object in a JSON file.

    Raises:
        FileNotFoundError, ValueError: missing, or not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object.")
    return content


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """
    The tensors of a safetensors file.

    Raises:
        ValueError: truncated, or otherwise not such a file.
    """
    try:
        handle = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}).") from error

    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))

    def lazy(key: str) -> LazyTensor:
        code, (start, end) = header[key]["dtype"], header[key]["data_offsets"]
        if code not in DTYPES:
            raise ValueError(f"{path}: {key}: dtype {code} is not supported.")
        stored = StoredBytes(str(path), 8 + length + start, end - start, lambda: handle.get_tensor(key))
        return LazyTensor((key,), str(path), tuple(header[key]["shape"]), DTYPES[code], stored)

    return {key: lazy(key) for key in handle.keys()}


def read_pickle(path: Path, wrapped_in: str | None = None) -> dict[str, LazyTensor]:
    """
    The tensors of a `.pth` or `.bin` file: a flat dict, or with `wrapped_in` the one below that key.

    Raises:
        ValueError: anything else than plain tensors; nothing of it is executed.
    """
    try:
        # The format of PyTorch before 1.6 is no zip archive and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: not a complete pickle of plain tensors ({reason}).") from error
    if wrapped_in is not None:
        if not isinstance(state, dict) or set(state) != {wrapped_in}:
            raise ValueError(f"{path}: not a dict whose only key is {wrapped_in!r}.")
        state = state[wrapped_in]
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a flat dict of tensors.")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{path}: {key!r} is a {type(tensor).__name__}: not a flat dict of plain tensors.")
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{path}: {key}: dtype {tensor.dtype} is not supported.")

    def lazy(key: str, tensor: torch.Tensor) -> LazyTensor:
        return LazyTensor((key,), str(path), tuple(tensor.shape), tensor.dtype, lambda: (tensor.detach(),))

    return {key: lazy(key, tensor) for key, tensor in state.items()}


def read_file(path: Path, wrapped_in: str | None = None) -> dict[str, LazyTensor]:
    """
    The tensors of one file, by its suffix.

    Raises:
        FileNotFoundError, ValueError: missing or unreadable.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path, wrapped_in)


def read_folder(folder: Path, names: tuple[str, ...] = WEIGHT_FILES) -> dict[str, LazyTensor]:
    """
    The tensors of the first of `names` that `folder` holds, as one file or sharded with an index.

    Raises:
        FileNotFoundError: none of them, or not all shards.
        ValueError: an unreadable file, or an index that its shards do not agree with.
    """
    for name in names:
        if (folder / name).is_file():
            return read_file(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json")
    raise FileNotFoundError(f"{folder}: holds no weights ({' or '.join(names)}, or sharded ones with an index).")


def _read_shards(index: Path) -> dict[str, LazyTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: has no weight_map.")
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        indexed = {key for key, file in weight_map.items() if file == shard}
        stored = read_file(index.parent / shard)
        if stored.keys() != indexed:
            raise ValueError(
                f"{index}: disagrees with {shard}: {_some(indexed - stored.keys())} not in the shard, "
                f"{_some(stored.keys() - indexed)} not in the index."
            )
        tensors |= stored
    return tensors


def _some(keys: set[str]) -> str:
    return f"{len(keys)} keys ({', '.join(sorted(keys)[:3])}{', ..' if len(keys) > 3 else ''})" if keys else "none"


def is_lora(folder: Path) -> bool:
    """Whether `folder` is in the LoRA layout."""
    return (folder / "adapter_config.json").is_file()


def read_lora(folder: Path, base: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """
    A LoRA checkpoint merged into its base, under the names of a full one.

    Returns:
        The merged tensors, and the base's keys that nothing is taken from, each with its reason.

    Raises:
        FileNotFoundError: an incomplete folder.
        ValueError: an adapter that is not plain LoRA, or does not fit the base.
    """
    config_file = folder / "adapter_config.json"
    config = read_json(config_file)
    for field, allowed in PLAIN_LORA.items():
        if config.get(field, allowed[0]) not in allowed:
            raise ValueError(f"{config_file}: {field} is {config[field]!r}, which cannot be merged.")

    adapter = _without_prefix(read_folder(folder, ADAPTER_FILES))
    lora = {key: tensor for key, tensor in adapter.items() if re.search(r"\.lora_[AB]\.weight$", key)}
    unmergeable = [key for key in adapter if ".lora_" in key and key not in lora]
    if unmergeable:
        raise ValueError(f"{folder}: {unmergeable[0]}: only lora_A and lora_B weights of linear layers can be merged.")

    # Embeddings that PEFT saves along with the adapter; what the trainer itself saved comes after them.
    trained = {key: tensor for key, tensor in adapter.items() if key not in lora}
    trained |= _without_prefix(read_folder(folder, TRAINED_FILES))
    left_out = {key: f"replaced by {Path(trained[key].file).name}" for key in base if key in trained}
    return _merge(base | trained, lora, config, config_file), left_out


def _without_prefix(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    for key, tensor in tensors.items():
        if not key.startswith(PEFT_PREFIX):
            raise ValueError(f"{tensor.file}: {key} does not begin with {PEFT_PREFIX!r}.")
    return {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}


def _merge(tensors: dict[str, LazyTensor], lora: dict[str, LazyTensor], config: dict, config_file: Path) -> dict:
    merged = dict(tensors)
    for module in sorted({key.rpartition(".lora_")[0] for key in lora}):
        weight = f"{module}.weight"
        pair = [f"{module}.lora_A.weight", f"{module}.lora_B.weight"]
        missing = [key for key in pair if key not in lora] + [key for key in (weight,) if key not in tensors]
        if missing:
            raise ValueError(f"{config_file.parent}: {missing[0]}, which the adapter of {module} needs, is missing.")
        lora_a, lora_b = (lora[key] for key in pair)
        rank = _of_module(module, config.get("rank_pattern"), config["r"])
        shape = tensors[weight].shape
        if lora_a.shape != (rank, *shape[1:]) or lora_b.shape != (*shape[:1], rank):
            raise ValueError(
                f"{lora_a.file}: {module}: shapes {lora_b.shape} @ {lora_a.shape} are not rank {rank} for {shape}."
            )
        alpha = _of_module(module, config.get("alpha_pattern"), config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        merged[weight] = merge_lora(tensors[weight], lora_a, lora_b, scaling)
    return merged


def _of_module(module: str, patterns: dict | None, default: float) -> float:
    """PEFT's rule: the first pattern that matches a tail of the module's name, else the default."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)
