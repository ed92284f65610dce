"""An original checkpoint, in any of its layouts, -> a folder that the Auto classes load; and back.

Every way is the same three steps: name the source's tensors as a full original checkpoint does, map them strictly to
the model that config.json describes, and stream them into a folder that appears when it is complete.
"""

import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from .. import modeling_etchat
from ..configuration_etchat import TEXT_MODEL_TYPES, ETChatConfig
from ..processing_etchat import ETChatProcessor
from . import weight_map as names
from .configs import (
    PREFIX,
    build_config,
    check_original,
    image_size_of,
    num_stored_blocks,
    num_used_blocks,
    restore_original,
    text_config_of,
)
from .lazy_tensor import LazyTensor, append_mean_rows, first_rows, in_memory, interpolate_positions
from .report import ConversionReport
from .sources import is_lora, read_file, read_folder, read_json, read_lora, resolve_folder
from .strict import fill_targets, fresh_tensors, model_on_meta, raise_if_unfit, target_shapes
from .tokens import (
    build_generation_config,
    build_processor,
    load_qformer_tokenizer,
    load_tokenizer,
    restore_tokenizer,
)
from .writing import appearing_at_once, check_destination, stored_dtype, write_json, write_weights

DEFAULT_QFORMER_TOKENIZER = "bert-base-uncased"
# What the published model takes of the vision encoder: all blocks but the last, at 224 pixels.
VISION_OUTPUT_LAYER = -2
IMAGE_SIZE = 224
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
MODEL_CODE = Path(modeling_etchat.__file__)


@dataclass
class Original:
    """
    An original checkpoint as read from any layout.

    Args:
        layout (`str`): for the report.
        folder (`Path`): where its tokenizer is, and generation_config.json if it has one.
        config (`dict`): its config.json.
        config_file (`str`): name of that file, for messages.
        tensors (`dict[str, LazyTensor]`): under the names of a full checkpoint.
        left_out (`dict[str, str]`): stored key -> why it is not among the tensors.
        constants (`list[str]`): names of a full checkpoint that hold nothing of their own and are restored on the way
            back.
        fresh (`tuple[str, ...]`): patterns of our names that start fresh.
        sources (`list[Path]`): everything that was read.
    """

    layout: str
    folder: Path
    config: dict
    config_file: str
    tensors: dict[str, LazyTensor]
    left_out: dict[str, str] = field(default_factory=dict)
    constants: list[str] = field(default_factory=list)
    fresh: tuple[str, ...] = ()
    sources: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """
    How to convert.

    Args:
        qformer_tokenizer (`str`): folder (vocab.txt is enough) or Hub id of BERT's tokenizer.
        vision_heads, qformer_heads (`int`, *optional*): attention heads, which no checkpoint stores; by default
            width / 88 and width / 64.
        dtype (`torch.dtype`, *optional*): dtype of the floating tensors; by default each keeps its own.
        max_shard_size (`str`): weights beyond this size are sharded.
    """

    qformer_tokenizer: str = DEFAULT_QFORMER_TOKENIZER
    vision_heads: int | None = None
    qformer_heads: int | None = None
    dtype: torch.dtype | None = None
    max_shard_size: str = "5GB"


