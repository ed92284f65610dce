"""Tokenizers of an original checkpoint -> our processor, and back."""

import json
from pathlib import Path

from transformers import AutoTokenizer, BertTokenizerFast, GenerationConfig, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from ..chat_templates import load_chat_template
from ..inference import frames_that_fit
from ..processing_etchat import ETChatProcessor
from ..video_processing_etchat import ETChatVideoProcessor
from .sources import read_json, resolve_folder
from .writing import write_json

# The token after an answer; a plain caption (stage 1) has none of its own.
END_OF_TURN = {
    "phi3": "<|end|>",
    "llama3": "<|eot_id|>",
    "gemma2": "<end_of_turn>",
    "qwen2": "<|im_end|>",
    "vicuna_v1": "</s>",
    "plain": None,
}
QFORMER_TEXT_LENGTH = 256
TOKENIZER_FILES = ["*.json", "*.txt"]
TOKENIZER_ID = r"(\w[\w.-]*/)?\w[\w.-]*"


def load_tokenizer(folder: Path, text_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """
    The language model's tokenizer.

    Raises:
        ValueError: the folder holds none that can be read.
    """
    try:
        # With the language model's configuration, as its own repository would be read.
        return AutoTokenizer.from_pretrained(folder, config=text_config)
    except Exception as error:  # tokenizers raises nothing more specific for a broken file
        raise ValueError(f"{folder}: no readable tokenizer ({_first_line(error)}).") from error


def load_qformer_tokenizer(source: str, rows: int | None) -> PreTrainedTokenizerBase:
    """
    BERT's tokenizer as the Q-Former knows it: with `[DEC]`, cut on the left at 256 tokens.

    Args:
        source (`str`): folder (vocab.txt is enough) or Hub id.
        rows (`int`, *optional*): rows of the Q-Former's word embedding.

    Raises:
        FileNotFoundError: no such folder or repository, or no vocabulary in it.
        ValueError: not of that many tokens.
    """
    try:
        folder = resolve_folder(source, TOKENIZER_FILES, TOKENIZER_ID)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} It is the Q-Former's tokenizer; give --qformer-tokenizer.") from error
    # Without one, BertTokenizerFast would be empty instead of failing.
    if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise FileNotFoundError(f"{folder}: holds neither vocab.txt nor tokenizer.json.")
    tokenizer = BertTokenizerFast.from_pretrained(
        folder, truncation_side="left", model_max_length=QFORMER_TEXT_LENGTH, do_lower_case=True
    )
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    if rows is not None and len(tokenizer) != rows:
        raise ValueError(
            f"{source}: {len(tokenizer)} tokens with [DEC], but the Q-Former's word embedding has {rows} rows."
        )
    return tokenizer


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    qformer_tokenizer: PreTrainedTokenizerBase,
    conv_type: str,
    image_size: int,
    use_time_tag: bool,
    context: int,
) -> ETChatProcessor:
    """
    Our processor; it adds `<vid>` and `<image>` to `tokenizer` where they are missing, and takes no more frames than
    the language model's `context` (tokens) has room for.

    Raises:
        ValueError: an unknown conversation type.
    """
    if conv_type not in END_OF_TURN:
        raise ValueError(f"conv_type is {conv_type!r}; it must be one of {', '.join(END_OF_TURN)}.")
    return ETChatProcessor(
        video_processor=ETChatVideoProcessor(size=image_size, max_frames=frames_that_fit(context)),
        tokenizer=tokenizer,
        qformer_tokenizer=qformer_tokenizer,
        chat_template=load_chat_template(conv_type),
        use_time_tag=use_time_tag,
    )


def build_generation_config(
    tokenizer: PreTrainedTokenizerBase, text_config: PreTrainedConfig, conv_type: str
) -> tuple[GenerationConfig, list[str]]:
    """Greedy decoding up to the end of the turn; with it, what the reader of a report should know."""
    eos = text_config.eos_token_id
    stops = list(eos) if isinstance(eos, list) else [eos] if eos is not None else []
    notes = []
    end_of_turn = END_OF_TURN[conv_type]
    if end_of_turn is not None:
        ids = tokenizer.encode(end_of_turn, add_special_tokens=False)
        if len(ids) == 1:
            stops += [ids[0]] if ids[0] not in stops else []
        else:
            notes.append(f"{end_of_turn} is not one token here: generation does not stop at it")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else text_config.pad_token_id
    config = GenerationConfig(
        do_sample=False,
        bos_token_id=text_config.bos_token_id,
        eos_token_id=stops or None,
        pad_token_id=pad if pad is not None else next(iter(stops), None),
    )
    return config, notes


def restore_tokenizer(converted: Path, folder: Path, added_tokens: list[str], tokenizer_config: dict):
    """
    Write the tokenizer of a converted checkpoint as the original had it.

    Args:
        converted (`Path`): the converted checkpoint.
        folder (`Path`): where to write.
        added_tokens (`list[str]`): what conversion added and the original does without.
        tokenizer_config (`dict`): the original's tokenizer_config.json without its `added_tokens_decoder`.
    """
    tokenizer = read_json(converted / "tokenizer.json")
    kept = [token for token in tokenizer["added_tokens"] if token["content"] not in added_tokens]
    tokenizer["added_tokens"] = kept
    merges = tokenizer["model"].get("merges", [])
    if not any(" " in part for merge in merges for part in merge):
        # The original's library knows merges only as strings; a merge that is one already stays.
        tokenizer["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in kept}
    write_json(folder / "tokenizer_config.json", {**tokenizer_config, "added_tokens_decoder": decoder})


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
