"""A synthetic world in which every moment is known, and the tiny model that learns it.

`python -m etchat_hf.toy` makes both from nothing: videos, annotations, three stages, a score on unseen videos.
"""

from pathlib import Path


def bundled_checkpoint() -> Path:
    """Folder of the toy model that comes with the package; it knows coloured shapes and nothing else."""
    return Path(__file__).parent / "checkpoint"


__all__ = ["bundled_checkpoint"]
