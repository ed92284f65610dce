"""Prints the folder of our tasks: lmms-eval --include_path "$(python -m etchat_hf.evaluation.lmms)" ..."""

from pathlib import Path

if __name__ == "__main__":
    print(Path(__file__).with_name("tasks"))