def convert_checkpoint(
    source: str | Path, destination: str | Path, *, base: str | Path | None = None, options: Options | None = None
) -> ConversionReport:
    """
    Convert a full or a LoRA checkpoint.

    Args:
        source (`str` or `Path`): folder or Hub id.
        destination (`str` or `Path`): new or empty folder; appears complete or not at all.
        base (`str` or `Path`, *optional*): folder or Hub id of what a LoRA checkpoint was trained on; by default the
            `model_name_or_path` of its config.json.
        options (`Options`, *optional*): see there.

    Raises:
        FileNotFoundError, FileExistsError, NotADirectoryError: something to read is missing, or the destination holds
            something.
        ValueError: a source that is not what it should be; the message names the file and the key or value.
    """
    check_destination(destination, [Path(source)])
    folder = resolve_folder(source)
    config_file = folder / "config.json"
    config = read_json(config_file)
    check_original(config, str(config_file))
    if is_lora(folder):
        base_folder = _base_folder(base, config, folder)
        if is_lora(base_folder):
            raise ValueError(f"{base_folder}: the base is a LoRA checkpoint itself; merge it first (--to-original).")
        tensors, left_out = read_lora(folder, read_folder(base_folder))
        original = Original(
            "LoRA", _tokenizer_folder(folder, base_folder), config, str(config_file), tensors, left_out
        )
        original.sources = [folder, base_folder]
    else:
        if base is not None:
            raise ValueError(f"{folder}: a base is for LoRA checkpoints, and this one has no adapter_config.json.")
        original = Original("full", folder, config, str(config_file), read_folder(folder), sources=[folder])
    return _convert(original, destination, options or Options(), seed=0)


def convert_pieces(
    llm: str | Path,
    vision: str | Path,
    qformer: str | Path,
    destination: str | Path,
    *,
    conv_type: str = "plain",
    image_size: int = IMAGE_SIZE,
    seed: int = 0,
    options: Options | None = None,
) -> ConversionReport:
    """
    Put together what stage 1 starts from: a language model, a vision encoder and a Q-Former, all pretrained.

    Aggregator and projector are freshly initialised; matching and frame blocks are off, as in stage 1.

    Args:
        llm (`str` or `Path`): folder or Hub id of a phi3, llama, gemma2 or qwen2 model.
        vision (`str` or `Path`): `eva_vit_g.pth`.
        qformer (`str` or `Path`): `instruct_blip_vicuna7b_trimmed.pth`.
        destination (`str` or `Path`): new or empty folder; appears complete or not at all.
        conv_type (`str`): conversation type, the chat template.
        image_size (`int`): side of a frame in pixels; learned positions are interpolated to its grid.
        seed (`int`): of the fresh parameters.
        options (`Options`, *optional*): see there.

    Raises:
        FileNotFoundError, FileExistsError, NotADirectoryError, ValueError: as [`convert_checkpoint`].
    """
    check_destination(destination, [Path(llm)])
    folder, vision, qformer = resolve_folder(llm), Path(vision), Path(qformer)
    config_file = folder / "config.json"
    llm_config = read_json(config_file)
    if llm_config.get("model_type") not in TEXT_MODEL_TYPES:
        raise ValueError(
            f"{config_file}: model_type is {llm_config.get('model_type')!r}; a plain language model is needed, one of "
            f"{', '.join(TEXT_MODEL_TYPES)}."
        )
    original = Original("pieces", folder, {}, str(config_file), read_folder(folder), fresh=names.FRESH_IN_PIECES)
    original.sources = [folder, vision, qformer]
    _add_vision_piece(original, read_file(vision), image_size)
    _add_qformer_piece(original, read_file(qformer, wrapped_in="model"))
    original.config = _stage_1_config(llm_config, conv_type, image_size)
    check_original(original.config, original.config_file)
    return _convert(original, destination, options or Options(), seed)


