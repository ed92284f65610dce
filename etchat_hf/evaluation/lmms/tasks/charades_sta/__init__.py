"""Charades-STA as E.T. Chat is asked; lmms-eval's own `temporal_grounding_charades` asks and scores differently."""
