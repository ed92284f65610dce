"""Looks a stage's data over before a run: are the files there, can they be read, what is left after the filters."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from etchat_hf.data.annotations import AnnotationFile
from etchat_hf.data.dataset import UNREADABLE, SourceRows
from etchat_hf.data.media import HUB_PREFIX, locate, opened_clip
from etchat_hf.data.rows import MODALITIES, check_clip, modality_of, read_times, read_turns
from etchat_hf.data.stages import STAGES, DataSource, ETChatDataArguments, StageData
from etchat_hf.video_decoding_etchat import open_video
from etchat_hf.video_processing_etchat import load_picture

SHOWN_PROBLEMS = 10


@dataclass
class SourceCheck:
    """What was found out about one [`DataSource`]: rows per file, per modality after filters, and what is wrong."""

    source: DataSource
    rows: int = 0
    kept: Counter = field(default_factory=Counter)
    opened: int = 0
    problems: list[str] = field(default_factory=list)

    def report(self) -> str:
        kept = ", ".join(f"{self.kept[name]} {name}" for name in MODALITIES if self.kept[name]) or "none"
        lines = [
            self.source.annotations,
            f"  rows {self.rows}, after filters {self.kept.total()} ({kept})",
            f"  images under {self.source.image_root}, videos under {self.source.video_root}; {self.opened} opened",
            f"  problems: {len(self.problems)}",
            *(f"    {problem}" for problem in self.problems[:SHOWN_PROBLEMS]),
        ]
        hidden = len(self.problems) - SHOWN_PROBLEMS
        return "\n".join(lines + ([f"    and {hidden} more"] if hidden > 0 else []))


def read_stage(stage_or_config: str, data_root: str | None = None) -> StageData:
    """
    A published stage by name, or what a training configuration says about data.

    Raises:
        FileNotFoundError, ValueError: as [`ETChatDataArguments.resolve`]; also if there is no such configuration.
    """
    if stage_or_config in STAGES:
        values = {"stage": stage_or_config}
    else:
        if not Path(stage_or_config).is_file():
            raise FileNotFoundError(f"{stage_or_config}: neither a stage ({', '.join(STAGES)}) nor a YAML file.")
        try:
            content = yaml.safe_load(Path(stage_or_config).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{stage_or_config}: not valid YAML ({' '.join(str(error).split())}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"{stage_or_config}: not a mapping of option: value.")
        known = {option.name for option in fields(ETChatDataArguments)}
        values = {name: value for name, value in content.items() if name in known}
    return ETChatDataArguments(**values | ({} if data_root is None else {"data_root": data_root})).resolve()


def check_stage(stage: StageData, num_opened: int = 50, progress: Callable = iter) -> list[SourceCheck]:
    """
    Checks every row, that every file is there, and opens some.

    Args:
        stage ([`StageData`]): with paths.
        num_opened (`int`): images and videos opened per source, chosen at random.
        progress: wraps the iterator over rows.

    Raises:
        FileNotFoundError, ValueError: for annotations that are missing or malformed.
    """
    return [_check_source(source, stage.use_matching, num_opened, progress) for source in stage.sources]


def _check_source(source: DataSource, use_matching: bool, num_opened: int, progress: Callable) -> SourceCheck:
    rows = SourceRows(source)
    check = SourceCheck(source, rows.num_before_filters)
    check.kept.update(MODALITIES[kind] for kind in rows.modality.tolist())
    if not len(rows):
        check.problems.append("no row passes the filters")
    known: dict[str, str | None] = {}  # what is wrong with each file, by name
    sound = []
    for position, (file, row) in enumerate(progress(_kept_rows(rows))):
        modality = modality_of(row)
        try:
            _check_row(row, use_matching)
            if modality != "text" and not file.is_packed:
                if (name := str(row[modality])) not in known:
                    known[name] = _absence(source, modality, row[modality])
                if known[name] is not None:
                    raise ValueError(known[name])
        except ValueError as error:
            check.problems.append(f"{rows.describe(position)} (id {row.get('id')}): {error}")
        else:
            sound += [position] if modality != "text" else []
    for position in sorted(random.Random(0).sample(sound, min(num_opened, len(sound)))):
        check.opened += 1
        if (problem := _reading_problem(rows, position)) is not None:
            check.problems.append(f"{rows.describe(position)}: {problem}")
    return check


def _kept_rows(rows: SourceRows) -> Iterator[tuple[AnnotationFile, dict]]:
    """The rows that pass the filters, in their order in the source."""
    for number, file in enumerate(rows.files):
        kept = set(rows.row_of[rows.file_of == number].tolist())
        yield from ((file, row) for position, row in enumerate(file.read_all()) if position in kept)


def _check_row(row: dict, use_matching: bool) -> None:
    turns = read_turns(row)
    check_clip(row, turns)
    read_times(row, turns, use_matching)


def _absence(source: DataSource, modality: str, name: str) -> str | None:
    """Why a row's media cannot be found; on the Hub only those that are opened are looked for."""
    root = source.image_root if modality == "image" else source.video_root
    if root is not None and root.startswith(HUB_PREFIX):
        return None
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
                load_picture(clip) if is_image else next(open_video(clip).read([0]))
    except UNREADABLE as error:
        return str(error)
    return None
