"""One HTML page with plots of the scores, which needs no other file and no network.

Plots are SVG whose horizontal positions are percentages: they fill a window of any width, and their texts keep their
size. Colours follow the reader's light or dark setting.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from .answers import is_number
from .charades import Moment
from .etbench import GROUPS, Scores, merge_groups
from .etbench_tasks import TASKS, Outcome
from .metrics import Span
from .mvbench import Choice
from .tables import GROUP_TITLES, PUBLISHED_CHARADES, PUBLISHED_ETBENCH, counts_of, list_absent, metric_of, percent

CASES_PER_TASK = 3
NAMES_PER_PROBLEM = 3
TEXT_LENGTH = 400
SPANS_DRAWN = 50
SPANS_LISTED = 8
BINS = 10
# Overlap with an annotated span, of the one span that is scored or, where all are, of the best one.
FIRST_IOU, BEST_IOU = "IoU", "best IoU"
BEST_IOU_TASKS = ("tal", "dvc", "slc")
TICK_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)


@dataclass
class Bar:
    """One score: a figure in [0, 1] or None if it is absent; the published one in percent; answers and failed ones."""

    label: str
    explanation: str
    score: float | None
    published: float | None
    total: int
    failed: int


@dataclass
class Case:
    """One answer to be shown.

    Attributes:
        task: Heading under which it is shown.
        name: Video, and where the answer is.
        question, answer: Texts.
        failed: Whether the answer could not be read.
        measure: Name of `score`: `FIRST_IOU` where the first span of an answer alone is scored, `BEST_IOU` where all
            are, of which `score` is that of the one that overlaps best with an annotated one; or `F1`.
        score: In [0, 1].
        target, predicted: Annotated spans and those of the answer, seconds.
        duration: Seconds of the video, if known.
    """

    task: str
    name: str
    question: str
    answer: str
    failed: bool
    measure: str = ""
    score: float = 0.0
    target: Sequence[Span] = ()
    predicted: Sequence[Span] = ()
    duration: float | None = None


@dataclass
class Page:
    """What a page shows: its bars, the answers that its plots are drawn from, and what was wrong with them."""

    title: str
    bars: Sequence[Bar]
    cases: Sequence[Case]
    problems: dict[str, list[str]]
    absent: dict[str, dict[str, str]] = field(default_factory=dict)


def etbench_page(scores: Scores, result: dict) -> Page:
    """The page of what `score_etbench` and `summarize_etbench` return."""
    bars = []
    for key, published in PUBLISHED_ETBENCH.items():
        total, failed = counts_of(result, key)
        if total:
            task = TASKS[key.removesuffix("_Sim").lower()]
            explanation = f"{task.title}, {metric_of(key)}"
            bars.append(Bar(key, explanation, result["overall"].get(key), published, total, failed))
    published_groups = merge_groups(PUBLISHED_ETBENCH)
    for group, score in result["merged"].items():
        keys = GROUPS[group]
        total, failed = (sum(numbers) for numbers in zip(*(counts_of(result, key) for key in keys), strict=True))
        explanation = f"{', '.join(keys)}, {metric_of(keys[0])}"
        bars.append(Bar(GROUP_TITLES[group], explanation, score, published_groups[group], total, failed))
    cases = [_etbench_case(outcome) for outcome in scores.outcomes]
    return Page("E.T. Bench", bars, cases, result["problems"], result["absent"])


def _etbench_case(outcome: Outcome) -> Case:
    row = outcome.sample.row
    measure = BEST_IOU if row["task"] in BEST_IOU_TASKS else FIRST_IOU
    score = 0.0 if outcome.iou is None else float(outcome.iou.max())
    if row["task"] in ("evs", "vhd"):
        measure, score = "F1", outcome.values["F1"]
    wrong = "; wrong option" if outcome.values.get("Acc") == 0 else ""
    return Case(
        task=f"{row['task'].upper()}, {TASKS[row['task']].title}",
        name=f"{row['video']}, {outcome.sample.name}{wrong}",
        question=str(row.get("q", "")),
        answer=outcome.sample.answer,
        failed=outcome.failed,
        measure=measure,
        score=score,
        target=outcome.target,
        predicted=outcome.predicted,
        duration=row["duration"] if is_number(row.get("duration")) else None,
    )


def charades_page(moments: Sequence[Moment], result: dict) -> Page:
    """The page of what `score_charades` and `summarize_charades` return."""
    counts = result["total"], result["failed"]
    bars = [Bar(key, "", result[key], published, *counts) for key, published in PUBLISHED_CHARADES.items()]
    cases = [
        Case(
            task="Charades-STA",
            name=f"{moment.row.get('vid', '')}, {moment.name}",
            question=str(moment.row.get("query", "")),
            answer=str(moment.row.get("response", "")),
            failed=moment.predicted is None,
            measure=FIRST_IOU,
            score=moment.iou,
            target=[tuple(moment.target)],
            predicted=[tuple(moment.predicted)] if moment.predicted else [],
        )
        for moment in moments
    ]
    return Page("Charades-STA", bars, cases, result["problems"])


def mvbench_page(choices: Sequence[Choice], result: dict) -> Page:
    """The page of what `score_mvbench` and `summarize_mvbench` return."""
    bars = [
        Bar(task, "", figures["Acc"], None, figures["Total"], figures["Failed"])
        for task, figures in result["by_task"].items()
    ]
    total, failed = len(choices), sum(choice.chosen is None for choice in choices)
    bars.append(Bar("Mean of the tasks", "", result["overall"]["Avg"], None, total, failed))
    cases = [
        Case(
            task=choice.row["task"],
            name=f"{choice.row.get('video', '')}, {choice.name}",
            question=str(choice.row.get("question", "")),
            answer=str(choice.row.get("a") or ""),
            failed=choice.chosen is None,
        )
        for choice in choices
    ]
    return Page("MVBench", bars, cases, result["problems"])


def render(page: Page) -> str:
    """Renders a page as the text of one HTML file."""
    located = [case for case in page.cases if case.target]
    failed = sum(case.failed for case in page.cases)
    parts = [
        f"<h1>{escape(page.title)}</h1>",
        f"<p>{len(page.cases):,} answers, {failed:,} of which could not be read.</p>",
        *_problems(page),
        _scores(page.bars),
    ]
    if overlapping := [case for case in located if case.measure in (FIRST_IOU, BEST_IOU)]:
        parts.append(_histogram(overlapping))
    if located:
        parts += _worst_cases(located)
    if failed:
        parts += _unread([case for case in page.cases if case.failed])
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(page.title)}: scores</title><style>{_STYLE}</style>"
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _problems(page: Page) -> list[str]:
    parts = []
    for kind, names in page.problems.items():
        more = f"; and {len(names) - NAMES_PER_PROBLEM:,} more" if len(names) > NAMES_PER_PROBLEM else ""
        line = f"{len(names):,} x {kind}: {'; '.join(names[:NAMES_PER_PROBLEM])}{more}"
        parts.append(f'<p class="problem">{escape(line)}</p>')
    return parts + [f'<p class="note">{escape(line)}</p>' for line in list_absent(page.absent)]


def _scores(bars: Sequence[Bar]) -> str:
    has_published = any(bar.published is not None for bar in bars)
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Score", *(["Published"] if has_published else [])))
    heads += "".join(f'<th scope="col" class="count">{name}</th>' for name in ("Answers", "Failed"))
    legend = '<span class="key predicted"></span> these answers'
    if has_published:
        legend += ' <span class="key mark"></span> published E.T. Chat'
    return "\n".join(
        [
            "<h2>Scores in percent</h2>",
            f'<p class="legend">{legend}</p>',
            f'<table class="scores"><thead><tr><th></th><th class="plot">{_percent_axis()}</th>{heads}</tr></thead>',
            "<tbody>",
            *(_bar(bar, has_published) for bar in bars),
            "</tbody></table>",
        ]
    )


def _percent_axis() -> str:
    marks = (f'<text x="{value}%" y="12" text-anchor="middle">{value}</text>' for value in (0, 25, 50, 75, 100))
    return f'<svg height="16" aria-hidden="true">{"".join(marks)}</svg>'


def _bar(bar: Bar, has_published: bool) -> str:
    label = f"{escape(bar.label)}<small>{escape(bar.explanation)}</small>" if bar.explanation else escape(bar.label)
    plot = '<rect class="track" width="100%" y="3" height="16"/>'
    if bar.score is not None:
        plot += f'<rect class="predicted" width="{100 * bar.score:.2f}%" y="3" height="16"/>'
    cells = [percent(bar.score)]
    if has_published:
        plot += f'<line class="mark" x1="{bar.published:g}%" x2="{bar.published:g}%" y1="0" y2="22"/>'
        cells.append(f"{bar.published:.1f}")
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    numbers += "".join(f'<td class="count">{count:,}</td>' for count in (bar.total, bar.failed))
    svg = f'<svg height="22" role="img" aria-label="{escape(bar.label)} {percent(bar.score)}">{plot}</svg>'
    return f'<tr><th scope="row">{label}</th><td class="plot">{svg}</td>{numbers}</tr>'


def _histogram(cases: Sequence[Case]) -> str:
    """How many answers reach which IoU; the last bin holds 1 as well."""
    bins = [0] * BINS
    for case in cases:
        bins[min(int(BINS * case.score), BINS - 1)] += 1
    width, base, full = 100 / BINS, 180, 150
    drawn = []
    for i, count in enumerate(bins):
        title = f"<title>{count:,} answers of IoU {i / BINS:g} to {(i + 1) / BINS:g}</title>"
        top = base - full * count / max(bins)
        drawn.append(
            f'<rect class="predicted" x="{i * width + 0.5:g}%" width="{width - 1:g}%" y="{top:.1f}" '
            f'height="{base - top:.1f}">{title}</rect>'
            f'<text x="{(i + 0.5) * width:g}%" y="{top - 5:.1f}" text-anchor="middle">{count:,}</text>'
        )
    drawn.append(f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>')
    drawn += [
        f'<text x="{i * width:g}%" y="{base + 16}" text-anchor="middle">{i / BINS:g}</text>' for i in range(BINS + 1)
    ]
    drawn.append(f'<text x="50%" y="{base + 34}" text-anchor="middle">IoU</text>')
    return "\n".join(
        [
            "<h2>How well the answers overlap</h2>",
            f"<p>Answers by IoU with an annotated span, 0 if they name none or, in GVQ, the wrong option. "
            f"{escape(_name_spans(cases))}</p>",
            f'<svg class="histogram" height="{base + 40}" role="img" aria-label="histogram of IoU">',
            *drawn,
            "</svg>",
        ]
    )


def _name_spans(cases: Sequence[Case]) -> str:
    """Says which of an answer's spans a histogram shows."""
    kinds = {FIRST_IOU: "The first span, which alone is scored", BEST_IOU: "The best of all spans"}
    lines = []
    for measure, words in kinds.items():
        if part := [case for case in cases if case.measure == measure]:
            tasks = dict.fromkeys(case.task.split(",")[0] for case in part)
            lines.append(f"{words}, of {len(part):,} answers of {', '.join(tasks)}.")
    return " ".join(lines)


