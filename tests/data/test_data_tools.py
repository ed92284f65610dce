"""`etchat compress` and `etchat pack`: exact times, nothing half-written, goes on where it was stopped."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import av
import datasets
import numpy as np
import pyarrow.parquet
import pytest
from annotation_rows import image_row, run, text_row, video_row, write_rows
from torch.utils.data import DataLoader
from video_files import cut_short, noise_picture, read_number, write_video

from etchat_hf.data import DataSource, ETChatBatchSampler, ETChatDataset, SampleEncoder, StageData, build_dataset
from etchat_hf.data import pack as pack_module
from etchat_hf.data.compress import Compression, compress_tree, compress_video
from etchat_hf.video_decoding_etchat import open_video, sample_frame_indices


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 60, "fps": 25},
        {"num_frames": 60, "fps": 30000 / 1001},
        {"num_frames": 5, "fps": 2},  # slower than asked for
        {"num_frames": 1, "fps": 10},
        {"times": [0, 0.1, 0.5, 0.51, 1.37, 2.004, 4.9, 5]},
        {"num_frames": 40, "fps": 10, "start": 1.5, "audio": True},
    ],
)
def test_kept_pictures_keep_their_times(tmp_path, options):
    source = write_video(tmp_path / "a.mp4", **options)
    compress_video(source, tmp_path / "out" / "a.mp4", Compression(fps=3, size=64))
    before, after = open_video(source), open_video(tmp_path / "out" / "a.mp4")
    kept = np.unique([0, *sample_frame_indices(before.num_frames, before.average_fps, 3, times=before.times)])
    np.testing.assert_allclose(after.times, before.times[kept], rtol=0, atol=1e-9)
    assert [read_number(picture) for picture in after.read(range(after.num_frames))] == kept.tolist()
    assert (after.height, after.width) == (64, 86)
    with av.open(str(tmp_path / "out" / "a.mp4")) as container:
        assert not container.streams.audio


def test_decord_reads_what_is_written(tmp_path):
    source = write_video(tmp_path / "a.mp4", num_frames=200, fps=10)
    compress_video(source, tmp_path / "b.mp4", Compression(size=64))
    assert open_video(tmp_path / "b.mp4", "pyav").decord_obstacle is None


def test_rotated_videos_come_out_upright(tmp_path):
    source = write_video(tmp_path / "a.mp4", rotation=90)
    compress_video(source, tmp_path / "b.mp4", Compression(size=64))
    reader = open_video(tmp_path / "b.mp4")
    assert (reader.height, reader.width) == (86, 64)


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    for name in ("a.mp4", "b/c.MKV", "b/d/e.mov", "f.avi", "g.webm"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, num_frames=20, **({"codec": "libvpx"} if name == "g.webm" else {}))
    (folder / "notes.txt").write_text("no video")
    return folder


def test_same_tree_and_errors_at_the_end(tmp_path, videos):
    cut_short(videos / "a.mp4", videos / "broken.mp4", keep=0.3)
    result = run("compress", videos, tmp_path / "out", "--size", 32, "--workers", 2)
    assert result.exit_code == 2
    assert f"{videos}/broken.mp4: " in result.output and "1 problems" in result.output
    assert "5 videos compressed, 0 skipped (there already), 1 failed" in result.output
    assert tree(tmp_path / "out") == [".etchat-compress.json", "a.mp4", "b/c.MKV", "b/d/e.mov", "f.avi", "g.webm"]
    (videos / "broken.mp4").unlink()
    modified = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    again = run("compress", videos, tmp_path / "out", "--size", 32, "--workers", 1)
    assert again.exit_code == 0 and "0 videos compressed, 5 skipped (there already), 0 failed" in again.output
    assert modified == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}


def test_a_video_that_cannot_be_written_fails_alone(tmp_path, videos):
    write_video(videos / "wide.mp4", num_frames=2, size=(4000, 16))  # 56000 pixels wide at a height of 224
    done = compress_tree(videos, tmp_path / "out", Compression(), workers=2)
    assert (done.written, list(done.failed)) == (5, [f"{videos}/wide.mp4"])
    assert "libx264" in done.failed[f"{videos}/wide.mp4"]


def test_a_process_that_dies_takes_only_its_own_video_along(tmp_path, videos):
    long = write_video(videos / "a.mp4", num_frames=150, fps=30, size=(320, 240), picture=noise_picture)
    others = multiprocessing.active_children()

    def killing_the_first(results, total):
        def kill():
            while not list((tmp_path / "out").glob(".a.mp4.*.partial")):
                time.sleep(0.005)
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()

        thread = threading.Thread(target=kill)
        thread.start()
        yield from results
        thread.join()

    out, settings = tmp_path / "out", Compression(fps=30, size=224)
    done = compress_tree(videos, out, settings, workers=1, progress=killing_the_first)
    assert done == (4, 0, {str(long): "the process that compressed it died; was there too little memory?"})
    assert tree(out) == [".etchat-compress.json", "b/c.MKV", "b/d/e.mov", "f.avi", "g.webm"]
    assert compress_tree(videos, out, settings, workers=1) == (1, 4, {})


def test_shards_share_the_work_without_overlap(tmp_path, videos):
    parts = []
    for shard in range(3):
        out = tmp_path / f"out{shard}"
        assert compress_tree(videos, out, Compression(size=32), shard, 3, workers=1).failed == {}
        parts.append(set(tree(out)) - {".etchat-compress.json"})
    assert sum(map(len, parts)) == len(set.union(*parts)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fps", 0], "fps is 0.0"),
        (["--size", 225], "even number"),
        (["--size", 32, "--workers", 0], "workers is 0"),
        (["--shard", 3, "--num-shards", 3], "from 0 to 2"),
        (["--num-shards", 0], "num_shards is 0; it must be at least 1."),
        (["--size", 64], "what is there was made with size 32, not 64"),
    ],
)
def test_impossible_options_are_one_line(tmp_path, videos, arguments, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".etchat-compress.json").write_text('{"fps": 3.0, "size": 32}')
    result = run("compress", videos, out, *arguments)
    assert result.exit_code == 2
    assert result.output.startswith("etchat: error: ")
    assert message in result.output and len(result.output.splitlines()) == 1


def test_folders_that_cannot_be_meant(tmp_path, videos):
    assert "lies inside of" in run("compress", videos, videos / "out").output
    (tmp_path / "empty").mkdir()
    assert "no videos here" in run("compress", tmp_path / "empty", tmp_path / "out").output


def test_unreadable_settings_name_their_file(tmp_path, videos):
    settings = tmp_path / "out" / ".etchat-compress.json"
    settings.parent.mkdir()
    settings.write_text("{")
    result = run("compress", videos, tmp_path / "out", "--size", 32)
    assert result.exit_code == 2 and f"etchat: error: {settings}: not valid JSON" in result.output
    assert "with {'fps': 3.0, 'size': 32}, delete it." in result.output


def test_killed_compression_leaves_nothing_half_done(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(6):
        write_video(folder / f"{number}.mp4", num_frames=150, fps=30, size=(320, 240), picture=noise_picture)
    out = tmp_path / "out"
    program = (
        "from pathlib import Path\n"
        "from etchat_hf.data.compress import Compression, compress_tree\n"
        "if __name__ == '__main__':\n"
        f"    compress_tree(Path({str(folder)!r}), Path({str(out)!r}), Compression(fps=30, size=224), workers=1)\n"
    )
    script = tmp_path / "compress.py"
    script.write_text(program)
    command = subprocess.Popen([sys.executable, str(script)], cwd=Path(__file__).parents[2], start_new_session=True,
                               env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
    while not list(out.glob("*.mp4")):
        time.sleep(0.02)
        assert command.poll() is None
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    done = {path.name: path.read_bytes() for path in out.glob("*.mp4")}
    assert 0 < len(done) < 6
    assert compress_tree(folder, out, Compression(fps=30, size=224), workers=1) == (6 - len(done), len(done), {})
    assert tree(out) == [".etchat-compress.json", *(f"{number}.mp4" for number in range(6))]
    for number in range(6):
        assert open_video(out / f"{number}.mp4").num_frames == 150
    assert all((out / name).read_bytes() == content for name, content in done.items())


ROWS = [
    *(video_row(i, src=[], note={"by": "me"}) for i in range(7)),
    image_row(7),
    text_row(8),
    *(video_row(i) for i in range(9, 14)),
]


def test_packed_rows_give_the_same_samples(tmp_path, media, processor, monkeypatch):
    monkeypatch.setattr(pack_module, "ROW_GROUP_ROWS", 4)
    path = write_rows(tmp_path / "rows.json", ROWS)
    result = run("pack", path, media, tmp_path / "packed", "--num-shards", 3)
    assert result.exit_code == 0, result.output
    assert "14 rows packed, 0 shards skipped (there already), 0 rows left out" in result.output
    assert tree(tmp_path / "packed") == [".rows.pack.json", *(f"rows-0000{i}-of-00003.parquet" for i in range(3))]
    loose = build_dataset(StageData((DataSource(path, str(media), str(media)),), use_matching=True), processor)
    packed = build_dataset(StageData((DataSource(f"{tmp_path}/packed/*.parquet"),), use_matching=True), processor)
    assert loose.counts() == packed.counts()

    def by_id(dataset):
        rows = [dataset.source_of(i) for i in range(len(dataset))]
        ids = [str(source.read(position)[0]["id"]) for source, position in rows]
        return dict(zip(ids, range(len(dataset)), strict=True))

    loose_ids, packed_ids = by_id(loose), by_id(packed)
    assert loose_ids.keys() == packed_ids.keys()
    for name in ("v0", "v13", "8"):
        first, second = loose[loose_ids[name]], packed[packed_ids[name]]
        assert first.keys() == second.keys()
        assert all((first[key] == second[key]) is True or (first[key] == second[key]).all() for key in first)
    workers = DataLoader(packed, batch_sampler=ETChatBatchSampler(packed, 2), num_workers=2, collate_fn=list)
    assert len(list(workers)) == 7


def test_packed_files_stream_through_datasets_and_share_bytes(tmp_path, media):
    path = write_rows(tmp_path / "rows.json", ROWS)
    pack_module.pack(path, str(media), tmp_path / "packed")
    (file,) = (tmp_path / "packed").glob("*.parquet")
    stream = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    rows = {row["id"]: row for row in stream}
    assert rows["v1"]["media"] == (media / "clips" / "1.mp4").read_bytes()
    assert rows["v1"]["tgt"] == [1.0, 2.5] and rows["8"]["media"] is None
    assert rows["v1"]["other"] == '{"note": {"by": "me"}}'
    content = sum((media / "clips" / f"{i}.mp4").stat().st_size for i in range(3))
    assert file.stat().st_size < 2 * content + 10_000  # twelve rows show these three clips
    assert pyarrow.parquet.ParquetFile(file).num_row_groups == 1


def test_missing_media_are_left_out_listed_and_exit_with_2(tmp_path, media):
    rows = [text_row(0), video_row(1, video="gone.mp4"), video_row(2, video="../out.mp4"), video_row(3, tgt="never")]
    path = write_rows(tmp_path / "rows.json", rows)
    result = run("pack", path, media, tmp_path / "packed")
    assert result.exit_code == 2
    for expected in ("row 1: ", "no such file", "row 2: ", "leaves the root", "row 3: a field", "3 problems"):
        assert expected in result.output
    dataset = ETChatDataset([DataSource(f"{tmp_path}/packed/*.parquet")], SampleEncoder(None))
    assert len(dataset) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--num-shards", 0], "num_shards is 0"), (["--shard", 1], "shard is 1; with num_shards 1")],
)
def test_shards_that_there_cannot_be(tmp_path, media, arguments, message):
    result = run("pack", write_rows(tmp_path / "rows.json", ROWS), media, tmp_path / "packed", *arguments)
    assert result.exit_code == 2 and result.output.startswith(f"etchat: error: {message}")
    assert not (tmp_path / "packed").exists()


def test_a_shard_with_left_out_rows_is_packed_again(tmp_path, media):
    path = write_rows(tmp_path / "rows.json", [text_row(0), video_row(1, video="late.mp4")])
    root, packed = tmp_path / "videos", tmp_path / "packed"
    root.mkdir()
    first, again = (run("pack", path, root, packed) for _ in range(2))
    assert first.exit_code == again.exit_code == 2 and "late.mp4: no such file" in first.output
    shard = packed / "rows-00000-of-00001.parquet"
    assert first.output == again.output and "1 rows packed" in first.output
    assert str(root).encode() not in (packed / ".rows.pack.json").read_bytes()
    assert str(root).encode() not in shard.read_bytes()
    shutil.copy(media / "clips" / "0.mp4", root / "late.mp4")
    assert run("pack", path, root, packed).exit_code == run("pack", path, root, packed).exit_code == 0
    assert tree(packed) == [".rows.pack.json", shard.name] and pyarrow.parquet.read_table(shard).num_rows == 2


def test_packing_goes_on_where_it_was_stopped(tmp_path, media, monkeypatch):
    path = write_rows(tmp_path / "rows.json", ROWS)
    whole = tmp_path / "whole"
    pack_module.pack(path, str(media), whole, num_shards=2)

    def stopped(rows, total):
        yield from list(rows)[:3]
        raise KeyboardInterrupt

    out = tmp_path / "out"
    pack_module.pack(path, str(media), out, num_shards=2, shard=0)
    with pytest.raises(KeyboardInterrupt):
        pack_module.pack(path, str(media), out, num_shards=2, progress=stopped)
    assert tree(out) == [".rows.pack.json", "rows-00000-of-00002.parquet"]
    assert pack_module.pack(path, str(media), out, num_shards=2) == (7, 1, [])
    assert tree(out) == tree(whole)
    for name in tree(out)[1:]:
        assert pyarrow.parquet.read_table(out / name).equals(pyarrow.parquet.read_table(whole / name))


def test_other_annotations_or_numbers_of_shards_are_not_mixed(tmp_path, media):
    path, packed = write_rows(tmp_path / "rows.json", ROWS), tmp_path / "packed"
    assert run("pack", path, media, packed, "--num-shards", 3).exit_code == 0
    other = run("pack", path, media, packed, "--num-shards", 2)
    assert other.exit_code == 2 and "was made with num_shards 3, not 2; choose another destination" in other.output
    write_rows(tmp_path / "rows.json", ROWS[:4])
    other = run("pack", path, media, packed, "--num-shards", 3)
    assert other.exit_code == 2 and "was made with annotations ['" in other.output
    write_rows(tmp_path / "rows.json", [row | {"tgt": [1, 3.5]} if "tgt" in row else row for row in ROWS])
    assert "was made with annotations ['" in run("pack", path, media, packed, "--num-shards", 3).output
    write_rows(tmp_path / "rows.json", ROWS)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    assert "was made with media [" in run("pack", path, elsewhere, packed, "--num-shards", 3).output
    media = shutil.copytree(media, elsewhere / media.name)
    assert run("pack", path, media, packed, "--num-shards", 3).exit_code == 0
    assert len(list(packed.glob("*.parquet"))) == 3


def test_unreadable_rows_are_left_out_of_a_shard(tmp_path, media):
    rows = [text_row(0), {"conversations": 5}, {**text_row(2), "conversations": [{"from": ["human"], "value": ""}]}]
    path = Path(write_rows(tmp_path / "rows.json", [*rows, {**text_row(3), "note": "here"}]))
    path.write_bytes(path.read_bytes().replace(b"here", b"\xff\xfe  "))
    result = run("pack", path, media, tmp_path / "packed")
    assert (
        result.exit_code == 2 and "1 rows packed, 0 shards skipped (there already), 3 rows left out" in result.output
    )
    for expected in ("row 1: a field", "row 2: a field", "row 3: not UTF-8"):
        assert expected in result.output


def test_rows_are_not_held_in_memory_while_they_are_packed(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = text_row(0)
    row["conversations"][1]["value"] = "word " * 2_000
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(8000)))  # 80 MB
    tracemalloc.start()
    assert pack_module.pack(str(path), str(tmp_path), tmp_path / "packed").rows == 8000
    assert tracemalloc.get_traced_memory()[1] < 60e6  # most of it for the index, 8 MB at a time
    tracemalloc.stop()


def test_videos_behind_links_to_folders_are_compressed(tmp_path, videos):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "linked").symlink_to(videos)
    (raw / "round").symlink_to(raw)
    done = compress_tree(raw, tmp_path / "out", Compression(size=64))
    assert done.written == sum(name.startswith("linked/") for name in tree(tmp_path / "out")) > 3
    assert "linked/a.mp4" in tree(tmp_path / "out") and not (tmp_path / "out" / "round").exists()


def test_a_video_that_breaks_off_is_told_of(tmp_path):
    whole = write_video(tmp_path / "whole.mkv", num_frames=100, fps=10)
    cut = cut_short(whole, tmp_path / "cut.mkv", 0.5)
    with pytest.warns(UserWarning, match=r"cut.mkv: its pictures end after \d.\d of 10.0 s; is the file complete"):
        compress_video(cut, tmp_path / "out.mp4", Compression(size=64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress_video(whole, tmp_path / "all.mp4", Compression(size=64))


def test_workers_leave_with_a_killed_compression(tmp_path):
    (folder := tmp_path / "videos").mkdir()
    write_video(folder / "0.mp4", num_frames=600, fps=30, size=(640, 480), picture=noise_picture)
    program = (
        "from pathlib import Path\n"
        "from etchat_hf.data.compress import Compression, compress_tree\n"
        "if __name__ == '__main__':\n"
        f"    compress_tree(Path({str(folder)!r}), Path({str(tmp_path / 'out')!r}), Compression(fps=30), workers=1)\n"
    )
    (tmp_path / "compress.py").write_text(program)
    command = subprocess.Popen([sys.executable, str(tmp_path / "compress.py")], stdout=subprocess.PIPE)
    while not list((tmp_path / "out").glob(".0.mp4.*.partial")):
        time.sleep(0.02)
        assert command.poll() is None
    command.kill()
    command.communicate(timeout=60)  # ends when nobody holds the output any longer
    assert not (tmp_path / "out" / "0.mp4").exists()
    assert compress_tree(folder, tmp_path / "out", Compression(fps=30), workers=1) == (1, 0, {})
    assert tree(tmp_path / "out") == [".etchat-compress.json", "0.mp4"]
