"""The command `convert`: parsing of options and printing of the report."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

PIECES = "Pieces (what stage 1 starts from; only DST is positional)"
LORA = "LoRA"
WEIGHTS = "Weights"


class DType(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def convert(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[SRC] DST",
            help="SRC: folder or Hub id of a full or LoRA checkpoint. DST: new or empty folder; it appears complete "
            "or not at all.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_ID",
            show_default="model_name_or_path of its config.json",
            help="The checkpoint that a LoRA one was trained on.",
            rich_help_panel=LORA,
        ),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_ID", help="A plain phi3, llama, gemma2 or qwen2 model.", rich_help_panel=PIECES),
    ] = None,
    vision: Annotated[Path | None, typer.Option(metavar="FILE", help="eva_vit_g.pth", rich_help_panel=PIECES)] = None,
    qformer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="instruct_blip_vicuna7b_trimmed.pth", rich_help_panel=PIECES)
    ] = None,
    conv_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            show_default="plain",
            help="phi3, llama3, gemma2, qwen2, vicuna_v1 or plain.",
            rich_help_panel=PIECES,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(metavar="N", show_default="224", help="Side of a frame in pixels.", rich_help_panel=PIECES),
    ] = None,
    qformer_tokenizer: Annotated[
        str,
        typer.Option(metavar="DIR_OR_ID", help="The Q-Former's BERT tokenizer; vocab.txt is enough."),
    ] = "bert-base-uncased",
    vision_heads: Annotated[
        int | None,
        typer.Option(metavar="N", show_default="width / 88", help="Attention heads of the vision encoder."),
    ] = None,
    qformer_heads: Annotated[
        int | None, typer.Option(metavar="N", show_default="width / 64", help="Attention heads of the Q-Former.")
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(show_default="as stored", help="Of the floating tensors.", rich_help_panel=WEIGHTS),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Weights beyond it are sharded.", rich_help_panel=WEIGHTS)
    ] = "5GB",
    to_original: Annotated[
        bool,
        typer.Option(
            "--to-original",
            help="The way back: SRC is a converted checkpoint, DST becomes a full original one; of the same dtype, "
            "bit for bit.",
        ),
    ] = False,
):
    """
    Turn an original E.T. Chat checkpoint into a folder that the Auto classes load.

    A full checkpoint (safetensors or .bin, sharded or not) or a LoRA one, in a folder or on the Hub:

        convert SRC DST

        convert LORA_DIR DST --base STAGE_1_DIR

    What stage 1 starts from:

        convert --llm DIR --vision eva_vit_g.pth --qformer instruct_blip_vicuna7b_trimmed.pth DST

    And back to the original's layout:

        convert --to-original CONVERTED DST

    Every source key is used or listed with its reason, every target key is filled or listed as freshly initialised;
    anything else is an error and leaves nothing behind.
    """
    pieces = {"--llm": llm, "--vision": vision, "--qformer": qformer}
    piece_options = {"conv_type": conv_type, "image_size": image_size}
    from_pieces = any(value is not None for value in pieces.values())
    _check_arguments(paths, pieces, piece_options, from_pieces, base, to_original)
    # After the arguments: --help and mistyped options need not wait for torch.
    import torch
    from transformers.utils import logging

    from .convert import Options, convert_checkpoint, convert_pieces, convert_to_original

    logging.set_verbosity_error()
    torch_dtype = getattr(torch, dtype) if dtype is not None else None
    options = Options(qformer_tokenizer, vision_heads, qformer_heads, torch_dtype, max_shard_size)
    try:
        if to_original:
            report = convert_to_original(*paths, dtype=torch_dtype, max_shard_size=max_shard_size)
        elif from_pieces:
            given = {key: value for key, value in piece_options.items() if value is not None}
            report = convert_pieces(llm, vision, qformer, *paths, **given, options=options)
        else:
            report = convert_checkpoint(*paths, base=base, options=options)
    except (OSError, ValueError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    except (KeyError, TypeError, ZeroDivisionError, re.error) as error:
        # A field of a JSON file is missing or of the wrong kind in a way that no check foresaw.
        typer.echo(f"error: {paths[0]}: malformed configuration: {type(error).__name__} {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(str(report))


def _check_arguments(
    paths: list[str], pieces: dict, piece_options: dict, from_pieces: bool, base: str | None, to_original: bool
):
    if from_pieces:
        missing = [option for option, value in pieces.items() if value is None]
        if missing:
            raise typer.BadParameter(f"pieces need {', '.join(missing)} too.")
        if base is not None or to_original:
            raise typer.BadParameter("--base and --to-original do not go with pieces.")
    else:
        given = [name for name, value in piece_options.items() if value is not None]
        if given:
            raise typer.BadParameter(f"--{given[0].replace('_', '-')} is for pieces only.")
    if to_original and base is not None:
        raise typer.BadParameter("--base does not go with --to-original.")
    expected = "DST" if from_pieces else "SRC DST"
    if len(paths) != len(expected.split()):
        raise typer.BadParameter(f"{expected} expected, {len(paths)} paths given.")
