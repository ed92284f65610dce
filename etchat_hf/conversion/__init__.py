"""Conversion of original checkpoints to folders that the Auto classes load, and back."""
