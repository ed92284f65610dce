"""Scores on the terminal, beside the published figures."""

from rich import box
from rich.table import Table
from rich.text import Text

from .etbench import CAPTION_TASKS, GROUPS, merge_groups
from .etbench_tasks import TASKS
from .metrics import THRESHOLDS

# Percent, from the papers' tables: E.T. Chat on the 7,289 samples of E.T. Bench, and zero-shot on Charades-STA.
PUBLISHED_ETBENCH = {
    "RAR": 44.6,
    "ECA": 37.0,
    "RVQ": 33.6,
    "TVG": 38.6,
    "EPM": 10.2,
    "TAL": 30.8,
    "EVS": 25.4,
    "VHD": 62.5,
    "DVC": 38.4,
    "DVC_Sim": 19.7,
    "SLC": 24.4,
    "SLC_Sim": 14.6,
    "TEM": 16.5,
    "GVQ": 3.7,
}
PUBLISHED_CHARADES = {"R1@0.3": 65.7, "R1@0.5": 45.9, "R1@0.7": 20.0, "mIoU": 42.3}
GROUP_TITLES = {
    "acc_ref": "Referring",
    "f1_gnd": "Grounding",
    "f1_cap": "Captioning",
    "sim_cap": "Captioning",
    "rec_com": "Complex",
}
CAPTION_METRICS = ("METEOR", "ROUGE_L", "CIDEr", "SentSim")
ABSENT = "absent"


def percent(value: float | None) -> str:
    """A figure in [0, 1] as percent."""
    return ABSENT if value is None else f"{100 * value:.1f}"


def metric_of(key: str) -> str:
    """What the figure of a task is: Acc, F1, mRec or Sim."""
    return "Sim" if key.endswith("_Sim") else TASKS[key.lower()].headline


def counts_of(result: dict, key: str) -> tuple[int, int]:
    """Answers, and how many of them failed, of a task in what `evaluate_etbench` returns."""
    sources = result["by_source"].get(key.removesuffix("_Sim").lower(), {}).values()
    return sum(source["Total"] for source in sources), sum(source["Failed"] for source in sources)


def list_absent(absent: dict[str, dict[str, str]]) -> list[str]:
    """Lines that say which caption metrics of `evaluate_etbench` are absent, and why."""
    places: dict[tuple[str, str], list[str]] = {}
    for place, metrics in absent.items():
        for metric, reason in metrics.items():
            places.setdefault((metric, reason), []).append(place)
    return [f"{metric} of {', '.join(where)} is absent: {reason}" for (metric, reason), where in places.items()]


def etbench_tables(result: dict) -> list[Table]:
    """Lays out what `evaluate_etbench` returns: tasks and groups beside the published figures, sources, captions."""
    tables = [_tasks_table(result), _sources_table(result)]
    if any(task in result["by_source"] for task in CAPTION_TASKS):
        tables.append(_captions_table(result))
    return tables


def charades_table(result: dict) -> Table:
    """Lays out what `evaluate_charades` returns, beside the published figures."""
    table = _table("Charades-STA (%)", left=("Metric",), right=("Score", "Published"))
    for key, published in PUBLISHED_CHARADES.items():
        _add_row(table, key, percent(result[key]), f"{published:.1f}")
    table.add_section()
    _add_row(table, "Failed", f"{result['failed']} of {result['total']}", "")
    return table


def mvbench_table(result: dict) -> Table:
    """Lays out what `evaluate_mvbench` returns."""
    table = _table("MVBench (%)", left=("Task",), right=("Accuracy", "Answers", "Failed"))
    for task, figures in result["by_task"].items():
        _add_row(table, task, percent(figures["Acc"]), figures["Total"], figures["Failed"])
    table.add_section()
    totals = (sum(figures[count] for figures in result["by_task"].values()) for count in ("Total", "Failed"))
    _add_row(table, "Mean of the tasks", percent(result["overall"]["Avg"]), *totals, style="bold")
    return table


def _tasks_table(result: dict) -> Table:
    silent = [key for key in PUBLISHED_ETBENCH if not counts_of(result, key)[0] and not key.endswith("_Sim")]
    caption = f"no answers of {', '.join(silent)}" if silent else None
    columns = ("Score", "Published", "Answers", "Failed")
    table = _table("E.T. Bench (%)", left=("Task", "Metric"), right=columns, caption=caption)
    published_groups = merge_groups(PUBLISHED_ETBENCH)
    for group, members in GROUPS.items():
        for key in members:
            total, failed = counts_of(result, key)
            if total:
                score = percent(result["overall"].get(key))
                _add_row(table, key, metric_of(key), score, f"{PUBLISHED_ETBENCH[key]:.1f}", total, failed)
        if group in result["merged"]:
            figures = percent(result["merged"][group]), f"{published_groups[group]:.1f}"
            _add_row(table, GROUP_TITLES[group], metric_of(members[0]), *figures, style="bold")
        table.add_section()
    return table


def _sources_table(result: dict) -> Table:
    columns = ("Score", *(f"@{threshold}" for threshold in THRESHOLDS), "mIoU", "Acc", "Failed")
    table = _table("By source (%)", left=("Task", "Source"), right=columns)
    for task, sources in result["by_source"].items():
        headline = TASKS[task].headline
        prefix = "R" if headline == "mRec" else "F1"
        keys = (headline, *(f"{prefix}@{threshold}" for threshold in THRESHOLDS), "mIoU", "Acc")
        for source, figures in sources.items():
            shown = (percent(figures[key]) if key in figures else "" for key in keys)
            _add_row(table, task.upper(), source, *shown, f"{figures['Failed']} of {figures['Total']}")
    return table


def _captions_table(result: dict) -> Table:
    table = _table("Captions of matches (%, CIDEr 0 to 10)", ("Task", "Source"), CAPTION_METRICS)
    for task in CAPTION_TASKS:
        for source, figures in result["by_source"].get(task, {}).items():
            scores = [percent(figures.get(metric)) for metric in CAPTION_METRICS]
            if "CIDEr" in figures:
                scores[CAPTION_METRICS.index("CIDEr")] = f"{figures['CIDEr']:.2f}"
            _add_row(table, task.upper(), source, *scores)
    return table


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...], caption: str | None = None) -> Table:
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    table.title_justify = table.caption_justify = "left"
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _add_row(table: Table, *cells: object, style: str | None = None) -> None:
    # As `Text`: names come from files, and their brackets are no markup.
    table.add_row(*(Text(str(cell)) for cell in cells), style=style)
