"""However a video or an image is handed over, the model sees the same frames at the same times."""

import io
import os
import socket
import sys
import tempfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import video_files

from etchat_hf import video_decoding_etchat as decoding
from etchat_hf.processing_etchat import _arrange, _unique
from etchat_hf.video_decoding_etchat import RemoteFile, Source, import_decoder, is_url, open_video
from etchat_hf.video_processing_etchat import ETChatVideoProcessor

needs_torchcodec = pytest.mark.skipif(import_decoder("torchcodec") is None, reason="torchcodec does not load")


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; whether it does so in parts, and when it fails, says the first part of the URL."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        _, manner, name = self.path.split("/", 2)
        content = self.server.files.get(name)
        if content is None or manner in ("403", "500"):
            self.send_error(404 if content is None else int(manner))
            return
        wanted = self.headers.get("Range")
        start, status = 0, 200
        size = len(content)
        if wanted is not None and manner in ("ranges", "breaks"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, status = int(first), 206
            content = content[start : int(last) + 1 if last else None]
        if manner == "breaks" and 0 < start < size - 1:
            self.send_error(500)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if manner == "ranges":
            self.send_header("Accept-Ranges", "bytes")
        if manner == "none":
            self.send_header("Accept-Ranges", "none")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{size}")
        self.end_headers()
        if with_body:
            self.wfile.write(content)
            self.server.sent.append((start, len(content)))

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.sent = {}, []
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


@pytest.fixture
def clip(tmp_path):
    """A 4 s clip at 10 fps whose k-th frame shows k."""
    return video_files.write_video(tmp_path / "clip.mp4", 40, 10)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    PIL.Image.fromarray(video_files.numbered_picture(77)).save(path)
    return path


@pytest.fixture
def processor():
    return ETChatVideoProcessor(size=48)


def assert_same(processor, clip, path, **options):
    found, expected = processor([clip], **options), processor([path])
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
    assert found["frame_times"] == expected["frame_times"]
    assert found["frame_indices"] == expected["frame_indices"]
    return found["video_metadata"][0]


class OneWay(io.RawIOBase):
    """A pipe: it can be read once, and not sought."""

    def __init__(self, content):
        self._content = io.BytesIO(content)

    def readable(self):
        return True

    def seekable(self):
        return False

    def readinto(self, buffer):
        return self._content.readinto(buffer)


WAYS = {
    "string": str,
    "path": Path,
    "relative": lambda path: os.path.relpath(path),
    "file_url": lambda path: path.as_uri(),
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "open_file": lambda path: open(path, "rb"),
    "file_at_its_end": lambda path: opened_at_end(path),
    "bytes_io": lambda path: io.BytesIO(path.read_bytes()),
    "temporary_file": lambda path: spooled(path),
    "pipe": lambda path: OneWay(path.read_bytes()),
    "buffered_pipe": lambda path: io.BufferedReader(OneWay(path.read_bytes())),
    "path_row": lambda path: {"path": str(path), "bytes": None},
    "bytes_row": lambda path: {"path": "gone.mp4", "bytes": path.read_bytes()},
    "only_bytes": lambda path: {"bytes": path.read_bytes()},
}


def opened_at_end(path):
    file = open(path, "rb")
    file.seek(0, os.SEEK_END)
    return file


def spooled(path):
    file = tempfile.SpooledTemporaryFile()
    file.write(path.read_bytes())
    return file


@pytest.mark.parametrize("way", WAYS)
def test_a_video_in_every_way(processor, clip, way):
    metadata = assert_same(processor, WAYS[way](clip), clip)
    assert metadata["decoder"] == "pyav"


@pytest.mark.parametrize("way", WAYS)
def test_an_image_in_every_way(processor, image, way):
    assert assert_same(processor, WAYS[way](image), image)["decoder"] in ("pillow", "memory")


@pytest.mark.parametrize("way", ["bytes", "bytes_io", "pipe", "path_row", "bytes_row", "file_url"])
def test_a_list_of_frame_images_with_times(processor, tmp_path, way):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        PIL.Image.fromarray(video_files.numbered_picture(number)).save(path)
    times = {"video_metadata": [{"frame_times": [10.0, 10.5, 12.25]}]}
    found = processor([[WAYS[way](path) for path in paths]], **times)
    assert found["frame_times"] == [[0.0, 0.5, 2.25]]
    torch.testing.assert_close(found["pixel_values"], processor([paths], **times)["pixel_values"], rtol=0, atol=0)


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("way", ["bytes", "pipe"])
def test_every_container_from_memory(tmp_path, container, way):
    path = video_files.write_video(tmp_path / f"clip.{container}", 40, 10, start=1.5)
    reader = open_video(WAYS[way](path))
    assert [video_files.read_number(picture) for picture in reader.read([0, 3, 20, 39])] == [0, 3, 20, 39]
    np.testing.assert_array_equal(reader.times, open_video(path).times)


def test_readers_of_one_file_object_do_not_disturb_each_other(clip):
    reader = open_video(io.BytesIO(clip.read_bytes()))
    forwards, backwards = reader.read(range(40)), (next(reader.read([k])) for k in range(39, -1, -1))
    for k, (one, other) in enumerate(zip(forwards, backwards, strict=True)):
        assert (video_files.read_number(one), video_files.read_number(other)) == (k, 39 - k)


@pytest.mark.parametrize("manner", ["ranges", "none", "silent"])
def test_http(processor, clip, image, server, manner):
    """Servers that send parts, that say they do not, and that ignore the question."""
    server.files |= {"clip.mp4": clip.read_bytes(), "image.png": image.read_bytes()}
    url = f"{server.url}/{manner}/clip.mp4"
    assert assert_same(processor, url, clip)["path"] == url
    assert_same(processor, f"{server.url}/{manner}/image.png", image)
    assert_same(processor, {"path": url, "bytes": None}, clip)


def test_every_part_of_a_remote_file_is_fetched_once(server, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "REMOTE_BLOCK", 4096)
    path = video_files.write_video(tmp_path / "clip.mp4", 120, 10, picture=video_files.noise_picture)
    server.files["clip.mp4"] = path.read_bytes()
    size = path.stat().st_size
    assert size > 10 * 4096
    reader = open_video(f"{server.url}/ranges/clip.mp4")
    assert reader.num_frames == len(list(reader.read(range(120))))
    # All of it, and the last byte, which shows that ranges work.
    assert size <= sum(length for _, length in server.sent) <= size + 1
    assert max(length for _, length in server.sent) <= 4096


def test_of_a_remote_file_only_what_is_needed_is_fetched(server, monkeypatch):
    monkeypatch.setattr(decoding, "REMOTE_BLOCK", 4096)
    content = np.random.default_rng(0).bytes(1 << 20)
    server.files["large.bin"] = content
    with Source(f"{server.url}/ranges/large.bin").open() as file:
        assert file.seek(-5000, os.SEEK_END) == len(content) - 5000
        assert file.read(100) == content[-5000:-4900]
        file.seek(300_000)
        assert file.read(10) == content[300_000:300_010]
    assert sum(length for _, length in server.sent) <= 200_000  # two buffers of the reader, in whole blocks


def test_no_temporary_files_stay(processor, clip, server, tmp_path, monkeypatch):
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(decoding, "SPOOL_LIMIT", 100)  # spool to the disk at once
    server.files["clip.mp4"] = clip.read_bytes()
    for source in (f"{server.url}/ranges/clip.mp4", f"{server.url}/none/clip.mp4", OneWay(clip.read_bytes())):
        assert_same(processor, source, clip)
    with pytest.raises(ValueError, match="not a readable video"):
        processor([OneWay(b"nonsense" * 100)])
    assert list(place.iterdir()) == []


def test_memory_files_of_fsspec(processor, clip):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.pipe("/videos/clip.mp4", clip.read_bytes())
    assert_same(processor, "memory://videos/clip.mp4", clip)
    system.rm("/videos", recursive=True)


def test_chained_urls_of_fsspec(processor, clip, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.write(clip, "inside.mp4")
    assert_same(processor, f"zip://inside.mp4::{(tmp_path / 'archive.zip').as_uri()}", clip)


@pytest.mark.parametrize("text", ["hf://datasets/a/b/c.mp4", "s3://bucket/c.mp4", "https://host/c.mp4", "zip://a::b"])
def test_urls(text):
    assert is_url(text)


@pytest.mark.parametrize("text", ["c.mp4", "/c.mp4", "C:/c.mp4", "C://c.mp4", "a/http://c.mp4", "concat:c.mp4"])
def test_paths_are_no_urls(text):
    assert not is_url(text)


def test_hub_urls_belong_to_the_hub_library():
    fsspec = pytest.importorskip("fsspec")
    assert fsspec.get_filesystem_class("hf").__name__ == "HfFileSystem"


@contextmanager
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


def test_paths_that_look_like_protocols_are_files(clip, tmp_path, monkeypatch, processor):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:clip.mp4", "http:clip.mp4", "tcp:1.2.3.4"):
        Path(name).write_bytes(clip.read_bytes())
        with no_network(monkeypatch):
            assert_same(processor, name, clip)


@pytest.mark.parametrize("way", ["string", "bytes"])
def test_a_playlist_does_not_reach_the_network(server, clip, tmp_path, way):
    stream = video_files.write_video(tmp_path / "clip.ts", 20)
    server.files["clip.ts"] = stream.read_bytes()
    playlist = tmp_path / "playlist.m3u8"
    url = f"{server.url}/ranges/clip.ts"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{url}\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match="not a readable video|no frame|no video"):
        open_video(WAYS[way](playlist))
    assert server.sent == []


@pytest.mark.parametrize("backend", [None, "pyav", "decord"])
@pytest.mark.parametrize("end", ["#EXT-X-ENDLIST\n", ""])  # without it, more is waited for
def test_a_playlist_does_not_reach_other_files(clip, tmp_path, backend, end):
    playlist = tmp_path / "video.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n{end}")
    with pytest.raises(ValueError, match="video.mp4: not a readable video"):
        open_video(playlist, backend)


