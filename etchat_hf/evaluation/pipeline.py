"""Answering rows group by group, while the videos of the next groups are decoded."""

import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..clip_encoder import ClipEncoder, DecodedClip
from ..modeling_etchat import ETChatForConditionalGeneration
from ..processing_etchat import EncodedClip, ETChatProcessor
from ..video_processing_etchat import ETChatVideoProcessor
from .answering import Prompt, answer_batch, write_prompt
from .clips import default_workers, find_video, read_ahead, reason_of, sample_video
from .plan import Batch, Group
from .tasks import Request


@dataclass(frozen=True)
class Settings:
    """How answers are generated.

    Attributes:
        batch_size: The most rows answered at once.
        max_new_tokens: Longest answer; it ends earlier where the model's context does.
        sample: Sample at temperature 0.2 instead of taking the likeliest token.
        seed: Of the sampling; each row's draws depend on it and the row's position alone.
        fps: Frames sampled per second; None as the model was trained.
        max_frames: Lowers the rate of longer videos to so many frames.
        decode_workers: Processes that decode videos ahead of the model.
    """

    batch_size: int = 8
    max_new_tokens: int = 2048
    sample: bool = False
    seed: int = 0
    fps: float | None = None
    max_frames: int | None = None
    decode_workers: int = default_workers()

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens", "decode_workers", "max_frames", "fps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


class Clock:
    """Tells the time the model works from the time that passes."""

    def __init__(self):
        self.model_seconds = self.wall_seconds = 0.0
        self._start = time.perf_counter()

    def __enter__(self):
        self._begun = time.perf_counter()

    def __exit__(self, *_):
        self.model_seconds += time.perf_counter() - self._begun

    def stop(self) -> None:
        """Takes the time that has passed since the beginning."""
        self.wall_seconds = time.perf_counter() - self._start


class Pipeline:
    """Answers groups of batches with a model that waits for nothing but its own work.

    Args:
        model, processor, encoder, settings: See `runner.infer`.
        requests: What each row asks, by its position.
        videos: Folder of the videos.
    """

    def __init__(
        self,
        model: ETChatForConditionalGeneration,
        processor: ETChatProcessor,
        encoder: ClipEncoder,
        requests: dict[int, Request],
        videos: Path,
        settings: Settings,
    ):
        self.model = model
        self.processor = processor
        self.encoder = encoder
        self.requests = requests
        self.settings = settings
        self.read = partial(_decode, encoder, processor.video_processor, videos, settings)
        self.clock = Clock()

    def answer(self, groups: Sequence[Group]) -> Iterator[list[dict]]:
        """Answers groups of batches of rows, those of one video in one group; yields records for the journal."""
        keys = [self._videos_of(group) for group in groups]
        clips = read_ahead(
            self.read, [key for part in keys for key in part], self.settings.batch_size, self.settings.decode_workers
        )
        for group, group_keys in zip(groups, keys, strict=True):
            found: dict[Hashable, EncodedClip] = {}
            errors: dict[Hashable, str] = {}
            for key in group_keys:
                clip = next(clips)
                if isinstance(clip, str):
                    errors[key] = clip
                    continue
                try:
                    with self.clock:
                        found[key] = self._encode(key, clip)
                except (OSError, ValueError) as error:
                    errors[key] = reason_of(error)
                except torch.OutOfMemoryError as error:
                    errors[key] = f"out of memory: {reason_of(error)}"
            for batch in group:
                yield from self._answer_batch(batch, found, errors)
        self.clock.stop()

    def _videos_of(self, group: Group) -> list[Hashable]:
        return list(dict.fromkeys(video_of(self.requests[row]) for batch in group for row in batch))

    def _encode(self, key: Hashable, clip: DecodedClip) -> EncodedClip:
        try:
            return self.encoder.encode(clip)
        except FileNotFoundError:  # its features were deleted since it was looked for
            return self.encoder.encode(self.read(key))

    def _answer_batch(
        self, batch: Batch, found: dict[Hashable, EncodedClip], errors: dict[Hashable, str]
    ) -> Iterator[list[dict]]:
        prompts: dict[int, Prompt] = {}
        failed = []
        for row in batch:
            key = video_of(self.requests[row])
            if key in errors:
                failed.append({"row": row, "error": errors[key]})
                continue
            try:
                prompts[row] = self._write_prompt(row, found[key])
            except ValueError as error:
                failed.append({"row": row, "error": reason_of(error)})
        if failed:
            yield failed
        if prompts:
            with self.clock:
                records = self._generate(prompts, found)
            yield records

    def _write_prompt(self, row: int, clip: EncodedClip) -> Prompt:
        seed = (self.settings.seed, row) if self.settings.sample else None
        return write_prompt(
            self.processor, self.model.config, self.requests[row], clip, self.settings.max_new_tokens, seed
        )

    def _generate(self, prompts: dict[int, Prompt], found: dict[Hashable, EncodedClip]) -> list[dict]:
        keys = list(dict.fromkeys(video_of(self.requests[row]) for row in prompts))
        try:
            answers = answer_batch(
                self.model,
                self.processor,
                list(prompts.values()),
                [keys.index(video_of(self.requests[row])) for row in prompts],
                [found[key].frame_times for key in keys],
                torch.cat([found[key].vision_features for key in keys]),
            )
        except torch.OutOfMemoryError as error:
            if len(prompts) == 1:
                return [{"row": row, "error": f"out of memory: {reason_of(error)}"} for row in prompts]
            tqdm.write(f"out of memory with {len(prompts)} rows; answering them one by one", file=sys.stderr)
            answers = None
        if answers is None:  # outside of the handler, whose traceback would keep the failed attempt's memory
            return [record for row in prompts for record in self._generate({row: prompts[row]}, found)]
        return [{"row": row, **asdict(answer)} for row, answer in zip(prompts, answers, strict=True)]


def _decode(
    encoder: ClipEncoder, video_processor: ETChatVideoProcessor, folder: Path, settings: Settings, key: Hashable
) -> DecodedClip:
    names, segment = key
    path = find_video(folder, names)
    return encoder.decode(sample_video(video_processor, path, segment, settings.fps, settings.max_frames))


def video_of(request: Request) -> Hashable:
    """What rows that are shown the same frames have in common."""
    return request.videos, request.segment
