"""Account of samples that could not be used, kept over all loader workers of a process."""

import json
import logging
import multiprocessing
from collections import Counter
from pathlib import Path

logger = logging.getLogger(__name__)

GRACE_SAMPLES = 200  # the share of failures says little before so many


class UnusableDataError(RuntimeError):
    """More samples cannot be used than may be: the data need a look, not the code."""

    def __str__(self) -> str:
        # A loader's worker process hands over a whole traceback as the message; ours ends it
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class SkipReport:
    """
    Counts samples read, skipped and cut, and logs each skipped one.

    Args:
        max_failure_rate (`float`): share of skipped samples above which the run stops.
        log (`str` or `Path`, *optional*): JSON Lines file to which `{"sample", "id", "reason"}` are appended.
    """

    def __init__(self, max_failure_rate: float, log: str | Path | None = None):
        if not 0 <= max_failure_rate <= 1:
            raise ValueError(f"max_failure_rate is {max_failure_rate}; it must be between 0 and 1.")
        self.max_failure_rate = max_failure_rate
        self.log = None if log is None else Path(log)
        self.last_skip = ""  # of this process: sample and reason
        self._read, self._skipped, self._cut = (multiprocessing.Value("q") for _ in range(3))

    @property
    def num_read(self) -> int:
        return self._read.value

    @property
    def num_skipped(self) -> int:
        return self._skipped.value

    @property
    def num_cut(self) -> int:
        return self._cut.value

    def add_sample(self, was_cut: bool) -> None:
        _increment(self._read)
        if was_cut:
            _increment(self._cut)

    def add_skip(self, sample: str, sample_id: object, reason: str) -> None:
        """
        Raises:
            UnusableDataError: if too large a share has been skipped by now.
        """
        skipped = _increment(self._skipped)
        self.last_skip = f"{sample}: {reason}"
        logger.warning("skipped %s (id %s): %s", sample, sample_id, reason)
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"sample": sample, "id": sample_id, "reason": reason}) + "\n")
        if skipped > self.max_failure_rate * max(self.num_read + skipped, GRACE_SAMPLES):
            raise UnusableDataError(
                f"{skipped} of {self.num_read + skipped} samples could not be used, more than max_failure_rate "
                f"({self.max_failure_rate}) allows; the last was {self.last_skip}. Run `etchat data check`."
            )

    def summary(self) -> str:
        """A line for the end of a run, and where there is a log its most frequent reasons, of all processes."""
        counts = f"{self.num_read} samples read, {self.num_skipped} skipped, {self.num_cut} cut at max_length"
        line = f"{counts} (this process)"
        if self.log is None or not self.log.is_file():
            return line
        reasons, num_torn = Counter(), 0
        with open(self.log, encoding="utf-8", errors="replace") as file:
            for entry in file:
                try:
                    reasons[json.loads(entry)["reason"]] += 1
                except ValueError:
                    num_torn += 1
        lines = [line, *(f"{count:6d} x {reason}" for reason, count in reasons.most_common(10))]
        if num_torn:
            lines.append(f"{num_torn:6d} lines of {self.log} are not readable: a process was killed while it wrote")
        return "\n".join(lines)


def _increment(counter) -> int:
    with counter.get_lock():
        counter.value += 1
        return counter.value
