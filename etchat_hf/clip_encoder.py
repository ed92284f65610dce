"""Each clip passes the vision encoder once, for any number of questions, turns, batches, processes and runs.

`etchat ask`, bulk inference and training all encode through `ClipEncoder`. In memory its results are kept by holding
the `EncodedClip`; with a folder they are also kept on disk, in safetensors files named by what they follow from.
"""

import hashlib
import json
import os
import secrets
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from .modeling_etchat import ETChatForConditionalGeneration
from .processing_etchat import EncodedClip, ETChatProcessor
from .video_decoding_etchat import Source
from .video_processing_etchat import SampledClip, load_picture

GIB = 1 << 30
DEFAULT_MAX_GIB = 50.0
# What a process may store before it looks again how large the folder is, which others write to as well.
SHARE_BETWEEN_LOOKS = 0.01
# Where files are written before they get their names; they are in use for seconds.
WRITING = ".writing"
ABANDONED_SECONDS = 3600.0
# What the pixels of given frames depend on, beside the decoder.
PIXEL_SETTINGS = ("size", "image_mean", "image_std", "pad_to_square")
WORD_BYTES, ROW_WORDS = 8, 1024  # of the table that a tensor's bits are summed in


@dataclass(eq=False)
class DecodedClip:
    """
    A clip ready to be encoded, or to be taken from the folder.

    Args:
        pixel_values (`torch.FloatTensor` of shape `(T, 3, size, size)`, *optional*): its normalised frames; `None` if
            its features are stored.
        frame_times (`list` of `float`): seconds of each frame since the first.
        frame_indices (`list` of `int`): numbers of the frames in the source.
        metadata (`dict`): the video processor's entry about the source.
        key (`str`, *optional*): names its features on disk.
    """

    pixel_values: torch.FloatTensor | None
    frame_times: list[float]
    frame_indices: list[int]
    metadata: dict
    key: str | None