def convert_to_original(
    source: str | Path, destination: str | Path, *, dtype: torch.dtype | None = None, max_shard_size: str = "5GB"
) -> ConversionReport:
    """
    Restore a full original checkpoint from a converted one; of the same dtype, bit for bit.

    Args:
        source (`str` or `Path`): folder or Hub id of a converted checkpoint, trained further or not.
        destination (`str` or `Path`): new or empty folder; appears complete or not at all.
        dtype (`torch.dtype`, *optional*): dtype of the floating tensors; by default each keeps its own.
        max_shard_size (`str`): weights beyond this size are sharded.

    Raises:
        FileNotFoundError, FileExistsError, NotADirectoryError, ValueError: as [`convert_checkpoint`].
    """
    check_destination(destination, [Path(source)])
    folder = resolve_folder(source)
    config = _converted_config(folder)
    stored = read_folder(folder)
    targets = target_shapes(model_on_meta(config))
    missing, unexpected = list(targets.keys() - stored.keys()), list(stored.keys() - targets.keys())
    raise_if_unfit(stored, targets, missing, unexpected, str(folder))

    memory = config.original_checkpoint
    tensors = {name: part for ours, tensor in stored.items() for name, part in _split(ours, tensor).items()}
    vocab_size = memory["config"]["vocab_size"]
    if not config.use_matching and vocab_size < config.text_config.vocab_size:
        for name in (names.EMBED_TOKENS, names.LM_HEAD):
            if name in tensors:
                tensors[name] = first_rows(tensors[name], vocab_size)
    tensors |= {name: _constant(name, tensors) for name in memory["constants"]}

    with appearing_at_once(destination) as partial:
        original = restore_original(config, stored_dtype(tensors[names.EMBED_TOKENS], dtype))
        write_json(partial / "config.json", original)
        if memory["generation_config"] is not None:
            write_json(partial / "generation_config.json", memory["generation_config"])
        added = [token for token in memory["added_tokens"] if not (config.use_matching and token == "<vid>")]
        restore_tokenizer(folder, partial, added, memory["tokenizer_config"])
        files = write_weights(partial, tensors, dtype, max_shard_size)
    return _report("converted", destination, tensors, {}, dtype, files, [])


def _convert(original: Original, destination: str | Path, options: Options, seed: int) -> ConversionReport:
    text_config = text_config_of(original.config, original.config_file)
    _leave_out(original, text_config.tie_word_embeddings)
    tokenizer = load_tokenizer(original.folder, text_config)
    vocabulary = set(tokenizer.get_vocab())
    processor = _processor(original, tokenizer, options, text_config.max_position_embeddings)
    _check_match_token(original, processor.match_token_id)
    _add_match_row(original, text_config, processor.match_token_id)

    config = build_config(
        original.config,
        original.tensors,
        text_config,
        processor.image_token_id,
        options.vision_heads,
        options.qformer_heads,
        original.config_file,
    )
    model = model_on_meta(config)
    targets = target_shapes(model)
    fresh_names = {name for name in targets if any(names.matches(name, pattern) for pattern in original.fresh)}
    fresh = fresh_tensors(model, fresh_names, config.dtype, seed)
    origin = ", ".join(str(source) for source in original.sources)
    filled = fill_targets(targets, original.tensors, fresh, origin)

    config.dtype = stored_dtype(original.tensors[names.EMBED_TOKENS], options.dtype)
    config.original_checkpoint = _memory(original, sorted(set(tokenizer.get_vocab()) - vocabulary))
    generation_config, notes = build_generation_config(tokenizer, text_config, original.config["conv_type"])
    check_destination(destination, original.sources)
    with appearing_at_once(destination) as partial:
        config.save_pretrained(partial)
        generation_config.save_pretrained(partial)
        processor.save_pretrained(partial)
        for file in (MODEL_CODE, *get_relative_import_files(MODEL_CODE)):
            shutil.copyfile(file, partial / Path(file).name)
        files = write_weights(partial, filled, options.dtype, options.max_shard_size)
    return _report(original.layout, destination, filled, original.left_out, options.dtype, files, notes)


def _processor(
    original: Original, tokenizer: PreTrainedTokenizerBase, options: Options, context: int
) -> ETChatProcessor:
    words = original.tensors.get(f"{names.BERT}.embeddings.word_embeddings.weight")
    rows = words.shape[0] if words is not None else None
    qformer_tokenizer = load_qformer_tokenizer(options.qformer_tokenizer, rows)
    conv_type, use_time_tag = original.config["conv_type"], original.config["use_time_tag"]
    image_size = image_size_of(original.config)
    return build_processor(tokenizer, qformer_tokenizer, conv_type, image_size, use_time_tag, context)


