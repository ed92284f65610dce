"""Looks a stage's data over before a run: are the files there, can they be read, what is left after the filters."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from etchat_hf.data.annotations import AnnotationFile
from etchat_hf.data.config_file import fit_types, read_config, type_hints
from etchat_hf.data.dataset import UNREADABLE, SourceRows
from etchat_hf.data.media import locate, opened_clip
from etchat_hf.data.rows import MODALITIES, check_clip, modality_of, read_times, read_turns
from etchat_hf.data.stages import STAGES, DataSource, ETChatDataArguments, StageData
from etchat_hf.video_decoding_etchat import open_video

SHOWN_PROBLEMS = 10


@dataclass
class SourceCheck:
    """What was found out about one [`DataSource`]: rows per file, per modality after filters, and what is wrong."""

    source: DataSource
    rows: int = 0
    kept: Counter = field(default_factory=Counter)
    opened: int = 0
    problems: list[str] = field(default_factory=list)

    def report(self, shown: int | None = SHOWN_PROBLEMS) -> str:
        """Lines for people, with so many of the problems; `None`: all."""
        kept = ", ".join(f"{self.kept[name]} {name}" for name in MODALITIES if self.kept[name]) or "none"
        roots = {"images": self.source.image_root, "videos": self.source.video_root}
        media = [f"{name} under {root}" for name, root in roots.items() if root is not None]
        lines = [
            self.source.annotations,
            f"  rows {self.rows}, after filters {self.kept.total()} ({kept})",
            f"  {', '.join([*media, f'{self.opened} opened'])}",
            f"  problems: {len(self.problems)}",
            *(f"    {problem}" for problem in self.problems[:shown]),
        ]
        hidden = len(self.problems[shown:]) if shown is not None else 0
        return "\n".join(lines + ([f"    and {hidden} more; --all shows them"] if hidden else []))


def read_arguments(stage_or_config: str, data_root: str | None = None) -> ETChatDataArguments:
    """
    A published stage by name, or what a training configuration says about data.

    Raises:
        FileNotFoundError: if there is no such configuration.
        ValueError: if it is not valid, naming the file and the option.
    """
    if stage_or_config in STAGES:
        values = {"stage": stage_or_config}
    elif not Path(stage_or_config).is_file():
        raise FileNotFoundError(f"{stage_or_config}: neither a stage ({', '.join(STAGES)}) nor a YAML file.")
    else:
        hints = type_hints(ETChatDataArguments)
        config = {name: value for name, value in read_config(stage_or_config).items() if name in hints}
        values = fit_types(config, hints, stage_or_config)
    return ETChatDataArguments(**values | ({} if data_root is None else {"data_root": data_root}))


def check_stage(stage: StageData, num_opened: int = 50, progress: Callable = iter) -> list[SourceCheck]:
    """
    Checks that annotations and media are there, checks every row, and opens some media.

    Args:
        stage ([`StageData`]): with paths.
        num_opened (`int`): images and videos opened per source, chosen at random.
        progress: wraps the iterator over rows.

    Raises:
        ValueError: for a negative `num_opened`.
    """
    if num_opened < 0:
        raise ValueError(f"opened is {num_opened}; it must not be negative.")
    return [_check_source(source, stage.use_matching, num_opened, progress) for source in stage.sources]


def _check_source(source: DataSource, use_matching: bool, num_opened: int, progress: Callable) -> SourceCheck:
    check = SourceCheck(source)
    try:
        rows = SourceRows(source)
    except (ValueError, OSError) as error:
        check.problems.append(str(error))
        return check
    check.rows = rows.num_before_filters
    check.kept.update(MODALITIES[kind] for kind in rows.modality.tolist())
    if not len(rows):
        check.problems.append("no row passes the filters")
    missing = rows.missing_roots()
    check.problems += missing.values()
    try:
        sound = _check_rows(rows, use_matching, missing, check.problems, progress)
    except (ValueError, OSError) as error:  # of a whole file
        check.problems.append(str(error))
        return check
    for position in sorted(random.Random(0).sample(sound, min(num_opened, len(sound)))):
        check.opened += 1
        if (problem := _reading_problem(rows, position)) is not None:
            check.problems.append(f"{rows.describe(position)}: {problem}")
    return check


def _check_rows(
    rows: SourceRows, use_matching: bool, missing: Iterable[str], problems: list[str], progress: Callable
) -> list[int]:
    """Positions of the sound rows whose media can be opened; what is wrong with the others goes to `problems`."""
    known: dict[str, str | None] = {}  # what is wrong with each file, by name
    sound = []
    for position, (file, row) in enumerate(progress(_kept_rows(rows))):
        if isinstance(row, ValueError):
            problems.append(f"{rows.describe(position)}: {row}")
            continue
        modality = modality_of(row)
        try:
            _check_row(row, use_matching)
            if modality != "text" and modality not in missing and not file.is_packed:
                if (name := str(row[modality])) not in known:
                    known[name] = _absence(rows.source, modality, row[modality])
                if known[name] is not None:
                    raise ValueError(known[name])
        except ValueError as error:
            problems.append(f"{rows.describe(position)} (id {row.get('id')}): {error}")
        else:
            sound += [position] if modality != "text" and modality not in missing else []
    return sound


def _kept_rows(rows: SourceRows) -> Iterator[tuple[AnnotationFile, dict | ValueError]]:
    """The rows that pass the filters, in their order in the source."""
    for number, file in enumerate(rows.files):
        kept = set(rows.row_of[rows.file_of == number].tolist())
        yield from ((file, row) for position, row in enumerate(file.read_all()) if position in kept)


def _check_row(row: dict, use_matching: bool) -> None:
    turns = read_turns(row)
    check_clip(row, turns)
    read_times(row, turns, use_matching)


def _absence(source: DataSource, modality: str, name: str) -> str | None:
    """Why a row's media cannot be found; behind URLs only those that are opened are looked for."""
    root = source.image_root if modality == "image" else source.video_root
    try:
        locate(root, name)
    except UNREADABLE as error:
        return str(error)
    return None


def _reading_problem(rows: SourceRows, position: int) -> str | None:
    try:
        row, media = rows.read(position)
        if media is not None:
            is_image = modality_of(row) == "image"
            with opened_clip(media, is_image, square_colour=None) as clip:
                if not is_image:  # an image has been decoded by now
                    next(open_video(clip).read([0]))
    except UNREADABLE as error:
        return str(error)
    return None
