"""Time and memory of a piece of work, measured so that other programs on the machine disturb little."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

MB = 1e6


def now() -> float:
    """
    Seconds of a clock that measures work: on a GPU, what it was given until now is done; on a CPU with a single thread
    the processor time of this process, of which other programs take nothing.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes, by [`now`]."""
    start = now()
    work()
    return now() - start


def interleaved(ours: Callable, theirs: Callable, repeats: int, warmup: int = 1) -> tuple[list[float], list[float]]:
    """
    Seconds of each of `repeats` calls of both, in turns, so that what slows the machine down slows both.

    The order changes from round to round: neither is always the one that finds warm caches.
    """
    for _ in range(warmup):
        ours(), theirs()
    times = {ours: [], theirs: []}
    for number in range(repeats):
        for work in (ours, theirs)[:: 1 if number % 2 else -1]:
            times[work].append(seconds(work))
    return times[ours], times[theirs]


def ratios(ours: Callable, theirs: Callable, repeats: int, warmup: int = 1) -> list[float]:
    """Time of `ours` over time of `theirs`, round by round."""
    return [a / b for a, b in zip(*interleaved(ours, theirs, repeats, warmup), strict=True)]


def status_megabytes(field: str) -> float:
    """A field of `/proc/self/status` (Linux), such as `VmRSS`, `VmHWM` or `RssAnon`, in MB of 10^6 bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / MB
    raise OSError(f"/proc/self/status has no {field}.")


class PeakMemory:
    """The most anonymous memory (RssAnon; files that are mapped do not count) above that at the start, in MB."""

    def __init__(self):
        self.megabytes = 0.0


@contextmanager
def peak_memory(interval: float = 0.002):
    """
    Samples the process' anonymous memory while the block runs; on a GPU takes its allocator's own record.

    Yields:
        [`PeakMemory`], filled in when the block ends.
    """
    peak, stop = PeakMemory(), threading.Event()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.megabytes = (torch.cuda.max_memory_allocated() - before) / MB
        return
    before = status_megabytes("RssAnon")

    def sample():
        while not stop.wait(interval):
            peak.megabytes = max(peak.megabytes, status_megabytes("RssAnon") - before)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()
        peak.megabytes = max(peak.megabytes, status_megabytes("RssAnon") - before)


def kept_megabytes(model: torch.nn.Module, forward: Callable[[], object]) -> float:
    """MB of activations that one call keeps for its backward pass, each storage once; parameters do not count."""
    own, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values()) / MB


def in_fresh_process(*arguments: str) -> dict:
    """Runs the calling script once more with `arguments`; what it prints last is the JSON object that is returned."""
    command = [sys.executable, sys.argv[0], *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def profile_table(work: Callable[[], object], rows: int = 12) -> str:
    """Where one call spends its time: a Markdown table of the operators that cost most by themselves."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
        now()
    on_gpu = torch.cuda.is_initialized()
    events = profile.key_averages()
    cost = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    calls = {event.key: event.count for event in events}
    total = sum(cost.values())
    lines = ["| operator | calls | share of the time |", "|---|---|---|"]
    for key in sorted(cost, key=cost.get, reverse=True)[:rows]:
        lines.append(f"| `{key}` | {calls[key]} | {cost[key] / total:.1%} |")
    return "\n".join(lines)