def _tokenizer_folder(folder: Path, base_folder: Path) -> Path:
    """A LoRA checkpoint need not hold its tokenizer: then the training run's folder above it does, or the base."""
    for candidate in (folder, folder.parent, base_folder):
        if any((candidate / name).is_file() for name in TOKENIZER_FILES):
            return candidate
    return folder


def _base_folder(base: str | Path | None, config: dict, folder: Path) -> Path:
    if base is not None:
        return resolve_folder(base)
    named = config.get("model_name_or_path")
    if not named:
        raise ValueError(f"{folder}: a LoRA checkpoint without model_name_or_path in its config.json; give --base.")
    try:
        return resolve_folder(named)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{folder}: a LoRA checkpoint whose base {named!r} (model_name_or_path) is not found; give --base."
        ) from error


def _add_vision_piece(original: Original, piece: dict[str, LazyTensor], image_size: int):
    tensors = _rename_piece(original, piece, names.VISION_PIECE, names.VISION_PIECE_LEFT_OUT)
    used = num_used_blocks(num_stored_blocks(tensors), VISION_OUTPUT_LAYER)
    for name in list(tensors):
        block = names.translate(name, f"{names.EVA}.blocks.*.**", "*")
        if block is not None and int(block.partition(".")[0]) >= used:
            reason = f"a block beyond the {used} that are used"
            original.left_out |= dict.fromkeys(tensors.pop(name).keys, reason)
    original.tensors |= _at_grid(tensors, image_size)


def _at_grid(tensors: dict[str, LazyTensor], image_size: int) -> dict[str, LazyTensor]:
    positions, patches = (tensors.get(f"{names.EVA}.{name}") for name in ("pos_embed", "patch_embed.proj.weight"))
    if positions is None or patches is None:
        return tensors
    side = round((positions.shape[1] - 1) ** 0.5)
    if side * side + 1 != positions.shape[1]:
        raise ValueError(f"{positions.file}: pos_embed has {positions.shape[1]} tokens, not 1 + a square.")
    if image_size < 1 or image_size % patches.shape[-1]:
        raise ValueError(f"--image-size {image_size} is no multiple of the patch size {patches.shape[-1]}.")
    grid = image_size // patches.shape[-1]
    if grid == side:
        return tensors
    return tensors | {f"{names.EVA}.pos_embed": interpolate_positions(positions, grid)}


def _add_qformer_piece(original: Original, piece: dict[str, LazyTensor]):
    original.tensors |= _rename_piece(original, piece, names.QFORMER_PIECE, names.QFORMER_PIECE_LEFT_OUT)


def _rename_piece(original: Original, piece: dict[str, LazyTensor], renames, left_out) -> dict[str, LazyTensor]:
    tensors = {}
    for key, tensor in piece.items():
        reason = names.reason_left_out(key, left_out)
        translated = (names.translate(key, pattern, to) for pattern, to in renames)
        if reason is None:
            tensors[next((name for name in translated if name is not None), key)] = tensor
        else:
            original.left_out[key] = reason
    return tensors


def _stage_1_config(llm_config: dict, conv_type: str, image_size: int) -> dict:
    model_type = llm_config["model_type"]
    return llm_config | {
        "alpha": 2.0,
        "architectures": [f"ETChat{name}" for name in llm_config.get("architectures", [])],
        "bi_attention": False,
        "conv_type": conv_type,
        "language_model": model_type,
        "mm_projector": "qformer",
        "model_type": PREFIX + model_type,
        "use_matching": False,
        "use_time_tag": False,
        "vision_output_layer": VISION_OUTPUT_LAYER,
        "vision_output_token": "patch",
        "vision_processor": f"clip_center_{image_size}",
        "vision_tower": "eva_vit",
    }


