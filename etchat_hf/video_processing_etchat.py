"""Turning videos, images and frames into what the model sees: pixel values, and the second each frame belongs to."""

import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypedDict

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import torch
import torch.nn.functional as F
from transformers.feature_extraction_utils import BatchFeature
from transformers.video_processing_utils import VideoProcessorMixin

from .video_decoding_etchat import (
    BACKENDS,
    Source,
    VideoReader,
    check_counts,
    check_positive,
    is_source,
    is_torchcodec_decoder,
    one_line,
    open_video,
    rate_and_duration,
    sample_frame_indices,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Image formats of which a file can also be a clip.
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP")

# What transformers writes into a configuration file beside the constructor's arguments.
SERVICE_KEYS = {
    "auto_map",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "video_processor_type",
}

# Exif's field for the camera's position, and its values that swap width and height.
ORIENTATION = 0x0112
LYING = (5, 6, 7, 8)

# This many pictures wait for being resized while the next ones are decoded.
LOOK_AHEAD = 2

Picture = str | os.PathLike | bytes | BinaryIO | Mapping[str, Any] | PIL.Image.Image | np.ndarray | torch.Tensor
Clip = Picture | Sequence[Picture]


@dataclass(eq=False)
class SampledClip:
    """A clip of which it is known what to decode: opened and sampled.

    Args:
        content: what was opened, with a `Source` for each file, URL, or bytes; a list of such for a list of images.
        reader (`VideoReader`): decodes it.
        frame_indices (`np.ndarray`, int64 (T,)): numbers of the sampled frames in the source.
        frame_times (`list` of `float`): seconds of each since the clip's first frame.
        metadata (`dict`): the entry of `video_metadata`; see `ETChatVideoProcessor.preprocess`.
    """

    content: Any
    reader: VideoReader
    frame_indices: np.ndarray
    frame_times: list[float]
    metadata: dict[str, Any]

    @property
    def duration(self) -> float:
        """Seconds of the source; 0 for an image."""
        return self.metadata["duration"]


class ETChatVideoProcessorKwargs(TypedDict, total=False):
    """The constructor's arguments, all of which `from_pretrained` can override."""

    size: int | dict[str, int]
    image_mean: Sequence[float]
    image_std: Sequence[float]
    fps: float | None
    num_frames: int | None
    max_frames: int | None
    do_sample_frames: bool
    pad_to_square: bool
    decoder: str | None


class ETChatVideoProcessor(VideoProcessorMixin):
    """Decodes, samples, resizes, crops and normalises the frames of clips; does not need torchvision.

    Args:
        size: side of the square frames in pixels; also accepted as `{"shortest_edge": s}` or
            `{"height": s, "width": s}`.
        image_mean, image_std: per RGB channel, of pixels in [0, 1].
        fps: frames sampled per second of video; `None` means 1.0 where `num_frames` is not set.
        num_frames: frames sampled per clip, evenly over all of it, instead of `fps`; a clip of fewer repeats some.
        max_frames: the most frames per clip; the sampling rate of longer ones is lowered, with a warning.
        do_sample_frames: `False` takes every frame of every clip.
        pad_to_square: pad frames to a square with the mean colour instead of cropping what is outside of one.
        decoder: "pyav", "torchcodec", "decord", or `None` for the first of these that is installed and reads the
            file.

    Raises:
        ValueError: a value is impossible, or both `fps` and `num_frames` are set.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = ETChatVideoProcessorKwargs

    def __init__(
        self,
        size: int | dict[str, int] = 224,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        fps: float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        do_sample_frames: bool = True,
        pad_to_square: bool = False,
        decoder: str | None = None,
        **kwargs: Any,
    ):
        unknown = kwargs.keys() - SERVICE_KEYS
        if unknown:
            raise TypeError(f"ETChatVideoProcessor has no argument {', '.join(sorted(unknown))}")
        super().__init__(**kwargs)
        if fps is not None and num_frames is not None:
            raise ValueError("fps and num_frames exclude each other; pass num_frames with fps=None")
        check_positive(fps=fps)
        check_counts(num_frames=num_frames, max_frames=max_frames)
        if len(image_mean) != 3 or len(image_std) != 3:
            raise ValueError(f"image_mean and image_std need three values each, not {image_mean} and {image_std}")
        if decoder is not None and decoder not in BACKENDS:
            raise ValueError(f"unknown decoder {decoder!r}; choose one of {', '.join(BACKENDS)}, or None")
        self.size = square_side(size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        # None values are not saved, so the default must not depend on one.
        self.fps = 1.0 if fps is None and num_frames is None else fps
        self.num_frames = num_frames
        self.max_frames = max_frames
        self.do_sample_frames = do_sample_frames
        self.pad_to_square = pad_to_square
        self.decoder = decoder

    def preprocess(
        self,
        videos: Clip | Sequence[Clip],
        fps: float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        do_sample_frames: bool | None = None,
        video_metadata: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """What `processor(videos, ...)` runs.

        Args:
            videos: a list of clips; what is not in a list is one clip. A clip is

                - a video, or an image (a clip of one frame), given as a path, as a URL (`https://`, `hf://`, or any
                  other that fsspec knows), as `bytes`, as a binary file object, or as `{"path": ..., "bytes": ...}`
                  (a row of an undecoded `datasets` column);
                - a `torchcodec.decoders.VideoDecoder` (a row of a decoded one): slower than undecoded rows, as all of
                  it is decoded once more for the frames' times;
                - a PIL image;
                - a uint8 array or tensor of RGB frames (T, H, W, 3) or (T, 3, H, W), or of one image (H, W, 3) or
                  (3, H, W); a last side of 3 is taken for the channels;
                - a list of images, each given in one of these ways, all of the same size.
            fps, num_frames, max_frames, do_sample_frames: replace the constructor's for this call; `fps` and
                `num_frames` each replace both.
            video_metadata: one entry per clip, `None` for videos and single images. Several frames that are not in a
                video need a time base: `{"fps": F}` (they are sampled as a video of that rate would be),
                `{"frame_times": [seconds, ...]}` (already sampled: fewer are taken only to satisfy `num_frames` or
                `max_frames`), or a transformers `VideoMetadata` with `fps`, and with `frames_indices` if the frames
                are already sampled. Times count from the first frame given, as in files: [10, 12] means [0, 2].
            return_tensors: "pt"; `None` means the same.

        Returns:
            A `BatchFeature` with

            - `pixel_values`: float32 tensor (frames of all clips, 3, size, size), normalised, clips one after another;
            - `frame_times`: per clip a list of its frames' times, in seconds since the clip's first frame. Lists, not
              tensors, so that casting the batch to bfloat16 leaves them exact;
            - `frame_indices`: per clip a list of the frame numbers that were sampled;
            - `video_metadata`: per clip a dict of `path`, `decoder`, `num_frames`, `average_fps` and `duration` (of
              the source, in seconds; 0.0 for an image), `sampled_fps`, `height`, `width`.

        Raises:
            FileNotFoundError: a file does not exist.
            OSError: a URL cannot be read.
            ValueError: a clip cannot be read, has an unsuitable shape or dtype, or lacks a time base; or an option is
                impossible.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors must be 'pt', not {return_tensors!r}: frames come as torch tensors")
        options = self._sampling_options(fps, num_frames, max_frames, do_sample_frames)
        clips = list(videos) if isinstance(videos, list | tuple) else [videos]
        if not clips:
            raise ValueError("videos is empty; pass at least one clip")
        metadata = [video_metadata] if isinstance(video_metadata, Mapping) else video_metadata
        metadata = [None] * len(clips) if metadata is None else list(metadata)
        if len(metadata) != len(clips):
            raise ValueError(f"video_metadata has {len(metadata)} entries for {len(clips)} clips; pass one per clip")
        sampled = [self._sample(clip, entry, options) for clip, entry in zip(clips, metadata, strict=True)]
        pictures = (picture for clip in sampled for picture in clip.reader.read(clip.frame_indices))
        count = sum(len(clip.frame_times) for clip in sampled)
        return BatchFeature(
            {
                "pixel_values": self._stacked(self._transformed(pictures), count),
                "frame_times": [clip.frame_times for clip in sampled],
                "frame_indices": [clip.frame_indices.tolist() for clip in sampled],
                "video_metadata": [clip.metadata for clip in sampled],
            }
        )

    def sample(
        self,
        clip: Clip | VideoReader,
        fps: float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        do_sample_frames: bool | None = None,
        video_metadata: Mapping[str, Any] | None = None,
    ) -> SampledClip:
        """Opens one clip and chooses its frames, without decoding them; arguments and errors as `iter_frames`'."""
        options = self._sampling_options(fps, num_frames, max_frames, do_sample_frames)
        return self._sample(clip, video_metadata, options)

    def iter_pixels(self, clip: SampledClip, chunk_size: int) -> Iterator[torch.Tensor]:
        """The pixel values of a sampled clip, `chunk_size` frames at a time: float32 (frames, 3, size, size)."""
        frames = self._transformed(clip.reader.read(clip.frame_indices))
        for start in range(0, len(clip.frame_times), chunk_size):
            yield self._stacked(frames, min(chunk_size, len(clip.frame_times) - start))

    def iter_frames(
        self,
        clip: Clip | VideoReader,
        chunk_size: int = 32,
        fps: float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        do_sample_frames: bool | None = None,
        video_metadata: Mapping[str, Any] | None = None,
    ) -> Iterator[BatchFeature]:
        """The frames of one clip of any length, without ever holding all of them.

        Args:
            clip: as in `preprocess`; or a reader from `open_video` or `open_clip`.
            chunk_size: frames per step.
            fps, num_frames, max_frames, do_sample_frames, video_metadata: as in `preprocess`.

        Yields:
            A `BatchFeature` per `chunk_size` frames (the last may have fewer): `pixel_values` float32 (frames, 3,
            size, size), and the lists `frame_times` (seconds) and `frame_indices` of these frames. Joined, the chunks
            equal what `preprocess` returns.

        Raises:
            FileNotFoundError, OSError, ValueError: as `preprocess`.
        """
        check_counts(chunk_size=chunk_size)
        sampled = self.sample(clip, fps, num_frames, max_frames, do_sample_frames, video_metadata)
        for number, pixels in enumerate(self.iter_pixels(sampled, chunk_size)):
            chunk = slice(number * chunk_size, number * chunk_size + len(pixels))
            yield BatchFeature(
                {
                    "pixel_values": pixels,
                    "frame_times": sampled.frame_times[chunk],
                    "frame_indices": sampled.frame_indices[chunk].tolist(),
                }
            )

    def _sampling_options(
        self, fps: float | None, num_frames: int | None, max_frames: int | None, do_sample_frames: bool | None
    ) -> dict[str, Any]:
        """`select_frames`' arguments: those of a call, completed by the constructor's."""
        check_positive(fps=fps)
        check_counts(num_frames=num_frames, max_frames=max_frames)
        if fps is not None and num_frames is not None:
            raise ValueError("fps and num_frames exclude each other; pass one of them")
        if fps is None and num_frames is None:
            fps, num_frames = self.fps, self.num_frames
        return {
            "fps": fps,
            "num_frames": num_frames,
            "max_frames": self.max_frames if max_frames is None else max_frames,
            "do_sample_frames": self.do_sample_frames if do_sample_frames is None else do_sample_frames,
        }

    def _sample(self, clip: Clip | VideoReader, metadata, options: dict[str, Any]) -> SampledClip:
        if isinstance(clip, VideoReader):
            content = reader = clip
        else:
            content = [as_source(picture) for picture in clip] if isinstance(clip, list | tuple) else as_source(clip)
            reader = open_clip(content, metadata, self.decoder)
        indices = select_frames(reader, **options)
        return SampledClip(content, reader, indices, reader.times[indices].tolist(), describe(reader, len(indices)))

    def _stacked(self, frames: Iterator[torch.Tensor], count: int) -> torch.Tensor:
        """The next `count` frames: float32 (count, 3, size, size)."""
        output = torch.empty(count, 3, self.size, self.size)
        for row in output:
            row.copy_(next(frames))
        return output

    def _transformed(self, pictures: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        """`_transform` of each picture, done in the background while the next ones are decoded."""
        with ThreadPoolExecutor(max_workers=1) as worker:
            waiting = deque()
            for picture in pictures:
                waiting.append(worker.submit(self._transform, picture))
                if len(waiting) > LOOK_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _transform(self, picture: np.ndarray) -> torch.Tensor:
        """uint8 RGB (height, width, 3) -> normalised float32 (3, size, size)."""
        if self.pad_to_square:
            picture = pad_to_square(picture, self.image_mean)
        height, width = picture.shape[:2]
        short, long = min(height, width), max(height, width)
        new_long = int(self.size * long / short)
        new_size = (self.size, new_long) if height <= width else (new_long, self.size)
        # Channels stay last in memory: the same numbers in a fraction of the time. torch takes no read-only arrays.
        picture = np.require(picture, requirements=["C_CONTIGUOUS", "WRITEABLE"])
        pixels = torch.from_numpy(picture).permute(2, 0, 1).float().div_(255)
        pixels = F.interpolate(pixels[None], size=new_size, mode="bilinear", align_corners=False, antialias=True)[0]
        top, left = (int((side - self.size) / 2) for side in new_size)
        pixels = pixels[:, top : top + self.size, left : left + self.size]
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return (pixels - mean) / std


class FrameSequence(VideoReader):
    """A clip of separate pictures: in memory, or one image file each.

    Args:
        pictures: see `load_picture`; all must have the same size.
        times: float64 (len(pictures),) seconds, the first 0.
        fps: the constant rate of a clip that is still to be sampled; `None` for frames that already are.
        path: the path or URL of the image, if the clip is one.
    """

    def __init__(self, pictures: Sequence[Picture], times: np.ndarray, fps: float | None, path: str | None = None):
        self.path, self.name = path, path or "<frames>"
        self.backend = "memory" if path is None else "pillow"
        self.num_frames = len(pictures)
        self.times = times
        self.already_sampled = fps is None
        if fps is None and len(pictures) == 1:
            self.average_fps = self.duration = 0.0  # an image takes no time
        else:
            self.average_fps, self.duration = rate_and_duration(times, fps)
        # File objects that cannot seek are read once only.
        self._pictures = [as_source(picture) for picture in pictures]
        self.height, self.width = picture_size(self._pictures[0])

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in self.check_indices(indices).tolist():
            picture = load_picture(self._pictures[index])
            if picture.shape[:2] != (self.height, self.width):
                raise ValueError(
                    f"frame {index} is {picture.shape[1]} x {picture.shape[0]} pixels, the first one "
                    f"{self.width} x {self.height}; the frames of a clip must have one size"
                )
            yield picture


def open_clip(clip: Clip, metadata: Mapping[str, Any] | None, decoder: str | None) -> VideoReader:
    """A reader for any clip; see `ETChatVideoProcessor.preprocess`."""
    clip = as_source(clip)
    if isinstance(clip, Source) or is_torchcodec_decoder(clip):
        reader = open_file(clip, decoder)
        if metadata is not None:
            raise ValueError(f"{reader.name}: this clip has its own time base; pass None as its video_metadata")
        return reader
    if isinstance(clip, PIL.Image.Image):
        pictures = [clip]
    elif isinstance(clip, np.ndarray | torch.Tensor):
        pictures = clip if clip.ndim == 4 else clip[None]
    elif isinstance(clip, list | tuple):
        pictures = clip
    else:
        raise ValueError(
            f"a clip cannot be a {type(clip).__name__}; pass a path, a URL, bytes, a file, an image, an array or a "
            "list of images"
        )
    if len(pictures) == 0:
        raise ValueError("a clip without frames; pass at least one")
    return FrameSequence(pictures, *time_base(len(pictures), metadata))


def open_file(source: Any, decoder: str | None) -> VideoReader:
    """A reader for the video or image in a `Source`, or for a torchcodec decoder."""
    if isinstance(source, Source) and is_image(source):
        return FrameSequence([source], np.zeros(1), None, path=source.path)
    return open_video(source, decoder)


def time_base(num_frames: int, metadata: Mapping[str, Any] | None) -> tuple[np.ndarray, float | None]:
    """Seconds of the frames since the first, and their rate if they are a whole video that is still to be sampled."""
    entries = {key: value for key, value in dict(metadata or {}).items() if value is not None}
    fps = entries.get("fps")
    check_positive(fps=fps)
    if "frame_times" in entries:
        times = as_seconds(entries["frame_times"])
        fps = None
    elif "frames_indices" in entries and fps is not None:
        times = as_seconds(entries["frames_indices"]) / fps
        fps = None
    elif fps is not None:
        times = np.arange(num_frames) / fps
    elif num_frames == 1:
        times = np.zeros(1)
    else:
        raise ValueError(
            f"{num_frames} frames without a time base; pass video_metadata={{'fps': ...}} or "
            "{'frame_times': [seconds, ...]}"
        )
    if times.shape != (num_frames,):
        raise ValueError(f"{num_frames} frames but times of shape {times.shape}; pass one time per frame")
    if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise ValueError("frame times must be finite and ascend from frame to frame")
    return times - times[0], fps


def as_seconds(values: Any) -> np.ndarray:
    """Numbers as float64; ValueError if they are none."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"frame times must be numbers, not {values!r:.80}") from error


def select_frames(
    reader: VideoReader,
    fps: float | None,
    num_frames: int | None,
    max_frames: int | None,
    do_sample_frames: bool = True,
) -> np.ndarray:
    """`sample_frame_indices` for a clip: int64 (n,). An image stays one frame, and sampled frames are not repeated.

    Warns where `max_frames` makes the frames fewer.
    """
    if not do_sample_frames:
        return np.arange(reader.num_frames)
    wanted = select_without_limit(reader, fps, num_frames)
    if max_frames is None or len(wanted) <= max_frames:
        return wanted
    rate = fps or len(wanted) / reader.duration
    warnings.warn(
        f"{reader.name}: {len(wanted)} frames at {rate:.3g} fps are more than max_frames={max_frames}; sampling at "
        f"{max_frames / reader.duration:.3g} fps instead",
        stacklevel=2,
    )
    if is_sampled(reader):
        return sample_frame_indices(
            reader.num_frames, reader.average_fps, num_frames_wanted=max_frames, times=reader.times
        )
    return sample_frame_indices(reader.num_frames, reader.average_fps, fps, num_frames, max_frames, reader.times)


def select_without_limit(reader: VideoReader, fps: float | None, num_frames: int | None) -> np.ndarray:
    """What `select_frames` takes where there is no `max_frames`."""
    if is_sampled(reader):
        if num_frames is None or num_frames >= reader.num_frames:
            return np.arange(reader.num_frames)
        fps = None
    return sample_frame_indices(reader.num_frames, reader.average_fps, fps, num_frames, times=reader.times)


def is_sampled(reader: VideoReader) -> bool:
    """Whether these are frames that someone chose, or an image, and not a whole video."""
    return isinstance(reader, FrameSequence) and reader.already_sampled


def describe(reader: VideoReader, num_sampled: int) -> dict[str, Any]:
    """The clip's entry of `video_metadata`."""
    return {
        "path": reader.path,
        "decoder": reader.backend,
        "num_frames": reader.num_frames,
        "average_fps": reader.average_fps,
        "duration": reader.duration,
        "sampled_fps": num_sampled / reader.duration if reader.duration else 0.0,
        "height": reader.height,
        "width": reader.width,
    }


def as_source(picture: Picture | Source) -> Source | PIL.Image.Image | np.ndarray | torch.Tensor:
    """Whatever has to be opened as a `Source`, anything else as it is."""
    return Source(picture) if is_source(picture) else picture


def open_image(source: Source) -> PIL.Image.Image | None:
    """The image in a file, not yet decoded, or `None` if it holds something else or an animation."""
    try:
        image = PIL.Image.open(source.location)
    except PIL.UnidentifiedImageError:
        return None
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{source.name}: the image is too large ({one_line(error)}); scale it down") from error
    # Pillow recognises MPEG streams, but cannot read them.
    if image.format == "MPEG" or (image.format in ANIMATED_FORMATS and image.is_animated):
        image.close()
        return None
    return image


def is_image(source: Source) -> bool:
    """Whether a file holds an image that does not move."""
    image = open_image(source)
    if image is None:
        return False
    image.close()
    return True


def open_picture(picture: Source | PIL.Image.Image | np.ndarray | torch.Tensor) -> Any:
    """A `Source`'s image, not yet decoded, and anything else as it is; ValueError if a source holds no image."""
    if not isinstance(picture, Source):
        return picture
    image = open_image(picture)
    if image is None:
        raise ValueError(f"{picture.name}: not an image; a list of files is a clip of one image per frame")
    return image


@contextmanager
def image_errors(image: PIL.Image.Image) -> Iterator[None]:
    """Turns Pillow's errors into a ValueError that names the image."""
    try:
        yield
    except (OSError, SyntaxError) as error:
        name = image.filename if isinstance(image, PIL.ImageFile.ImageFile) else ""
        raise ValueError(
            f"{name or 'an image'}: the image cannot be decoded ({one_line(error)}); check that the file is complete"
        ) from error


def picture_size(picture: Picture | Source) -> tuple[int, int]:
    """Height and width in pixels of the upright picture, without decoding it; raises as `load_picture` does."""
    picture = open_picture(as_source(picture))
    if not isinstance(picture, PIL.Image.Image):
        return load_picture(picture).shape[:2]
    width, height = picture.size
    with image_errors(picture):
        lying = picture.getexif().get(ORIENTATION) in LYING
    return (width, height) if lying else (height, width)


def load_picture(picture: Picture | Source) -> np.ndarray:
    """An image in whatever form as uint8 RGB (height, width, 3), upright; ValueError if it is none."""
    picture = open_picture(as_source(picture))
    if isinstance(picture, PIL.Image.Image):
        with image_errors(picture):
            return np.array(PIL.ImageOps.exif_transpose(picture).convert("RGB"))
    if isinstance(picture, torch.Tensor):
        picture = picture.cpu().numpy()
    if not isinstance(picture, np.ndarray):
        raise ValueError(
            f"a frame cannot be a {type(picture).__name__}; pass a path, a PIL image, an array or a tensor"
        )
    if picture.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 (0 to 255), not {picture.dtype}; convert them")
    if picture.ndim == 3 and picture.shape[0] == 3 != picture.shape[2]:
        picture = picture.transpose(1, 2, 0)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        raise ValueError(f"frames must be (H, W, 3) or (3, H, W), or (T, ...) of these, not {tuple(picture.shape)}")
    return picture


def pad_to_square(picture: np.ndarray, mean: Sequence[float]) -> np.ndarray:
    """Centre uint8 RGB (height, width, 3) on a square of the mean colour (three values in [0, 1])."""
    height, width = picture.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(value * 255) for value in mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


def square_side(size: int | Mapping[str, int]) -> int:
    """The side in pixels that a `size` option means; ValueError unless that is one positive whole number."""
    if isinstance(size, Mapping):
        sides = set(size.values())
        if set(size) not in ({"shortest_edge"}, {"height", "width"}) or len(sides) != 1:
            raise ValueError(
                f"size must be a number, {{'shortest_edge': s}} or equal height and width, not {dict(size)}"
            )
        size = sides.pop()
    if not isinstance(size, int) or size <= 0:
        raise ValueError(f"size must be a positive whole number of pixels, not {size!r}")
    return size
