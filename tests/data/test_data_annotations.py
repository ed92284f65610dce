"""Annotation files: every row found where it is, whatever the format; broken files named with their row."""

import json
import os

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from annotation_rows import image_row, text_row, turns, video_row
from huggingface_hub import HfFileSystem

from etchat_hf.data import annotations, media, row_index
from etchat_hf.data.annotations import list_files, open_annotations

ROWS = [
    video_row(0, 7, conversations=turns('Say "}, {" to \\ me \u2028 日本', "Ä b" * 50)),
    image_row(1) | {"nested": {"conversations": [[], {}]}, "empty": ""},
    text_row(2),
    video_row(3, duration="unknown"),
    video_row(4, duration=10**400),
]


def dump_array(path, rows, **options):
    path.write_text(json.dumps(rows, **options), encoding="utf-8")


def dump_indented(path, rows):
    dump_array(path, rows, indent=4, ensure_ascii=False)


def dump_lines(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8", newline=""
    )


def dump_with_byte_order_mark(path, rows):
    path.write_text("\n" + json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8-sig")


@pytest.mark.parametrize("dump", [dump_array, dump_indented, dump_lines, dump_with_byte_order_mark])
@pytest.mark.parametrize("chunk", [3, 7, 64, 8 << 20])
def test_rows_are_read_back_whatever_the_layout_and_chunks(tmp_path, monkeypatch, dump, chunk):
    monkeypatch.setattr(annotations, "CHUNK_BYTES", chunk)
    path = tmp_path / "rows.json"
    dump(path, ROWS)
    (file,) = open_annotations(str(path))
    assert [file.read(i) for i in range(len(file.index))] == ROWS
    assert list(file.read_all()) == ROWS
    assert file.index.duration[0] == 7 and np.isnan(file.index.duration[1:4]).all()
    assert file.index.duration[4] == np.inf
    assert file.index.words.tolist() == [51, 3, 2, 5, 5]
    assert file.index.modality.tolist() == [2, 1, 0, 2, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "row 0"),
        ("[", "row 0"),
        ('[{"id": 1}, {"id": ]', r"row 1 \(from 0\) is not valid JSON"),
        ('[{"id": 1}, {"id": 2', "row 1"),
        ('[{"id": 1} {"id": 2}]', "row 1 .*a comma or ] is missing"),
        ('[{"id": 1}, 5]', "row 1 .*is 5, not an object"),
        ('[{"id": 1}] trailing', "row 1"),
        ('{"id": 1}\n{"id": 2}\n{"id"', "row 2"),
        ("not json", "row 0"),
        ('[{"id": 1}, {"id": ' + "[" * 20_000, r"row 1 \(from 0\) is not valid JSON \(nested too deeply"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 8 << 20])
def test_malformed_json_names_file_and_row(tmp_path, monkeypatch, content, message, chunk):
    monkeypatch.setattr(annotations, "CHUNK_BYTES", chunk)
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        open_annotations(str(path))
    assert str(path) in str(error.value)
    assert not list(tmp_path.glob("*.npz"))


def test_a_row_that_is_no_utf8_is_named_and_hides_no_other(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"id": 1}, {"id": "\xff"}, {"id": 3}]')
    (file,) = open_annotations(str(path))
    with pytest.raises(ValueError, match=f"not UTF-8 .byte 20 of {path}"):
        file.read(1)
    first, second, third = file.read_all()
    assert (first, third) == ({"id": 1}, {"id": 3}) and "not UTF-8" in str(second)


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"conversations": "x" * 5000}] * 3), path)
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="rows.parquet: row group 0 is damaged"):
        open_annotations(str(path))