def test_a_playlist_does_not_reach_other_files_without_pyav(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (playlist := tmp_path / "video.mp4").write_text(f"ffconcat version 1.0\nfile '{clip}'\n")
    with pytest.raises(ValueError, match="video.mp4: a playlist, which names other files"):
        open_video(playlist)


def test_bytes_do_not_reach_local_files(clip):
    script = f"ffconcat version 1.0\nfile '{clip}'\n".encode()
    with pytest.raises(ValueError, match="bytes>: not a readable video"):
        open_video(script, "pyav")


def test_a_connection_that_breaks_is_an_error_and_not_the_end(processor, server, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "REMOTE_BLOCK", 4096)
    path = video_files.write_video(tmp_path / "clip.mkv", 120, 10, picture=video_files.noise_picture)
    server.files["clip.mkv"] = path.read_bytes()
    with pytest.raises(OSError, match="breaks/clip.mkv: reading failed") as caught:
        processor([f"{server.url}/breaks/clip.mkv"])
    assert "\n" not in str(caught.value)


def test_remote_files_are_read_by_several_threads(server, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "REMOTE_BLOCK", 512)
    content = np.random.default_rng(0).bytes(100_000)
    source = RemoteFile("file", io.BytesIO(content))
    views = [decoding.View(source) for _ in range(4)]
    results = [None] * 4

    def read(k):
        results[k] = views[k].read(100_000 - k)

    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [content[: 100_000 - k] for k in range(4)]


def test_undecoded_columns_of_datasets(processor, clip, image, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [str(clip), {"path": None, "bytes": clip.read_bytes()}]
    videos = datasets.Dataset.from_dict({"video": rows[:1]}).cast_column("video", datasets.Video(decode=False))
    assert_same(processor, videos[0]["video"], clip)
    features = datasets.Features({"video": datasets.Video(decode=False), "image": datasets.Image()})
    table = datasets.Dataset.from_dict({"video": rows[1:], "image": [str(image)]}, features=features)
    assert_same(processor, table[0]["video"], clip)
    assert_same(processor, table[0]["image"], image)
    undecoded = table.cast_column("image", datasets.Image(decode=False))
    assert_same(processor, undecoded[0]["image"], image)


@needs_torchcodec
def test_decoded_torchcodec_columns_of_datasets(processor, clip):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"video": [str(clip)]}).cast_column("video", datasets.Video())
    assert assert_same(processor, table[0]["video"], clip)["decoder"] == "torchcodec"


