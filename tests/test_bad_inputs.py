"""Whatever a user gets wrong ends in one line that names the thing and says what to do."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
import video_files

from etchat_hf.video_decoding_etchat import open_video
from etchat_hf.video_processing_etchat import ETChatVideoProcessor

BLACK = np.zeros((3, 8, 8, 3), np.uint8)


class Files:
    """Writes broken files into one folder; each method returns the path of its own."""

    def __init__(self, folder):
        self.folder = folder

    def missing(self):
        return self.folder / "missing.mp4"

    def directory(self):
        path = self.folder / "directory.mp4"
        path.mkdir()
        return path

    def empty(self):
        path = self.folder / "empty.mp4"
        path.touch()
        return path

    def text(self):
        path = self.folder / "text.mp4"
        path.write_text("this is not a video\n" * 100)
        return path

    def good(self):
        return video_files.write_video(self.folder / "good.mp4", 10)

    def sound(self):
        return video_files.write_audio(self.folder / "sound.mp4")

    def truncated(self):
        return video_files.cut_short(self.good(), self.folder / "truncated.mp4", 0.5)

    def rubbish(self):
        whole = video_files.write_video(self.folder / "whole.mp4", container_options={"movflags": "faststart"})
        start = (whole.read_bytes().index(b"mdat") + 4) / whole.stat().st_size
        return video_files.overwrite_bytes(whole, self.folder / "rubbish.mp4", start, 1.0)

    def unknown_codec(self):
        path = self.folder / "unknown_codec.mp4"
        path.write_bytes(self.good().read_bytes().replace(b"avc1", b"zzz1"))
        return path

    def image(self):
        path = self.folder / "image.png"
        PIL.Image.fromarray(video_files.noise_picture(0)).save(path)
        return path

    def cut_image(self):
        return video_files.cut_short(self.image(), self.folder / "cut.png", 0.6)

    def archive(self):
        path = self.folder / "archive.zip"
        path.write_bytes(b"PK\x05\x06" + bytes(18))
        return path

    def closed(self):
        file = open(self.good(), "rb")
        file.close()
        return file

    def as_text(self):
        return open(self.text())

    def cut_bytes(self):
        return self.truncated().read_bytes()

    def no_server(self):
        return "http://127.0.0.1:9/clip.mp4"  # the port of "discard", where nobody listens

    def collapsed_url(self):
        return "https:/host/clip.mp4"


FILES = [
    ("missing", FileNotFoundError, r"missing\.mp4: no such file; give the path of a local video or image, or a URL"),
    ("directory", ValueError, r"directory\.mp4: this is a directory; give the path of one video or image file"),
    ("empty", ValueError, r"empty\.mp4: this file is empty; download or record it again"),
    ("text", ValueError, r"text\.mp4: not a readable video \(.*\); check that it is one and is complete"),
    ("archive", ValueError, r"archive\.zip: not a readable video"),
    ("sound", ValueError, r"sound\.mp4: no video in this file \(only sound\?\); give a file with pictures"),
    ("truncated", ValueError, r"truncated\.mp4: not a readable video"),
    ("rubbish", ValueError, r"rubbish\.mp4: no frame of this video can be decoded; convert it or download it again"),
    ("unknown_codec", ValueError, r"unknown_codec\.mp4: its pictures are coded in a way unknown to FFmpeg; convert"),
    ("cut_image", ValueError, r"cut\.png: the image cannot be decoded .*; check that the file is complete"),
    ("closed", ValueError, r"the file object is closed; pass an open one, or the path"),
    ("as_text", ValueError, r"the file object was opened as text; open it with mode 'rb'"),
    ("cut_bytes", ValueError, r"<\d+ bytes>: not a readable video"),
    ("no_server", OSError, r"http://127\.0\.0\.1:9/clip\.mp4: no such file, or no answer; check the URL"),
    ("collapsed_url", FileNotFoundError, r"https:/host/clip\.mp4: no such file"),
]

# Clip, its metadata, message.
CLIPS = {
    "nothing": (None, None, "a clip cannot be a NoneType; pass a path, a URL, bytes, a file, an image, an array or"),
    "number": (7, None, "a clip cannot be a int"),
    "no_frames": ([], None, "a clip without frames; pass at least one"),
    "empty_array": (BLACK[:0], None, "a clip without frames"),
    "empty_bytes": (b"", None, "<0 bytes>: there is nothing in it; download or record it again"),
    "empty_file_object": (io.BytesIO(), None, "<file object>: there is nothing in it"),
    "nonsense_bytes": (b"nonsense" * 9, None, "<72 bytes>: not a readable video"),
    "empty_row": ({"path": None, "bytes": None}, None, r"needs one of them, but both are None"),
    "strange_row": ({"frames": 3}, None, r"cannot be a dict of \['frames'\]; it needs 'path' or 'bytes'"),
    "unknown_protocol": ("gopher://host/clip.mp4", None, "gopher://host/clip.mp4: not a URL that fsspec knows"),
    "missing_in_memory": (
        "memory://nowhere/clip.mp4",
        None,
        "memory://nowhere/clip.mp4: no such file, or no answer; check",
    ),
    "no_rate": (BLACK, None, r"3 frames without a time base; pass video_metadata=\{'fps': ...\} or"),
    "no_rate_in_metadata": (BLACK, {}, "3 frames without a time base"),
    "no_rate_of_list": (list(BLACK), None, "3 frames without a time base"),
    "rate_zero": (BLACK, {"fps": 0}, "fps must be a positive number, not 0"),
    "rate_nan": (BLACK, {"fps": float("nan")}, "fps must be a positive number, not nan"),
    "rate_text": (BLACK, {"fps": "fast"}, "fps must be a positive number, not 'fast'"),
    "too_few_times": (BLACK, {"frame_times": [0, 1]}, r"3 frames but times of shape \(2,\); pass one time per frame"),
    "times_back": (BLACK, {"frame_times": [0, 2, 1]}, "frame times must be finite and ascend from frame to frame"),
    "times_twice": (BLACK, {"frame_times": [0, 1, 1]}, "frame times must be finite and ascend"),
    "times_endless": (BLACK, {"frame_times": [0, 1, float("inf")]}, "frame times must be finite and ascend"),
    "times_text": (BLACK, {"frame_times": ["a", "b", "c"]}, "frame times must be numbers, not"),
    "floats": (BLACK.astype(np.float32), {"fps": 1}, r"frames must be uint8 \(0 to 255\), not float32; convert them"),
    "float_tensor": (torch.zeros(3, 8, 8), None, "frames must be uint8"),
    "grey": (BLACK[0, ..., 0], None, r"frames must be \(H, W, 3\) or \(3, H, W\), or \(T, ...\) of these, not"),
    "alpha": (np.zeros((8, 8, 4), np.uint8), None, r"not \(8, 8, 4\)"),
    "no_height": (BLACK[:, :0], {"fps": 1}, r"not \(0, 8, 3\)"),
    "batch_of_videos": (BLACK[None], None, r"not \(1, 3, 8, 8, 3\)"),
    "two_sizes": ([BLACK[0], BLACK[0, :4]], {"fps": 1}, "frame 1 is 8 x 4 pixels, the first one 8 x 8; the frames"),
    "list_of_nothing": ([None, None], {"fps": 1}, "a frame cannot be a NoneType; pass a path, a PIL image, an array"),
}

# Arguments of the call, or of the constructor.
OPTIONS = {
    "fps_zero": ({"fps": 0}, ValueError, "fps must be a positive number, not 0"),
    "fps_negative": ({"fps": -1}, ValueError, "fps must be a positive number, not -1"),
    "fps_infinite": ({"fps": float("inf")}, ValueError, "fps must be a positive number, not inf"),
    "fps_text": ({"fps": "1"}, ValueError, "fps must be a positive number, not '1'"),
    "num_frames_zero": ({"num_frames": 0}, ValueError, "num_frames must be a positive number, not 0"),
    "num_frames_half": ({"num_frames": 2.5}, ValueError, "num_frames must be a whole number, not 2.5"),
    "max_frames_negative": ({"max_frames": -3}, ValueError, "max_frames must be a positive number, not -3"),
    "max_frames_half": ({"max_frames": 0.5}, ValueError, "max_frames must be a whole number, not 0.5"),
    "both": ({"fps": 1, "num_frames": 3}, ValueError, "fps and num_frames exclude each other; pass"),
}
OF_CALL = {
    "tensors": ({"return_tensors": "tf"}, ValueError, "return_tensors must be 'pt', not 'tf'"),
    "metadata": ({"video_metadata": [None, None]}, ValueError, "video_metadata has 2 entries for 1 clips; pass one"),
}
OF_CONSTRUCTOR = {
    "size_zero": ({"size": 0}, ValueError, "size must be a positive whole number of pixels, not 0"),
    "size_oblong": ({"size": {"height": 3, "width": 4}}, ValueError, "size must be a number, .* or equal height and"),
    "mean": ({"image_mean": [0.5]}, ValueError, r"image_mean and image_std need three values each, not \[0.5\]"),
    "decoder": ({"decoder": "opencv"}, ValueError, "unknown decoder 'opencv'; choose one of pyav, torchcodec, decord"),
    "misspelt": ({"sise": 3}, TypeError, "ETChatVideoProcessor has no argument sise"),
}


def assert_one_line(caught):
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(("kind", "error", "message"), FILES, ids=[row[0] for row in FILES])
def test_files(tmp_path, kind, error, message):
    clip = getattr(Files(tmp_path), kind)()
    with pytest.raises(error, match=message) as caught:
        ETChatVideoProcessor(size=28)([clip])
    assert_one_line(caught)


@pytest.mark.parametrize(("clip", "metadata", "message"), CLIPS.values(), ids=CLIPS)
def test_clips(clip, metadata, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        ETChatVideoProcessor(size=28)([clip], video_metadata=[metadata])
    assert_one_line(caught)


@pytest.mark.parametrize(("options", "error", "message"), (OPTIONS | OF_CALL).values(), ids=OPTIONS | OF_CALL)
def test_options_of_a_call(options, error, message):
    with pytest.raises(error, match=message) as caught:
        ETChatVideoProcessor(size=28)([BLACK[0]], **options)
    assert_one_line(caught)


@pytest.mark.parametrize(
    ("options", "error", "message"), (OPTIONS | OF_CONSTRUCTOR).values(), ids=OPTIONS | OF_CONSTRUCTOR
)
def test_options_of_the_constructor(options, error, message):
    with pytest.raises(error, match=message) as caught:
        ETChatVideoProcessor(**options)
    assert_one_line(caught)


@pytest.mark.parametrize(
    ("chunk_size", "message"), [(0, "chunk_size must be a positive number, not 0"), (1.5, "whole")]
)
def test_chunk_sizes(chunk_size, message):
    with pytest.raises(ValueError, match=message):
        next(ETChatVideoProcessor(size=28).iter_frames(BLACK[0], chunk_size=chunk_size))


def test_a_video_with_metadata(tmp_path):
    with pytest.raises(ValueError, match="good.mp4: this clip has its own time base; pass None as its video_metadata"):
        ETChatVideoProcessor(size=28)([Files(tmp_path).good()], video_metadata=[{"fps": 3}])


def test_no_clips():
    with pytest.raises(ValueError, match="videos is empty; pass at least one clip"):
        ETChatVideoProcessor(size=28)([])


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="unknown video backend 'opencv'; choose one of pyav, torchcodec, decord"):
        open_video("any.mp4", "opencv")


@pytest.mark.parametrize(
    ("indices", "error", "message"), [([10], IndexError, r"0\.\.9"), ([3, 1], ValueError, "sort")]
)
def test_frame_numbers(tmp_path, indices, error, message):
    with pytest.raises(error, match=message) as caught:
        list(open_video(Files(tmp_path).good()).read(indices))
    assert_one_line(caught)
