"""Source and target, key by key: nothing is missing, nothing is left over, every shape fits."""

import torch

from ..configuration_etchat import ETChatConfig
from ..modeling_etchat import ETChatForConditionalGeneration
from .lazy_tensor import LazyTensor, in_memory
from .weight_map import originals_of

SHOWN = 5


def model_on_meta(config: ETChatConfig) -> ETChatForConditionalGeneration:
    """The model that `config` describes, without its weights."""
    with torch.device("meta"):
        return ETChatForConditionalGeneration(config)


def target_shapes(model: ETChatForConditionalGeneration) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint of `model` holds: tied weights once."""
    tied = model.config.text_config.tie_word_embeddings
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if not (tied and name in model._tied_weights_keys)}


def fill_targets(
    targets: dict[str, tuple[int, ...]], tensors: dict[str, LazyTensor], fresh: dict[str, LazyTensor], origin: str
) -> dict[str, LazyTensor]:
    """
    Our tensors, made of an original checkpoint's.

    Args:
        targets (`dict[str, tuple[int, ...]]`): our names and shapes.
        tensors (`dict[str, LazyTensor]`): the original's, under its names, without those that are left out.
        fresh (`dict[str, LazyTensor]`): ours that the original does not hold.
        origin (`str`): what was read, for messages.

    Raises:
        ValueError: missing, unexpected or misshapen keys.
    """
    filled, used, missing = dict(fresh), set(), []
    for name in targets.keys() - fresh.keys():
        rule, originals = originals_of(name)
        absent = [original for original in originals if original not in tensors]
        missing += absent
        used |= set(originals)
        if not absent:
            filled[name] = rule.join(*(tensors[original] for original in originals))
    unexpected = [_stored_name(name, tensors[name]) for name in tensors.keys() - used]
    raise_if_unfit(filled, targets, missing, unexpected, origin)
    return filled


def raise_if_unfit(
    filled: dict[str, LazyTensor],
    targets: dict[str, tuple[int, ...]],
    missing: list[str],
    unexpected: list[str],
    origin: str,
):
    """
    Raises:
        ValueError: one line for everything that is wrong: the counts, and the first few keys.
    """
    misshapen = [
        f"{_stored_name(name, tensor)} {tuple(tensor.shape)} instead of {targets[name]}"
        for name, tensor in filled.items()
        if name in targets and tuple(tensor.shape) != targets[name]
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    said = [f"{len(keys)} {problem}: {_first(keys)}" for problem, keys in problems.items() if keys]
    if said:
        raise ValueError(f"{origin}: the keys do not fit config.json. {'; '.join(said)}.")


def fresh_tensors(
    model: ETChatForConditionalGeneration, names: set[str], dtype: torch.dtype, seed: int
) -> dict[str, LazyTensor]:
    """Those parameters of `model` as it initialises them itself; the caller's random state stays as it is."""
    fresh = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prefix, module in list(model.named_modules()):
            own = {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
            if own & names:
                module.to_empty(device="cpu")
                model._init_weights(module)
                for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
                    fresh[name] = in_memory(parameter.detach().to(dtype), "freshly initialised")
    return fresh


def _stored_name(name: str, tensor: LazyTensor) -> str:
    return f"{', '.join(tensor.keys) or name} ({tensor.file})"


def _first(keys: list[str]) -> str:
    return ", ".join(sorted(keys)[:SHOWN]) + (", .." if len(keys) > SHOWN else "")
