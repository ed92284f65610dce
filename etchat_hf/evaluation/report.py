"""Scores for people: tables on the terminal beside the published figures, and one HTML page with plots."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from rich.table import Table

from .answers import Span
from .etbench import Outcome, Scores

# Percent, from the papers' tables: E.T. Bench with 7,289 samples, Charades-STA zero-shot.
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

WORST_PER_TASK = 3
ABSENT = "absent"
_TEXT_COLUMNS = {"Task", "Source", "Figures", "Group", "Metric"}


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f}"


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in _TEXT_COLUMNS else "right")
    return table


def etbench_tables(result: dict) -> list[Table]:
    """Lays out what `evaluate_etbench` returns: tasks beside the published figures, sources, groups."""
    tasks = _table("E.T. Bench (%)", ("Task", "Answers", "Failed", "Score", "Published"))
    for key, published in PUBLISHED_ETBENCH.items():
        sources = result["by_source"].get(key.split("_")[0].lower(), {}).values()
        counts = (str(sum(source[count] for source in sources)) for count in ("Total", "Failed"))
        tasks.add_row(key, *counts, _percent(result["overall"].get(key)), str(published))
    sources = _table("By source (%)", ("Task", "Source", "Answers", "Failed", "Figures"))
    for task, parts in result["by_source"].items():
        for source, figures in parts.items():
            # CIDEr has a scale of its own, 0 to 10.
            listed = [
                f"{key} {value:.2f}" if key == "CIDEr" else f"{key} {_percent(value)}"
                for key, value in figures.items()
                if key not in ("Total", "Failed")
            ]
            sources.add_row(task, source, str(figures["Total"]), str(figures["Failed"]), "  ".join(listed))
    groups = _table("Groups (%)", ("Group", "Score"))
    for group, value in result["merged"].items():
        groups.add_row(group, _percent(value))
    return [tasks, sources, groups] if result["merged"] else [tasks, sources]


def charades_table(result: dict) -> Table:
    """Lays out what `evaluate_charades` returns, beside the published figures."""
    table = _table("Charades-STA (%)", ("Metric", "Score", "Published"))
    for key, published in PUBLISHED_CHARADES.items():
        table.add_row(key, _percent(result[key]), str(published))
    table.add_section()
    table.add_row("Failed", f"{result['failed']} of {result['total']}", "")
    return table


def mvbench_table(result: dict) -> Table:
    """Lays out what `evaluate_mvbench` returns."""
    table = _table("MVBench (%)", ("Task", "Answers", "Failed", "Accuracy"))
    for task, figures in result["by_task"].items():
        table.add_row(task, str(figures["Total"]), str(figures["Failed"]), _percent(figures["Acc"]))
    table.add_row("Average", "", "", _percent(result["overall"]["Avg"]))
    return table


@dataclass
class Case:
    """One answer to be drawn: spans in seconds, and the best overlap of any of them with an annotated one."""

    task: str
    name: str
    question: str
    answer: str
    target: Sequence[Span]
    predicted: Sequence[Span]
    iou: float


def etbench_cases(scores: Scores) -> list[Case]:
    """Returns the answers of the tasks that compare spans by their overlap."""
    return [
        Case(o.task, f"{o.video}, {o.name}", o.question, o.answer, o.target, o.predicted, _best(o))
        for o in scores.outcomes
        if o.target and o.task not in ("evs", "vhd")
    ]


def _best(outcome: Outcome) -> float:
    return 0.0 if outcome.iou is None else float(outcome.iou.max())


def charades_cases(
    rows: Sequence[dict], ious: Sequence[float], predictions: Sequence, names: Sequence[str]
) -> list[Case]:
    """Returns the predictions of `score_charades` with their rows."""
    return [
        Case(
            task="charades",
            name=f"{row.get('vid', '')}, {name}",
            question=str(row.get("query", "")),
            answer=str(row.get("response", "")),
            target=[tuple(row["span"])],
            predicted=[tuple(prediction)] if prediction else [],
            iou=iou,
        )
        for row, iou, prediction, name in zip(rows, ious, predictions, names, strict=True)
    ]


def _bars(scores: dict[str, float], published: dict[str, float]) -> str:
    """Draws a bar per score in [0, 1], with a tick where the published figure (percent) is."""
    lines = []
    for i, (label, score) in enumerate(scores.items()):
        y = 26 * i
        lines.append(f'<text x="150" y="{y + 16}" text-anchor="end">{escape(label)}</text>')
        lines.append(f'<rect class="predicted" x="160" y="{y + 4}" width="{500 * score:.1f}" height="16"/>')
        lines.append(f'<text x="{166 + 500 * score:.1f}" y="{y + 16}">{_percent(score)}</text>')
        if label in published:
            x = 160 + 5 * published[label]
            lines.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y + 1}" y2="{y + 23}">'
                f"<title>published {published[label]}</title></line>"
            )
    return f'<svg width="720" height="{26 * len(scores)}" role="img">{"".join(lines)}</svg>'


def _histogram(ious: Sequence[float]) -> str:
    """Draws how many answers reach which IoU, in ten bins; the last one holds 1 as well."""
    counts = [0] * 10
    for iou in ious:
        counts[min(int(10 * iou), 9)] += 1
    highest = max([*counts, 1])
    bins = []
    for i, count in enumerate(counts):
        height = 160 * count / highest
        bins.append(
            f'<rect class="predicted" x="{60 * i + 4}" y="{180 - height:.1f}" width="52" height="{height:.1f}"/>'
        )
        bins.append(f'<text x="{60 * i + 30}" y="{175 - height:.1f}" text-anchor="middle">{count}</text>')
        bins.append(f'<text x="{60 * i + 30}" y="196" text-anchor="middle">{i / 10:.1f}</text>')
    return f'<svg width="620" height="204" role="img">{"".join(bins)}</svg>'


def _timeline(case: Case) -> str:
    """Draws annotated spans above predicted ones, on one axis in seconds."""
    end = max((time for span in [*case.target, *case.predicted] for time in span), default=0) or 1
    scale, lines = 640 / end, []
    for kind, spans, y in (("target", case.target, 4), ("predicted", case.predicted, 24)):
        for start, stop in (sorted(span) for span in spans):
            x, width = max(start, 0) * scale, max((stop - max(start, 0)) * scale, 2)
            title = f"<title>{kind} {start:g} - {stop:g} s</title>"
            lines.append(f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="14">{title}</rect>')
    lines.append(f'<text x="0" y="54">0 s</text><text x="640" y="54" text-anchor="end">{end:g} s</text>')
    heading = f"<b>{escape(case.task)}</b> {escape(case.name)}, best IoU {case.iou:.2f}"
    said = f"{escape(case.question[:300])}<br><i>{escape(case.answer[:300])}</i>"
    return f'<p>{heading}<br>{said}</p><svg width="660" height="58" role="img">{"".join(lines)}</svg>'


def _worst(cases: Sequence[Case]) -> list[Case]:
    chosen: list[Case] = []
    for task in dict.fromkeys(case.task for case in cases):
        of_task = (case for case in cases if case.task == task)
        chosen += sorted(of_task, key=lambda case: case.iou)[:WORST_PER_TASK]
    return chosen


_STYLE = """body { font: 14px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; padding: 0 1em; }
svg { display: block; font-size: 12px; } line { stroke: #222; stroke-width: 2; }
.target { fill: #3a9d5d; } .predicted { fill: #4c78c8; } .problem { color: #a33; }"""


def render_page(
    title: str, scores: dict[str, float], published: dict[str, float], cases: Sequence[Case], result: dict
) -> str:
    """Renders one HTML page that needs no other file and no network.

    Args:
        title: Heading of the page.
        scores: Bars to draw, each in [0, 1].
        published: Figures in percent, marked on the bars of the same name.
        cases: Answers with spans, for the histogram and the timelines of the worst; may be empty.
        result: What an `evaluate_*` function returns, for its problems and absent metrics.

    Returns:
        The HTML text.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    for kind, names in result["problems"].items():
        parts.append(f'<p class="problem">{len(names)} rows: {escape(kind)} ({escape("; ".join(names[:3]))})</p>')
    for place, metrics in result.get("absent", {}).items():
        listed = "; ".join(f"{metric}: {reason}" for metric, reason in metrics.items())
        parts.append(f"<p>Absent in {escape(place)}: {escape(listed)}</p>")
    parts.append(f"<h2>Scores in %, published as a black line</h2>{_bars(scores, published)}")
    if cases:
        parts.append(f"<h2>Best IoU of each answer</h2>{_histogram([case.iou for case in cases])}")
        parts.append("<h2>Worst cases</h2><p>Green: annotated, blue: predicted</p>")
        parts += [_timeline(case) for case in _worst(cases)]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def etbench_bars(result: dict) -> dict[str, float]:
    """Returns the bars of an E.T. Bench page: every task's figure, in the order of the published table."""
    return {key: result["overall"][key] for key in PUBLISHED_ETBENCH if key in result["overall"]}