class ClipEncoder:
    """
    Encodes clips, and remembers them on disk if it is given a folder.

    A file there is found by the content of the video, the frames sampled, how they are resized and normalised, and
    the vision encoder's weights and configuration: a video that was moved or copied is found again, and so it is for a
    model whose other weights were trained on. What is found is not decoded; the video is only read, to know it. Files
    appear complete or not at all and carry a checksum; one that is damaged is reported, and replaced when its clip has
    been encoded again.

    Training has pixels instead of videos ([`encode_frames`]): each clip is decoded every time, only the encoder is
    spared, and these entries serve training alone, even in a folder shared with `etchat ask` or `etchat infer`.

    Args:
        model ([`ETChatForConditionalGeneration`]): encodes what is not stored.
        processor ([`ETChatProcessor`]): of the model.
        folder (`str` or `Path`, *optional*): made if it is missing; may be shared by processes and runs.
        max_gib (`float`, *optional*, defaults to 50): size at which nothing more is stored, with a warning; each
            further process that fills the folder may exceed it by a hundredth. No clip is ever removed: delete files,
            or the folder, at will, also during a run.

    Raises:
        ValueError: for a size that holds nothing.
        OSError: if the folder cannot be made.
    """

    def __init__(
        self,
        model: ETChatForConditionalGeneration,
        processor: ETChatProcessor,
        folder: str | Path | None = None,
        max_gib: float = DEFAULT_MAX_GIB,
    ):
        if not max_gib > 0:
            raise ValueError(f"The cache of clips may take {max_gib} GiB; it must be more than 0.")
        self._model, self._processor = model, processor
        self._pixel_dtype = model.model.vision_tower.dtype
        self.folder = Path(folder) if folder is not None else None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            tower = model.model.vision_tower
            self._tower = _digest(fingerprint(tower), json.dumps(settings_of(tower.config)))
            self._remove_abandoned()
        self._max_bytes = max_gib * GIB
        self._allowance = 0.0
        self._lock = threading.Lock()

    def encode(self, clip, **sampling) -> EncodedClip:
        """
        Args:
            clip: see [`ETChatVideoProcessor`]; or what `sample`, [`decode`] or [`encode`] made of one. Unless it is
                decoded already, its pixels are in memory a few frames at a time.
            sampling: arguments of `ETChatVideoProcessor.sample`: `fps`, `num_frames`, `max_frames`, `video_metadata`.

        Returns:
            [`EncodedClip`], on the model's device.

        Raises:
            FileNotFoundError, OSError, ValueError: if the clip cannot be read, or is no longer stored, as it was when
                [`decode`] looked. A folder that cannot be written to is warned of only.
        """
        if isinstance(clip, EncodedClip):
            return replace(clip, vision_features=clip.vision_features.to(self._model.device))
        if isinstance(clip, DecodedClip):
            return self._encode_decoded(clip)
        sampled = self._sample(clip, sampling)
        key = self._clip_key(sampled)
        if (features := self._find(key)) is not None:
            return EncodedClip.of(sampled, features.to(self._model.device))
        encoded = self._processor.encode(sampled, self._model)
        self._store(key, encoded.vision_features)
        return encoded

    def decode(self, clip, **sampling) -> DecodedClip:
        """
        What [`encode`] needs to do before the model is needed, for threads or processes that work ahead: finds the
        clip, or decodes all of it. Arguments and errors as [`encode`]'s. A pickled encoder has no model, and can only
        do this.
        """
        sampled = self._sample(clip, sampling)
        key = self._clip_key(sampled)
        pixels = None
        if self._find(key) is None:
            (pixels,) = self._processor.video_processor.iter_pixels(sampled, len(sampled.frame_times))
            pixels = pixels.to(self._pixel_dtype)
        return DecodedClip(pixels, sampled.frame_times, sampled.frame_indices.tolist(), sampled.metadata, key)

    def encode_frames(self, pixel_values: torch.FloatTensor, frame_times: list[list[float]]) -> torch.FloatTensor:
        """
        Encodes clips that are known by their pixels only, as a training batch has them: what [`encode`] stored of the
        same videos is not found.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(N, 3, size, size)`): normalised frames, clip after clip.
            frame_times (`list` of `list` of `float`): whose lengths say where each clip ends.

        Returns:
            `torch.FloatTensor` of shape `(N, patches, C)`.
        """
        if self.folder is None:
            return self._model.get_vision_features(pixel_values)
        features = []
        for clip in pixel_values.split([len(times) for times in frame_times]):
            key = _digest("pixels", self._tower, _tensor_bytes(clip))
            found = self._find(key)
            if found is None:
                found = self._model.get_vision_features(clip)
                self._store(key, found)
            features.append(found.to(clip.device))
        return torch.cat(features)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_model", "_lock")}

    def _encode_decoded(self, clip: DecodedClip) -> EncodedClip:
        if clip.pixel_values is None:
            features = self._find(clip.key)
            if features is None:
                raise FileNotFoundError(f"{self._path(clip.key)}: this clip was stored, and no longer is")
            features = features.to(self._model.device)
        else:
            features = self._model.get_vision_features(clip.pixel_values.to(self._model.device))
            self._store(clip.key, features)
        return EncodedClip(features, clip.frame_times, clip.frame_indices, clip.metadata)

    def _sample(self, clip, sampling: dict) -> SampledClip:
        return clip if isinstance(clip, SampledClip) else self._processor.video_processor.sample(clip, **sampling)

    def _clip_key(self, clip: SampledClip) -> str | None:
        if self.folder is None:
            return None
        processor = self._processor.video_processor
        settings = {name: getattr(processor, name) for name in PIXEL_SETTINGS} | {"decoder": clip.reader.backend}
        content = content_digest(clip.content)
        return _digest("clip", self._tower, content, json.dumps(settings), clip.frame_indices.tobytes())

    def _find(self, key: str | None) -> torch.FloatTensor | None:
        if key is None:
            return None
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                features, stored = file.get_tensor("features"), (file.metadata() or {}).get("checksum")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError):
            features = stored = None
        if stored is None or stored != _checksum(key, features):
            warnings.warn(f"{path} is damaged, or may not be read; the clip is encoded again", stacklevel=2)
            return None
        return features

    def _store(self, key: str | None, features: torch.FloatTensor) -> None:
        if key is None:
            return
        if not self._take(features.numel() * features.element_size()):
            text = f"{self.folder} holds {self._max_bytes / GIB:g} GiB: further clips are not stored"
            warnings.warn(f"{text}; allow more, or delete old files", stacklevel=2)
            return
        aside = self.folder / WRITING / secrets.token_hex(8)
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            aside.touch()
            mode = aside.stat().st_mode
            features = features.contiguous().cpu()
            save_file({"features": features}, aside, {"checksum": _checksum(key, features)})
            aside.chmod(mode)  # safetensors makes files that only their owner may read
            os.replace(aside, self._path(key))
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{self.folder}: a clip is not stored ({error})", stacklevel=2)
            with suppress(OSError):
                aside.unlink()

    def _take(self, size: int) -> bool:
        """Whether so many bytes more may be stored."""
        with self._lock:
            if size > self._allowance:
                room = self._max_bytes - self._folder_bytes()
                self._allowance = min(room, max(size, SHARE_BETWEEN_LOOKS * self._max_bytes))
            fits = size <= self._allowance
            self._allowance -= size if fits else 0
            return fits

    def _folder_bytes(self) -> int:
        total = 0
        for file in (*self.folder.glob("*.safetensors"), *self.folder.glob(f"{WRITING}/*")):
            with suppress(FileNotFoundError):  # just finished, or deleted
                total += file.stat().st_size
        return total

    def _remove_abandoned(self) -> None:
        """Removes what killed processes left behind."""
        for file in self.folder.glob(f"{WRITING}/*"):
            with suppress(OSError):  # another process was faster, or it is another user's
                if time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                    file.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def content_digest(content: Any) -> str:
    """
    What a clip shows, as a hash: that of a file's bytes, or of pixels in memory.

    Args:
        content: `SampledClip.content`.

    Raises:
        OSError: if a file or URL cannot be read.
        ValueError: for what cannot be read twice, such as an open decoder.
    """
    if isinstance(content, list):
        return _digest("list", *map(content_digest, content))
    if isinstance(content, Source):
        with content.open() as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    if isinstance(content, PIL.Image.Image):
        content = load_picture(content)
    if isinstance(content, torch.Tensor):
        content = content.cpu().numpy()
    if isinstance(content, np.ndarray):
        return _digest(f"{content.dtype} {content.shape}", np.ascontiguousarray(content).data)
    raise ValueError(f"a {type(content).__name__} cannot be looked up in a cache; pass the video's path, URL or bytes")


