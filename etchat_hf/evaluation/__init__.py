"""Scores of E.T. Bench, Charades-STA and MVBench: pure functions over lists of dicts."""

from .charades import evaluate_charades
from .etbench import evaluate_etbench
from .mvbench import evaluate_mvbench

__all__ = ["evaluate_charades", "evaluate_etbench", "evaluate_mvbench"]
