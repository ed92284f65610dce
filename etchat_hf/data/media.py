"""From the media that a row names to something the video processor takes."""

import io
import os
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import PIL.Image
from huggingface_hub import HfFileSystem, hf_hub_download

from etchat_hf.video_processing_etchat import load_picture, pad_to_square

HUB_PREFIX = "hf://"


def locate(root: str | None, name: str) -> str:
    """
    The path of a row's image or video; one on the Hub is downloaded into the Hub's cache.

    Raises:
        ValueError: if the name leads out of the root, or there is no root.
        FileNotFoundError: if there is no such file.
    """
    if not isinstance(name, str):
        raise ValueError(f"the media path is {name!r}; it must be a text")
    if root is None:
        raise ValueError(f"{name}: no root folder is set for it; set image_root or video_root")
    # Lexically, not by resolving links: data trees are often links to other disks, made by their owner.
    inside = posixpath.normpath(name.replace("\\", "/"))
    if inside.startswith(("/", "../")) or inside == ".." or os.path.splitdrive(name)[0]:
        raise ValueError(f"{name}: this path leaves the root folder {root}")
    if root.startswith(HUB_PREFIX):
        return fetch(f"{root.rstrip('/')}/{inside}")
    path = os.path.join(root, inside)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    return path


def fetch(url: str) -> str:
    """The local copy of an `hf://` URL's file; FileNotFoundError if the Hub has none."""
    place = HfFileSystem().resolve_path(url)
    return hf_hub_download(place.repo_id, place.path_in_repo, repo_type=place.repo_type, revision=place.revision)


@contextmanager
def opened_clip(media: str | bytes, is_image: bool, square_colour: list[float] | None) -> Iterator[object]:
    """
    A clip for the video processor from a path or a file's content.

    Args:
        media (`str` or `bytes`): path, or content.
        is_image (`bool`): whether it is an image rather than a video.
        square_colour (`list` of `float`, *optional*): pad an image to a square of this colour, RGB in [0, 1].

    Raises:
        ValueError: if an image cannot be decoded.
    """
    if is_image:
        yield _open_image(media, square_colour)
    elif isinstance(media, str):
        yield media
    else:
        # Decoders seek in files by name
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(media)
            file.flush()
            yield file.name


def _open_image(media: str | bytes, square_colour: list[float] | None) -> np.ndarray | str | PIL.Image.Image:
    if isinstance(media, bytes):
        try:
            media = PIL.Image.open(io.BytesIO(media))
        except PIL.UnidentifiedImageError as error:
            raise ValueError("the packed bytes are not an image") from error
    return media if square_colour is None else pad_to_square(load_picture(media), square_colour)