def _by_task(cases: Iterable[Case]) -> dict[str, list[Case]]:
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.task, []).append(case)
    return groups


def _worst_cases(cases: Sequence[Case]) -> list[str]:
    parts = [
        "<h2>Worst cases</h2>",
        '<p class="legend"><span class="key target"></span> annotated <span class="key predicted"></span> answered '
        '<span class="key track"></span> the video, where its length is known</p>',
    ]
    for task, part in _by_task(case for case in cases if not case.failed and case.score < 1).items():
        parts.append(f"<h3>{escape(task)}</h3>")
        parts += [_worst_case(case) for case in sorted(part, key=lambda case: case.score)[:CASES_PER_TASK]]
    return parts


def _worst_case(case: Case) -> str:
    lines = [
        f"<article><p><b>{case.measure} {case.score:.2f}</b> {_shorten(case.name)}</p>",
        f"<p>{_shorten(case.question)}</p>" if case.question else "",
        f"<blockquote>{_shorten(case.answer)}</blockquote>" if case.answer else "",
        _timeline(case),
        f'<p class="times">annotated {_list_spans(case.target)}; answered {_list_spans(case.predicted)}'
        f"{_count_undrawn(case)}</p></article>",
    ]
    return "\n".join(filter(None, lines))


def _unread(cases: Sequence[Case]) -> list[str]:
    parts = ["<h2>Answers that could not be read</h2>"]
    for task, part in _by_task(cases).items():
        parts.append(f"<h3>{escape(task)}: {len(part):,}</h3>")
        for case in part[:CASES_PER_TASK]:
            answer = f"<blockquote>{_shorten(case.answer)}</blockquote>" if case.answer.strip() else "<p>(empty)</p>"
            parts.append(f"<article><p>{_shorten(case.name)}</p>\n{answer}</article>")
    return parts