def _leave_out(original: Original, tied: bool):
    for name, tensor in list(original.tensors.items()):
        reason = names.reason_left_out(name, names.LEFT_OUT)
        if name == names.LM_HEAD and tied:
            reason = "tied to the token embedding"
            embedding = original.tensors.get(names.EMBED_TOKENS)
            if embedding is None or not torch.equal(tensor.load(), embedding.load()):
                raise ValueError(f"{tensor.file}: {name} differs from {names.EMBED_TOKENS}, to which it is tied.")
        if reason is not None:
            del original.tensors[name]
            original.left_out |= dict.fromkeys(tensor.keys, reason)
            if name in (names.POSITION_IDS, names.LM_HEAD):
                original.constants.append(name)


def _check_match_token(original: Original, match_token_id: int):
    if original.config["use_matching"] and original.config["match_token_id"] != match_token_id:
        raise ValueError(
            f"{original.config_file}: match_token_id is {original.config['match_token_id']}, but the tokenizer in "
            f"{original.folder} gives <vid> the id {match_token_id}."
        )


def _add_match_row(original: Original, text_config, match_token_id: int):
    rows = match_token_id + 1 - text_config.vocab_size
    if rows <= 0:
        return
    text_config.vocab_size += rows
    for name in (names.EMBED_TOKENS, names.LM_HEAD):
        if name in original.tensors:
            original.tensors[name] = append_mean_rows(original.tensors[name], rows)


def _memory(original: Original, added_tokens: list[str]) -> dict:
    """What ours has no place for, and the way back needs."""
    generation_config = original.folder / "generation_config.json"
    tokenizer_config = original.folder / "tokenizer_config.json"
    tokens = read_json(tokenizer_config) if tokenizer_config.is_file() else {}
    return {
        "config": original.config,
        "constants": original.constants,
        "generation_config": read_json(generation_config) if generation_config.is_file() else None,
        "tokenizer_config": {key: value for key, value in tokens.items() if key != "added_tokens_decoder"},
        "added_tokens": added_tokens,
    }


def _converted_config(folder: Path) -> ETChatConfig:
    config_file = folder / "config.json"
    content = read_json(config_file)
    if content.get("model_type") != ETChatConfig.model_type:
        raise ValueError(f"{config_file}: model_type is {content.get('model_type')!r}; a converted one is 'etchat'.")
    if "original_checkpoint" not in content:
        raise ValueError(f"{config_file}: has no original_checkpoint: it does not come from an original checkpoint.")
    return ETChatConfig.from_pretrained(folder)


def _split(ours: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
    rule, originals = names.originals_of(ours)
    return dict(zip(originals, rule.split(tensor), strict=True))


def _constant(name: str, tensors: dict[str, LazyTensor]) -> LazyTensor:
    if name == names.LM_HEAD:
        return tensors[names.EMBED_TOKENS]
    positions = tensors[f"{names.BERT}.embeddings.position_embeddings.weight"].shape[0]
    return in_memory(torch.arange(positions).unsqueeze(0), "a constant")


def _report(
    layout: str,
    destination: str | Path,
    tensors: dict[str, LazyTensor],
    left_out: dict[str, str],
    dtype: torch.dtype | None,
    files: tuple[str, ...],
    notes: list[str],
) -> ConversionReport:
    dtypes = Counter(str(stored_dtype(tensor, dtype)).removeprefix("torch.") for tensor in tensors.values())
    return ConversionReport(
        layout=layout,
        destination=str(destination),
        used=tuple(sorted({key for tensor in tensors.values() for key in tensor.keys})),
        left_out=left_out,
        filled=tuple(sorted(name for name, tensor in tensors.items() if tensor.keys)),
        fresh={name: tensor.file for name, tensor in sorted(tensors.items()) if not tensor.keys},
        dtypes=dict(dtypes),
        files=files,
        notes=notes,
    )
