"""E.T. Chat, E.T. Bench and Charades-STA for lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval).

The model registers itself as `etchat` when both packages are installed; the tasks are in a folder that
`python -m etchat_hf.evaluation.lmms` prints, for `--include_path`. Answers are scored by `etchat_hf.evaluation`.
"""
