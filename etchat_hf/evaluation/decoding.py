"""What answers need beside greedy search, row by row: none depends on its neighbours in a batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import LogitsProcessor, StoppingCriteria


class RowRepetitionPenalty(LogitsProcessor):
    """Repetition penalty per row that counts words only: neither `<vid>`, which must recur, nor frames nor padding.

    Otherwise as transformers' `RepetitionPenaltyLogitsProcessor`: scores of tokens that occurred in prompt or answer
    are divided by the penalty where positive, and multiplied where negative.

    Args:
        penalties: One per row; 1 leaves a row alone.
        counted: Which columns of the prompt hold words, bool (B, L).
        match_token_id: Id of `<vid>`.
    """

    def __init__(self, penalties: Sequence[float], counted: torch.Tensor, match_token_id: int):
        self.penalties = torch.tensor(penalties, device=counted.device)[:, None]
        self.counted = counted
        self.match_token_id = match_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        counted = pad(self.counted, (0, input_ids.shape[1] - self.counted.shape[1]), value=True)
        counted = counted & (input_ids != self.match_token_id)
        # What does not count is filed under an id beyond the vocabulary.
        vocab_size = scores.shape[1]
        seen = torch.zeros(len(scores), vocab_size + 1, dtype=torch.bool, device=scores.device)
        seen.scatter_(1, input_ids.masked_fill(~counted, vocab_size), True)
        penalties = self.penalties.to(scores.dtype)
        penalised = torch.where(scores < 0, scores * penalties, scores / penalties)
        return torch.where(seen[:, :vocab_size], penalised, scores)


class RowSampler(LogitsProcessor):
    """Makes greedy search sample: the largest of `scores / temperature + Gumbel noise` is a draw from their softmax.

    Each row has a random generator of its own, so that its draws depend on nothing but its seed.

    Args:
        seeds: One per row.
        temperature: Positive; below 1 likely tokens become likelier.
    """

    def __init__(self, seeds: Sequence[tuple[int, ...]], temperature: float):
        self.generators = [np.random.default_rng(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = np.stack([generator.gumbel(size=scores.shape[1]) for generator in self.generators])
        return scores.float() / self.temperature + torch.from_numpy(noise).to(scores.device, torch.float32)


class RowBudgets(StoppingCriteria):
    """Ends each row after its own number of new tokens.

    Args:
        budgets: New tokens per row.
        prompt_length: Columns of the prompt.
        device: Where the generated ids are.
    """

    def __init__(self, budgets: Sequence[int], prompt_length: int, device: torch.device):
        self.ends = torch.tensor(budgets, device=device) + prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return input_ids.shape[1] >= self.ends