def test_a_broken_row_does_not_pull_the_rest_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "CHUNK_BYTES", 100)
    monkeypatch.setattr(annotations, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "rows.json"
    path.write_text('[{"id": 1}, {"id": "never closed, ' + "x" * 100_000 + "]")
    with pytest.raises(ValueError, match="row 1"):
        open_annotations(str(path))


def test_index_is_cached_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    dump_array(path, ROWS)
    first = open_annotations(str(path))[0].index
    assert (tmp_path / ".rows.json.index.npz").exists()
    monkeypatch.setattr(row_index.RowIndex, "collect", lambda rows: pytest.fail("scanned again"))
    again = open_annotations(str(path))[0].index
    assert np.array_equal(first.start, again.start) and np.array_equal(first.words, again.words)
    monkeypatch.undo()
    cache = tmp_path / ".rows.json.index.npz"
    for damaged in (b"", b"rubbish", cache.read_bytes()[:500]):
        cache.write_bytes(damaged)
        assert len(open_annotations(str(path))[0].index) == len(ROWS)
    dump_array(path, ROWS[:2])
    assert len(open_annotations(str(path))[0].index) == 2


def test_cache_goes_elsewhere_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    dump_array(path, ROWS)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(row_index, "HF_HOME", str(tmp_path / "home"))
    open_annotations(str(path))
    assert not list(tmp_path.glob(".*.npz"))
    assert len(list((tmp_path / "home" / "etchat_hf").glob("*.npz"))) == 1


def test_a_file_changed_while_in_use_is_noticed(tmp_path):
    path = tmp_path / "rows.json"
    dump_array(path, ROWS)
    (file,) = open_annotations(str(path))
    path.write_text(" " * 10 + path.read_text())
    with pytest.raises(ValueError, match="has changed"):
        file.read(2)


def test_parquet_globs_and_dataset_folders(tmp_path):
    folder = tmp_path / "owner"
    folder.mkdir()
    rows = [text_row(i) | {"id": str(i), "video": None} for i in range(5)] + [video_row(5)]
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, folder / f"train-{name}.parquet", row_group_size=2)
    for given in (f"{folder}/*.parquet", str(folder)):
        files = open_annotations(given)
        assert [row["id"] for file in files for row in file.read_all()] == ["0", "1", "2", "3", "4", "v5"]
        assert [file.read(i)["conversations"] for file in files for i in range(len(file.index))] == [
            row["conversations"] for row in rows
        ]
        assert [kind for file in files for kind in file.index.modality.tolist()] == [0, 0, 0, 0, 0, 2]


def test_unsuitable_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such annotation file"):
        open_annotations(str(tmp_path / "missing.json"))
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match="must be .json, .jsonl or .parquet"):
        open_annotations(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        open_annotations(str(tmp_path / "rows.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no column conversations; it has text"):
        open_annotations(str(tmp_path / "other.parquet"))


def test_hub_urls_stay_as_they_are():
    url = "hf://datasets/owner/name/train.parquet"
    assert list_files(url) == [url]


def test_remote_parquet_is_indexed_once_and_read_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(row_index, "HF_HOME", str(tmp_path))
    with fsspec.filesystem("memory").open("/rows.parquet", "wb") as file:
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([video_row(i) for i in range(5)]), file, row_group_size=2
        )
    rows = annotations.ParquetRows("memory://rows.parquet")
    assert rows.read(3) == video_row(3) and not rows.is_packed
    monkeypatch.setattr(row_index.RowIndex, "collect", lambda rows: pytest.fail("scanned again"))
    assert len(annotations.ParquetRows("memory://rows.parquet").index) == 5


def test_files_on_the_hub_are_downloaded_into_its_cache(tmp_path, monkeypatch):
    asked = []

    def download(repo_id, filename, *, repo_type, revision):
        asked.append((repo_id, filename, repo_type, revision))
        dump_array(tmp_path / "rows.json", ROWS)
        return str(tmp_path / "rows.json")

    monkeypatch.setattr(HfFileSystem, "_repo_and_revision_exist", lambda *_: (True, None))
    monkeypatch.setattr(media, "hf_hub_download", download)
    (file,) = open_annotations("hf://datasets/owner/name@v1/folder/rows.json")
    assert len(file.index) == len(ROWS)
    media.fetch(media.locate("hf://datasets/owner/name/videos/", "a/b.mp4"))
    assert asked == [
        ("owner/name", "folder/rows.json", "dataset", "v1"),
        ("owner/name", "videos/a/b.mp4", "dataset", "main"),
    ]
