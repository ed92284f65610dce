"""Convert an original E.T. Chat checkpoint, or restore one: `python conversion/convert_original.py SRC DST`."""

import sys
from pathlib import Path

import typer

# From a clone without installation, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from etchat_hf.conversion.cli import convert  # noqa: E402

if __name__ == "__main__":
    typer.run(convert)