def _timeline(case: Case) -> str:
    """Annotated spans above answered ones, on one axis in seconds; the first `SPANS_DRAWN` of each."""
    target, predicted = case.target[:SPANS_DRAWN], case.predicted[:SPANS_DRAWN]
    times = [time for span in [*target, *predicted] for time in span]
    end = max([*times, case.duration or 0]) or 1

    def place(time: float) -> float:
        return 100 * max(time, 0) / end

    drawn = []
    if case.duration:
        drawn.append(f'<rect class="track" width="{place(case.duration):.2f}%" y="0" height="36"/>')
    for kind, spans, y in (("target", target, 2), ("predicted", predicted, 20)):
        for start, stop in map(sorted, spans):
            title = f"{kind} {start:g} - {stop:g} s"
            width = max(place(stop) - place(start), 0.4)  # a moment is to be seen too
            drawn.append(
                f'<rect class="{kind}" x="{place(start):.2f}%" width="{width:.2f}%" y="{y}" '
                f'height="14"><title>{title}</title></rect>'
            )
    step = next((step for step in TICK_STEPS if end / step <= 6), end)
    for i in range(int(end / step) + 1):
        drawn.append(
            f'<text x="{place(i * step):.2f}%" y="50" text-anchor="middle">{i * step:g}{"" if i else " s"}</text>'
        )
    return f'<svg class="timeline" height="54" role="img" aria-label="timeline">{"".join(drawn)}</svg>'


