"""Chat templates of the original's conversation types, one Jinja file each."""

from pathlib import Path

CONV_TYPES = ("phi3", "llama3", "gemma2", "qwen2", "vicuna_v1", "plain")


def load_chat_template(conv_type: str) -> str:
    """
    Jinja source of a conversation type's chat template, whole: ready for a processor or tokenizer.

    Raises:
        ValueError: for an unknown conversation type.
    """
    if conv_type not in CONV_TYPES:
        raise ValueError(f"conv_type is {conv_type!r}; it must be one of {', '.join(CONV_TYPES)}.")
    folder = Path(__file__).parent
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("_content.jinja", f"{conv_type}.jinja"))
