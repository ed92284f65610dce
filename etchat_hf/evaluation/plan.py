"""Which rows are answered together, and by which process.

Batches follow from the annotations alone, never from the number of processes or from what is already answered: so
every row is computed in the same company however often a run is killed, continued or spread out, and its answer
cannot change by a rounding error.
"""

from collections.abc import Hashable, Sequence

Batch = list[int]
Group = list[Batch]


def plan_groups(videos: Sequence[Hashable], durations: Sequence[float], batch_size: int) -> list[Group]:
    """Cuts rows into batches that never divide a video's rows between two groups.

    Args:
        videos: What each row shows; rows of one video are answered from one decoding.
        durations: Seconds of each row's video, 0 if unknown. Videos of similar length are put together, longest
            first: little padding, and a memory that does not suffice shows at once.
        batch_size: The most rows of a batch.

    Returns:
        Groups: each is one batch of whole videos, or the batches of one video that has more rows than a batch.
    """
    rows_of: dict[Hashable, list[int]] = {}
    for row, video in enumerate(videos):
        rows_of.setdefault(video, []).append(row)
    groups: list[Group] = []
    current: Batch = []
    for rows in sorted(rows_of.values(), key=lambda rows: -durations[rows[0]]):
        if len(rows) > batch_size:
            groups.append([rows[i : i + batch_size] for i in range(0, len(rows), batch_size)])
            continue
        if len(current) + len(rows) > batch_size:
            groups.append([current])
            current = []
        current = current + rows
    return groups + ([[current]] if current else [])


def share_groups(groups: Sequence[Group], num_processes: int) -> list[list[Group]]:
    """Shares groups out evenly: each goes to the process that has the fewest rows so far.

    A video with more rows than a process's fair share is read by several processes, once by each.

    Args:
        groups: From `plan_groups`.
        num_processes: How many processes share the work.

    Returns:
        The groups of each process.
    """
    fair = sum(_num_rows(group) for group in groups) / num_processes
    shares: list[list[Group]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    for group in groups:
        parts = [group] if _num_rows(group) <= fair else [group[i::num_processes] for i in range(num_processes)]
        # The fullest part to the emptiest process; parts of one video go to different ones.
        emptiest = sorted(range(num_processes), key=loads.__getitem__)
        for process, part in zip(emptiest, sorted(filter(None, parts), key=_num_rows, reverse=True), strict=False):
            shares[process].append(part)
            loads[process] += _num_rows(part)
    return shares


def leave_out_answered(groups: Sequence[Group], pending: set[int]) -> list[Group]:
    """Drops batches of which no row is pending; the others stay whole, so that pending rows keep their company."""
    kept = [[batch for batch in group if pending.intersection(batch)] for group in groups]
    return [group for group in kept if group]


def _num_rows(group: Group) -> int:
    return sum(map(len, group))