def _count_undrawn(case: Case) -> str:
    number = sum(max(len(spans) - SPANS_DRAWN, 0) for spans in (case.target, case.predicted))
    return f"; {number:,} of them are not drawn" if number else ""


def _list_spans(spans: Sequence[Span]) -> str:
    shown = ", ".join(map(_show_span, spans[:SPANS_LISTED]))
    more = f" and {len(spans) - SPANS_LISTED:,} more" if len(spans) > SPANS_LISTED else ""
    return f"{shown} s{more}" if spans else "nothing"


def _show_span(span: Span) -> str:
    start, end = span
    return f"{start:g}" if start == end else f"{start:g} - {end:g}{' (reversed)' if end < start else ''}"


def _shorten(text: str) -> str:
    return escape(text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]} ..")


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5d6675; --paper: #fff; --track: #e9ecf1;
  --predicted: #3f74c8; --target: #2f9e62; --mark: #1d2330; --problem: #a03030; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #9ba4b3; --paper: #15181e; --track: #2a2f38;
  --predicted: #6f9fe8; --target: #4fbf85; --mark: #fff; --problem: #f08c8c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 52rem; margin: 2rem auto; padding: 0 1.25rem; }
article, .problem, .note, th small { overflow-wrap: anywhere; }
h1 { margin-bottom: 0; } h2 { margin: 2.5rem 0 0.5rem; } h3 { margin: 1.5rem 0 0.5rem; font-size: 1rem; }
p { margin: 0.25rem 0; } small { display: block; font-weight: normal; color: var(--soft); line-height: 1.2; }
.problem { color: var(--problem); } .note, .legend, .times { color: var(--soft); }
svg { display: block; width: 100%; overflow: visible; font-size: 12px; }
text { fill: var(--soft); } .track { fill: var(--track); } .predicted { fill: var(--predicted); }
.target { fill: var(--target); } .axis { stroke: var(--soft); } .mark { stroke: var(--mark); stroke-width: 2; }
.timeline, .histogram { width: calc(100% - 2rem); margin: 0.5rem 1rem; }
.key { display: inline-block; width: 1rem; height: 0.7rem; margin-left: 0.75rem; }
.key:first-child { margin-left: 0; } .key.mark { width: 2px; height: 1rem; vertical-align: middle; }
.key.predicted { background: var(--predicted); } .key.target { background: var(--target); }
.key.track { background: var(--track); } .key.mark { background: var(--mark); }
table { border-collapse: collapse; width: 100%; } td, th { padding: 0.2rem 0.5rem; text-align: right; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; } th:first-child { text-align: left;
  padding-left: 0; max-width: 14rem; }
thead th { font-weight: normal; color: var(--soft); } td.plot, th.plot { width: 45%; padding: 0.2rem 1rem; }
article { margin: 0 0 1.25rem; } blockquote { margin: 0.25rem 0; padding-left: 0.75rem; white-space: pre-line;
  border-left: 3px solid var(--track); }
@media (max-width: 40rem) { small, .count { display: none; } td, th { padding: 0.2rem 0.25rem; }
  td.plot, th.plot { width: 45%; padding: 0.2rem 0.75rem; } th { font-size: 0.8rem; } }
"""
