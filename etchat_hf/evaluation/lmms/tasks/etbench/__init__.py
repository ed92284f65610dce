"""E.T. Bench: a task of lmms-eval per task of the benchmark, and groups as on its leaderboard."""
