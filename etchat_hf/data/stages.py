"""The training stages as data: which annotations, which folders, which filters."""

import glob
import math
import os
from dataclasses import dataclass, field, replace

from etchat_hf.chat_templates import CONV_TYPES, load_chat_template


@dataclass(frozen=True)
class DataSource:
    """
    One set of annotations and where its clips are.

    Args:
        annotations (`str`): a JSON array, JSON Lines or parquet file; a glob of such; an `hf://datasets/...` URL of
            one; a Hub dataset id.
        image_root, video_root (`str`, *optional*): folder that the rows' `image` and `video` are relative to, or a
            URL (`hf://datasets/owner/name/folder`, `https://...`); none may lead out of it. Not needed for rows that
            carry their own media (`etchat pack`) or name them by `http://`, `https://` or `hf://` URLs.
        weight (`float`, *optional*, defaults to 1): times that each row is seen per epoch; 0.5 draws another half of
            the rows each epoch.
        min_duration, max_duration (`float`, *optional*): limits in seconds; rows without `duration` pass.
        max_words (`int`, *optional*): the most space-separated words of the first answer.

    Raises:
        ValueError: for a weight, limit or pair of limits that no row could satisfy.
    """

    annotations: str
    image_root: str | None = None
    video_root: str | None = None
    weight: float = 1.0
    min_duration: float | None = None
    max_duration: float | None = None
    max_words: int | None = None

    def __post_init__(self):
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"{self.annotations}: weight is {self.weight}; it must be a positive number.")
        for name in ("min_duration", "max_duration", "max_words"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{self.annotations}: {name} is {value}; it must not be negative.")
        if None not in (self.min_duration, self.max_duration) and self.min_duration > self.max_duration:
            raise ValueError(
                f"{self.annotations}: min_duration ({self.min_duration}) is above max_duration ({self.max_duration})."
            )


@dataclass(frozen=True)
class StageData:
    """
    What a stage trains on.

    Args:
        sources (`tuple` of [`DataSource`]): mixed by their weights.
        conv_type (`str`): one of `etchat_hf.chat_templates.CONV_TYPES`.
        use_matching (`bool`): whether rows hold `<vid>` with times in `src` and `tgt`.
        pad_to_square (`bool`): pad images, not videos, to a square with the mean colour before resizing.
        fps (`float`): frames sampled per second of video.
        group_by_modality (`bool`): whether a global batch holds only text, only images or only videos.
    """

    sources: tuple[DataSource, ...]
    conv_type: str = "phi3"
    use_matching: bool = False
    pad_to_square: bool = False
    fps: float = 1.0
    group_by_modality: bool = False

    def __post_init__(self):
        if not self.sources:
            raise ValueError("A stage needs at least one data source.")
        if self.conv_type not in CONV_TYPES:
            raise ValueError(f"conv_type is {self.conv_type!r}; it must be one of {', '.join(CONV_TYPES)}.")
        if not self.fps > 0:
            raise ValueError(f"fps is {self.fps}; it must be greater than 0.")

    def configure(self, processor) -> None:
        """Gives an `ETChatProcessor` the stage's chat template and frame rate, which are saved with it."""
        processor.chat_template = load_chat_template(self.conv_type)
        processor.video_processor.fps = self.fps
        processor.video_processor.num_frames = None

    def under(self, data_root: str) -> "StageData":
        """
        The stage with its file and folder names turned into paths.

        Annotation files are looked for in `data_root` and in the folders directly in it. One that is in neither place
        gets its path in `data_root`, and is missed when it is opened.
        """
        return replace(self, sources=tuple(_source_under(source, data_root) for source in self.sources))


def _source_under(source: DataSource, data_root: str) -> DataSource:
    places = [os.path.join(data_root, source.annotations), os.path.join(data_root, "*", source.annotations)]
    found = [path for place in places for path in sorted(glob.glob(place))]
    roots = {
        name: os.path.join(data_root, folder)
        for name in ("image_root", "video_root")
        if (folder := getattr(source, name)) is not None
    }
    return replace(source, annotations=(found or places)[0], **roots)


_STAGE1 = DataSource("llava_558k_with_webvid.json", "llava_pretrain/images", "webvid/videos")
_STAGE2 = DataSource(
    "llava_v1_5_mix665k_with_video_chatgpt.json", "llava_instruct", "video_chatgpt", max_duration=350.0
)
_STAGE3 = DataSource(
    "et_instruct_164k_vid.json",
    video_root="et_instruct_164k/videos",
    min_duration=5.0,
    max_duration=350.0,
    max_words=200,
)
_STAGE3_TXT = replace(_STAGE3, annotations="et_instruct_164k_txt.json")

STAGES = {
    "stage1": StageData((_STAGE1,), conv_type="plain"),
    "stage2": StageData((_STAGE2,), pad_to_square=True, group_by_modality=True),
    "stage3": StageData((_STAGE3,), use_matching=True),
    "stage2_3": StageData((_STAGE2, _STAGE3), use_matching=True, pad_to_square=True, group_by_modality=True),
    "stage3_txt": StageData((_STAGE3_TXT,)),
}


@dataclass
class ETChatDataArguments:
    """
    The part of a training configuration that is about data: a published stage, or one's own annotations, with the
    settings of `stage` if that is given too. Fields left at `None` keep what the stage says, or else [`StageData`].
    """

    stage: str | None = field(default=None, metadata={"help": f"Published stage: {', '.join(STAGES)}."})
    data_root: str = field(default="data", metadata={"help": "Folder that holds the stage's files."})
    annotations: list[str] | None = field(
        default=None,
        metadata={"help": "Own annotations instead of the stage's: files, globs, hf:// URLs or Hub dataset ids."},
    )
    eval_annotations: list[str] | None = field(
        default=None, metadata={"help": "Annotations to evaluate on, with the media folders of those of training."}
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "Times that each row of each of the annotations is seen per epoch."}
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder or URL of the own annotations' images."})
    video_root: str | None = field(default=None, metadata={"help": "Folder or URL of the own annotations' videos."})
    min_duration: float | None = field(default=None, metadata={"help": "Shortest video, in seconds."})
    max_duration: float | None = field(default=None, metadata={"help": "Longest video, in seconds."})
    max_words: int | None = field(default=None, metadata={"help": "Most words of the first answer."})
    conv_type: str | None = field(default=None, metadata={"help": f"Prompt format: {', '.join(CONV_TYPES)}."})
    use_matching: bool | None = field(default=None, metadata={"help": "Whether rows hold <vid> with times."})
    pad_to_square: bool | None = field(default=None, metadata={"help": "Pad images to squares."})
    fps: float | None = field(default=None, metadata={"help": "Frames sampled per second of video."})
    group_by_modality: bool | None = field(default=None, metadata={"help": "One modality per global batch."})
    max_length: int = field(default=2048, metadata={"help": "Longest sequence, in tokens; longer answers are cut."})
    max_failure_rate: float = field(
        default=0.05, metadata={"help": "Share of unreadable samples above which the run stops."}
    )

    def resolve(self) -> StageData:
        """
        The stage with paths and overrides in place.

        Raises:
            ValueError: for an unknown stage, nothing to train on, or options that exclude each other.
        """
        if self.stage is None and not self.annotations:
            raise ValueError("Nothing to train on: set stage, annotations, or both.")
        if self.stage is not None and self.stage not in STAGES:
            raise ValueError(f"stage is {self.stage!r}; it must be one of {', '.join(STAGES)}.")
        filters = self._given("min_duration", "max_duration", "max_words")
        if self.annotations:
            sources = self._own_sources()
            stage = replace(STAGES[self.stage], sources=sources) if self.stage else StageData(sources)
        elif self.weights or self.image_root or self.video_root:
            raise ValueError("weights, image_root and video_root belong to annotations, which are not set.")
        else:
            stage = STAGES[self.stage].under(self.data_root)
        sources = tuple(replace(source, **filters) for source in stage.sources)
        options = self._given("conv_type", "use_matching", "pad_to_square", "fps", "group_by_modality")
        return replace(stage, sources=sources, **options)

    def resolve_evaluation(self) -> StageData | None:
        """The stage with `eval_annotations` for its annotations, or `None` without these; raises as `resolve`."""
        if not self.eval_annotations:
            return None
        stage = self.resolve()
        sources = tuple(replace(stage.sources[-1], annotations=path, weight=1.0) for path in self.eval_annotations)
        return replace(stage, sources=sources)

    def _given(self, *names: str) -> dict:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _own_sources(self) -> tuple[DataSource, ...]:
        weights = self.weights or [1.0] * len(self.annotations)
        if len(weights) != len(self.annotations):
            raise ValueError(f"{len(weights)} weights for {len(self.annotations)} annotations; give one for each.")
        # A stage's own data share its filters
        filters = STAGES[self.stage].sources[-1] if self.stage else DataSource("")
        return tuple(
            replace(filters, annotations=path, weight=weight, image_root=self.image_root, video_root=self.video_root)
            for path, weight in zip(self.annotations, weights, strict=True)
        )