@needs_torchcodec
@pytest.mark.parametrize("way", ["bytes", "bytes_io", "pipe", "file_url"])
def test_torchcodec_reads_from_anywhere(clip, way):
    reader = open_video(WAYS[way](clip), "torchcodec")
    assert [video_files.read_number(picture) for picture in reader.read([0, 20, 39])] == [0, 20, 39]


def test_all_ways_share_a_batch(processor, clip, image):
    clips = [WAYS[way](path) for way in WAYS for path in (clip, image)]
    batch = processor(clips)
    assert batch["frame_times"] == [[0, 1, 2, 3], [0]] * len(WAYS)
    frames = batch["pixel_values"].view(len(WAYS), 5, *batch["pixel_values"].shape[1:])
    assert (frames == frames[:1]).all()


def test_many_images_do_not_exhaust_file_handles(processor, image):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert len(processor([image] * 400)["pixel_values"]) == 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_processor_knows_a_clip_again():
    """What `ETChatProcessor` does with clips of all kinds: arrange them per prompt, and read each once."""
    content, file, row = b"clip", io.BytesIO(b"clip"), {"path": "clip.mp4"}
    for one in (content, file, row, "https://host/clip.mp4"):
        assert _arrange(one, [1], single=True, what="clip") == [[one]]
        assert _arrange([one, one], [1, 1], single=False, what="clip") == [[one], [one]]
        assert _unique([[one], [one]]) == ([one], [[0], [0]])
    assert _unique([[content, file], [row]])[1] == [[0, 1], [2]]
