"""Media behind URLs: the same samples as from a folder, and nothing from outside of a root."""

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from annotation_rows import image_row, run, turns, video_row, write_rows

from etchat_hf.data import DataSource, StageData, build_dataset
from etchat_hf.data.media import locate


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def url(media):
    """Where `media` is served."""
    handler = functools.partial(QuietHandler, directory=str(media))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def dataset_of(tmp_path, processor, rows, root=None, pad_to_square=False):
    source = DataSource(write_rows(tmp_path / "rows.json", rows), root, root)
    return build_dataset(StageData((source,), use_matching=True, pad_to_square=pad_to_square), processor)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]


@pytest.mark.parametrize("pad_to_square", [False, True])
def test_roots_and_rows_can_be_urls(tmp_path, media, processor, url, pad_to_square):
    picture = {"conversations": turns("<image>\nWhat?", "Red.")}
    rows = [video_row(0), image_row(1) | picture]
    expected = dataset_of(tmp_path, processor, rows, str(media), pad_to_square)
    below_root = dataset_of(tmp_path, processor, rows, f"{url}/", pad_to_square)
    (tmp_path / "named").mkdir()
    named = [video_row(0, video=f"{url}/clips/0.mp4"), image_row(1) | picture | {"image": f"{url}/red.png"}]
    without_root = dataset_of(tmp_path / "named", processor, named, None, pad_to_square)
    for number in (0, 1):
        sample = expected[number]
        assert_equal(below_root[number], sample)
        assert_equal(without_root[number], sample)
    assert not below_root.skips.num_skipped and not without_root.skips.num_skipped


def test_names_are_quoted(media, tmp_path, processor, url):
    (media / "clips" / "a b#1.mp4").write_bytes((media / "clips" / "0.mp4").read_bytes())
    dataset = dataset_of(tmp_path, processor, [video_row(0, video="clips/a b#1.mp4")], url)
    assert len(dataset[0]["frame_times"][0]) == 4


@pytest.mark.parametrize(("root", "name", "message"), [
    ("data", "http://host/a.mp4", "leaves the root folder data"),
    ("http://host/in", "http://host/out/a.mp4", "leaves the root folder"),
    ("http://host/in", "http://host/in/../out/a.mp4", "leaves the root folder"),
    ("http://host/in", "http://host/in/%2e%2e/out/a.mp4", "leaves the root folder"),
    ("http://host/in", "http://host/in/%252E%252E%2Fout/a.mp4", "leaves the root folder"),
    ("http://host/in", "http://host/in/..%5Cout/a.mp4", "leaves the root folder"),
    ("http://host/in", "http://host/in/..?a.mp4", "leaves the root folder"),
    ("http://host/in", "http://host/in/.\t./out/a.mp4", "leaves the root folder"),
    ("http://host/in", "http://host/inside/a.mp4", "leaves the root folder"),
    ("http://host/in", "../a.mp4", "leaves the root folder"),
    (None, "file:///etc/passwd", "only http://, https://, hf:// URLs"),
    (None, "zip://a.mp4::https://host/a.zip", "only http://, https://, hf:// URLs"),
    (None, "https://host/a::file:///etc/passwd", "only http://, https://, hf:// URLs"),
    ("https://", "https://host/a::file:///etc/passwd", "leaves the root folder"),
    (None, "a.mp4", "no root folder is set"),
])  # fmt: skip
def test_nothing_from_outside(root, name, message):
    with pytest.raises(ValueError, match=message):
        locate(root, name)


def test_a_root_can_be_a_mere_beginning():
    assert locate("https://", "https://host/a.mp4") == "https://host/a.mp4"
    assert locate("https://host/a", "https://host/a/100%25..mp4") == "https://host/a/100%25..mp4"
    assert locate("hf://datasets/a/b/videos", "c/d.mp4") == "hf://datasets/a/b/videos/c/d.mp4"


def test_check_and_pack_read_urls(tmp_path, url):
    rows = [video_row(0), video_row(1, video="clips/gone.mp4"), video_row(2, video=f"{url}/clips/2.mp4")]
    config = {"annotations": [write_rows(tmp_path / "rows.json", rows)], "video_root": url, "use_matching": True}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(config))
    result = run("data", "check", tmp_path / "stage.yaml")
    assert result.exit_code == 2 and "3 opened" in result.output, result.output
    assert "row 1: " in result.output and f"{url}/clips/gone.mp4" in result.output
    assert result.output.splitlines()[-1] == "3 rows to train on, 1 problems"

    result = run("pack", config["annotations"][0], url, tmp_path / "packed")
    assert result.exit_code == 2 and f"{url}/clips/gone.mp4: no such file" in result.output
    packed = build_dataset(StageData((DataSource(f"{tmp_path}/packed/*.parquet"),), use_matching=True), None)
    assert len(packed) == 2


def test_unreachable_hosts_are_skipped_rows(tmp_path, processor):
    rows = [video_row(0, video="http://127.0.0.1:9/a.mp4"), video_row(1, video="http://127.0.0.1:9/b.mp4")]
    dataset = dataset_of(tmp_path, processor, rows)
    with pytest.raises(RuntimeError, match="are all unusable; the last: .*127.0.0.1:9/"):
        dataset[0]
    assert dataset.skips.num_skipped == 10
