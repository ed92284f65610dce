"""From the media that a row names to something the video processor takes."""

import os
import posixpath
import re
import tempfile
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import PIL.Image
from huggingface_hub import HfFileSystem, hf_hub_download

from etchat_hf.video_decoding_etchat import Source, is_url
from etchat_hf.video_processing_etchat import load_picture, pad_to_square

HUB_PREFIX = "hf://"
URL_PREFIXES = ("http://", "https://", HUB_PREFIX)


def locate(root: str | None, name: str) -> str:
    """
    Where a row's image or video is: a path, or a URL. Nothing is fetched.

    Args:
        root (`str`, *optional*): folder or URL that it must be in. Without one, rows can only name URLs.
        name (`str`): relative to `root`, or a URL.

    Raises:
        ValueError: if the name leads out of the root, or is relative and there is no root.
        FileNotFoundError: if there is no such file in a folder.
    """
    if not isinstance(name, str):
        raise ValueError(f"the media path is {name!r}; it must be a text")
    if is_url(name):
        return _locate_url(root, name)
    if root is None:
        raise ValueError(f"{name}: no root folder is set for it; set image_root or video_root")
    # Lexically, not by resolving links: data trees are often links to other disks, made by their owner.
    inside = posixpath.normpath(name.replace("\\", "/"))
    if _leaves(inside) or os.path.splitdrive(name)[0]:
        raise ValueError(f"{name}: this path leaves the root folder {root}")
    if is_url(root):
        return f"{root.rstrip('/')}/{urllib.parse.quote(inside) if root.startswith('http') else inside}"
    path = os.path.join(root, inside)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _locate_url(root: str | None, url: str) -> str:
    if root is None:
        if not url.startswith(URL_PREFIXES) or "::" in url:
            raise ValueError(f"{url}: only {', '.join(URL_PREFIXES)} URLs can stand in annotations")
        return url
    inside = url.removeprefix(root if root.endswith("/") else f"{root}/")
    if inside == url or "::" in url or _leaves(_as_clients_read(inside)):
        raise ValueError(f"{url}: this URL leaves the root folder {root}; without a root, URLs can be anywhere")
    return url


def _leaves(inside: str) -> bool:
    """Whether a relative path with / leads out of its folder."""
    inside = posixpath.normpath(inside)
    return inside.startswith(("/", "../")) or inside == ".."


def _as_clients_read(path: str) -> str:
    """
    The steps of a URL's path without any quoting, and those of its query: HTTP clients resolve %2e%2e as .. and drop
    line breaks and tabs.
    """
    while (unquoted := re.sub(r"[\t\r\n]", "", urllib.parse.unquote(path))) != path:
        path = unquoted
    return re.sub(r"[\\?#]", "/", path)


def fetch(url: str) -> str:
    """The local copy of an `hf://` URL's file in the Hub's cache; FileNotFoundError if the Hub has none."""
    place = HfFileSystem().resolve_path(url)
    return hf_hub_download(place.repo_id, place.path_in_repo, repo_type=place.repo_type, revision=place.revision)


@contextmanager
def opened_clip(media: str | bytes, is_image: bool, square_colour: list[float] | None) -> Iterator[object]:
    """
    A clip for the video processor from a path or a file's content.

    Args:
        media (`str` or `bytes`): path or URL, or content.
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


def _open_image(media: str | bytes, square_colour: list[float] | None) -> np.ndarray:
    """The picture, decoded; of an animated one the first, since an image is a clip of one frame."""
    source = Source(media)
    try:
        picture = load_picture(PIL.Image.open(source.location))
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{source.name}: not an image") from error
    return picture if square_colour is None else pad_to_square(picture, square_colour)