def fingerprint(module: torch.nn.Module) -> str:
    """
    Tells weights and persistent buffers apart: by the sums of each tensor's bits, read as whole numbers, along the
    rows and along the columns of a table. So a changed value is noticed, and so are values that changed places.

    Two passes over the memory of the device that holds them; the same on all devices.
    """
    state = hashlib.blake2b(digest_size=16)
    for name, stored in module.state_dict().items():
        for tensor in _plain_tensors(stored):
            bits = tensor.reshape(-1).view(torch.uint8)
            if bits.storage_offset() % WORD_BYTES:
                bits = bits.clone()  # words may only begin at multiples of their size
            whole = len(bits) - len(bits) % (WORD_BYTES * ROW_WORDS)
            words = bits[:whole].view(torch.int64).view(-1, ROW_WORDS)
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            for part in (words.sum(1), words.sum(0), bits[whole:]):
                state.update(part.cpu().numpy().tobytes())
    return state.hexdigest()


def settings_of(config: PreTrainedConfig) -> dict:
    """A configuration's values, without those that say who wrote it where, and the dtype, which the weights tell."""
    untold = ("transformers_version", "_name_or_path", "dtype")
    return {name: value for name, value in config.to_dict().items() if name not in untold}


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor, or those that a quantised one consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, name))


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _checksum(key: str, features: torch.Tensor) -> str:
    """Of a file's values, and of what else could not be told from them: their dtype, their shape, whose they are."""
    start = zlib.crc32(f"{key} {features.dtype} {tuple(features.shape)}".encode())
    return f"{zlib.crc32(_tensor_bytes(features), start):08x}"


def _digest(*parts: str | bytes | memoryview) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(memoryview(data).cast("B")).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()
