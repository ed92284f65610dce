"""Stages as data, and `etchat data check`."""

from pathlib import Path

import PIL.Image
import pytest
import yaml
from annotation_rows import image_row, run, text_row, turns, video_row, write_rows

from etchat_hf.data import STAGES, DataSource, ETChatDataArguments, StageData, build_dataset
from etchat_hf.data.media import locate
from etchat_hf.toy.generate import generate

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
CONFIGS = sorted(EXAMPLES.rglob("*.yaml"))


@pytest.fixture
def data_root(tmp_path, media):
    """The published layout of stage 3, made of our clips."""
    folder = tmp_path / "data" / "et_instruct_164k"
    folder.mkdir(parents=True)
    (folder / "videos").symlink_to(media)
    rows = [video_row(i, seconds) for i, seconds in enumerate((4, 5, 30, 351))]
    write_rows(folder / "et_instruct_164k_vid.json", rows)
    return tmp_path / "data"


def test_published_filters_and_settings():
    stage3 = STAGES["stage3"]
    assert stage3.use_matching and stage3.conv_type == "phi3" and not stage3.group_by_modality
    assert (stage3.sources[0].min_duration, stage3.sources[0].max_duration, stage3.sources[0].max_words) == (
        5,
        350,
        200,
    )
    assert STAGES["stage1"].conv_type == "plain" and not STAGES["stage1"].use_matching
    assert STAGES["stage2"].pad_to_square and STAGES["stage2"].group_by_modality
    assert STAGES["stage2"].sources[0].max_duration == 350 and STAGES["stage2"].sources[0].max_words is None
    assert STAGES["stage2_3"].sources == STAGES["stage2"].sources + stage3.sources and STAGES["stage2_3"].use_matching
    assert not STAGES["stage3_txt"].use_matching


def test_a_published_stage_is_found_under_its_root(data_root, processor):
    stage = ETChatDataArguments(stage="stage3", data_root=str(data_root), fps=2.0).resolve()
    assert stage.fps == 2.0
    stage.configure(processor)
    dataset = build_dataset(stage, processor)
    assert len(dataset) == 2 and dataset.counts() == {"text": 0, "image": 0, "video": 2}
    assert len(dataset[0]["frame_times"][0]) == 9
    missing = ETChatDataArguments(stage="stage1", data_root=str(data_root)).resolve()
    with pytest.raises(FileNotFoundError, match="data/llava_558k_with_webvid.json: no such annotation file"):
        build_dataset(missing, processor)


def test_own_annotations_with_and_without_a_stage(tmp_path):
    path = write_rows(tmp_path / "own.json", [text_row(0)])
    own = ETChatDataArguments(annotations=[path], video_root="videos", max_words=9).resolve()
    assert own == StageData((DataSource(path, video_root="videos", max_words=9),))
    staged = ETChatDataArguments(stage="stage3", annotations=[path, path], weights=[1, 0.5], video_root="v").resolve()
    assert staged.use_matching and staged.sources[1] == DataSource(path, None, "v", 0.5, 5, 350, 200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Nothing to train on"),
        ({"stage": "stage4"}, "must be one of stage1"),
        ({"annotations": ["a"], "weights": [1, 2]}, "2 weights for 1"),
        ({"annotations": ["a"], "weights": [0]}, "positive"),
        ({"annotations": ["a"], "conv_type": "gpt"}, "conv_type is 'gpt'"),
        ({"annotations": ["a"], "fps": 0.0}, "fps is 0.0"),
        ({"annotations": ["a"], "min_duration": 9.0, "max_duration": 3.0}, "is above max_duration"),
        ({"annotations": ["a"], "max_words": -1}, "must not be negative"),
        ({"stage": "stage3", "video_root": "v"}, "belong to annotations"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ETChatDataArguments(**options).resolve()


@pytest.mark.parametrize("name", ["../x.mp4", "/etc/passwd", "a/../../x", "..", "..\\x", "a/b/../../../x"])
def test_paths_that_leave_the_root_are_refused(tmp_path, name):
    (tmp_path / "x.mp4").touch()
    with pytest.raises(ValueError, match="leaves the root folder"):
        locate(str(tmp_path / "root"), name)


def test_paths_inside_the_root_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "x..mp4").touch()
    assert locate(str(tmp_path), "a/../x..mp4") == str(tmp_path / "x..mp4")
    with pytest.raises(FileNotFoundError, match="no such file"):
        locate(str(tmp_path), "y.mp4")
    with pytest.raises(ValueError, match="no root folder is set"):
        locate(None, "y.mp4")


def test_check_reports_a_good_tree(data_root):
    result = run("data", "check", "stage3", "--data-root", data_root)
    assert result.exit_code == 0, result.output
    assert "rows 4, after filters 2 (2 video)" in result.output
    assert "2 opened" in result.output
    assert result.output.splitlines()[-1] == "2 rows to train on, 0 problems"


def test_check_finds_what_is_wrong(tmp_path, media):
    (media / "clips" / "rubbish.mp4").write_bytes(b"rubbish")
    rows = [
        video_row(0),
        video_row(1, video="clips/none.mp4"),
        video_row(2, video="clips/rubbish.mp4"),
        video_row(3, tgt=[1]),
        video_row(4, video="../secret.mp4"),
        image_row(5),
        {"id": 6},
    ]
    config = {
        "annotations": [write_rows(tmp_path / "rows.json", rows)],
        "image_root": str(media),
        "video_root": str(media),
        "use_matching": True,
        "learning_rate": 1e-3,
    }
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(config))
    result = run("data", "check", tmp_path / "stage.yaml")
    assert result.exit_code == 2
    for expected in (
        "rows 7, after filters 7 (1 text, 1 image, 5 video)",
        "problems: 5",
        "row 1 (id v1): ",
        "row 2: ",
        "row 3 (id v3): the answers hold 2 <vid>, but tgt has 1 times",
        "row 4 (id v4): ../secret.mp4: this path leaves the root folder",
        "row 6 (id 6): there are no conversations",
        "7 rows to train on, 5 problems",
    ):
        assert expected in result.output, result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither a stage"),
        ("a: [", "not valid YAML"),
        ("- a", "not a mapping"),
        ("learning_rate: 1", "Nothing to train on"),
        ("annotations: [missing.json]", "missing.json: no such annotation file"),
        ("annotations: missing/rows.json", "missing/rows.json: no such annotation file"),
        ("annotations: 5", "stage.yaml: annotations is 5; it must be a list"),
        ("annotations: [a, 5]", "annotations is ['a', 5]"),
        ("annotations: [a]\nfps: fast", "stage.yaml: fps is 'fast'; it must be a number"),
        ("annotations: [a]\nmax_words: 2.5", "max_words is 2.5; it must be a whole number"),
        ("annotations: [a]\nuse_matching: 1", "use_matching is 1; it must be true or false"),
        ("annotations: [a]\nvideo_root: no", "video_root is False; it must be a text; put it in quotes"),
        ("annotations: [a]\nweights: {a: 1}", "weights is {'a': 1}"),
    ],
)
def test_check_refuses_bad_configurations(tmp_path, content, message):
    path = tmp_path / "stage.yaml"
    if content is not None:
        path.write_text(content)
    result = run("data", "check", path)
    assert result.exit_code == 2
    assert message in result.output


def test_check_reports_all_that_is_wrong(tmp_path, media):
    """Missing and broken annotations and folders do not hide each other, nor what is wrong with the rest."""
    (tmp_path / "broken.json").write_text("[{}, 5]")
    good = write_rows(tmp_path / "good.json", [video_row(i, tgt=[1]) for i in range(12)] + [image_row(12)])
    config = {
        "annotations": ["gone/a.json", str(tmp_path / "broken.json"), good, "gone/b.jsonl"],
        "eval_annotations": ["gone/eval.json"],
        "image_root": str(tmp_path / "no_images"),
        "video_root": str(media),
        "use_matching": True,
        "min_duration": "1e-3",
    }
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(config))
    result = run("data", "check", tmp_path / "stage.yaml")
    assert result.exit_code == 2
    for expected in (
        "gone/a.json: no such annotation file",
        "broken.json: row 1 (from 0) is 5, not an object",
        f"no_images: no such folder; it is the image_root of {good}",
        "problems: 13",
        "and 3 more; --all shows them",
        "gone/b.jsonl: no such annotation file",
        "gone/eval.json: no such annotation file",
        "13 rows to train on, 0 rows to evaluate on, 17 problems",
    ):
        assert expected in result.output, result.output
    assert "row 11 (id v11)" not in result.output
    assert "row 11 (id v11)" in run("data", "check", tmp_path / "stage.yaml", "--all").output


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_check_reads_every_example(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("data", "check", path)
    assert result.exit_code == 2
    missing = [line for line in result.output.splitlines() if "no such annotation file" in line]
    assert len(missing) == (2 if path.name == "stage2_3.yaml" or path.match("toy/stage3.yaml") else 1)


def test_check_looks_the_toy_data_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate("out/toy/data", seed=0, num_train=3, num_unseen=1, track=lambda values, description: values)
    for stage, rows in (("stage1", "3 rows to train on"), ("stage2", "7 rows"), ("stage3", " rows to evaluate on")):
        result = run("data", "check", EXAMPLES / "toy" / f"{stage}.yaml", "--opened", 2)
        assert result.exit_code == 0, result.output
        assert rows in result.output and result.output.splitlines()[-1].endswith(", 0 problems")


def test_missing_media_folders_stop_before_the_first_step(tmp_path, processor):
    source = DataSource(write_rows(tmp_path / "rows.json", [video_row(0)]), video_root=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone: no such folder; it is the video_root of .*rows.json"):
        build_dataset(StageData((source,), use_matching=True), processor)


def test_evaluation_data_share_the_folders_of_training(data_root, tmp_path):
    assert ETChatDataArguments(stage="stage3").resolve_evaluation() is None
    arguments = ETChatDataArguments(stage="stage3", data_root=str(data_root), eval_annotations=["e.json"])
    (source,) = arguments.resolve_evaluation().sources
    assert source.annotations == "e.json" and source.video_root == f"{data_root}/et_instruct_164k/videos"


def test_image_padding_is_for_images_only(tmp_path, media, processor):
    rows = [image_row(0) | {"conversations": turns("<image>\nWhat?", "Red.")}, video_row(1)]
    source = DataSource(write_rows(tmp_path / "rows.json", rows), str(media), str(media))
    plain, padded = (
        build_dataset(StageData((source,), use_matching=True, pad_to_square=pad), processor) for pad in (False, True)
    )
    assert (plain[0]["pixel_values"] != padded[0]["pixel_values"]).any()
    assert (plain[1]["pixel_values"] == padded[1]["pixel_values"]).all()
    # 60 x 40: a third of the square is padding in the mean colour, which normalises to almost nothing
    assert padded[0]["pixel_values"][0, :, 0].abs().max() < 0.02


@pytest.mark.parametrize("pad", [False, True])
def test_an_animated_image_is_one_frame(tmp_path, processor, pad):
    pictures = [PIL.Image.new("RGB", (60, 40), color) for color in ("red", "blue", "green")]
    pictures[0].save(tmp_path / "moving.gif", save_all=True, append_images=pictures[1:])
    row = image_row(0) | {"image": "moving.gif"}
    source = DataSource(write_rows(tmp_path / "rows.json", [row]), str(tmp_path))
    sample = build_dataset(StageData((source,), pad_to_square=pad), processor)[0]
    assert sample["pixel_values"].shape == (1, 3, 28, 28) and sample["frame_times"] == [[0.0]]
    (tmp_path / "stage.yaml").write_text(
        yaml.safe_dump({"annotations": [source.annotations], "image_root": str(tmp_path)})
    )
    assert run("data", "check", tmp_path / "stage.yaml").exit_code == 0


def test_rows_that_are_no_rows_are_listed_with_the_others(tmp_path, media):
    rows = [video_row(0), video_row(1) | {"conversations": 5}, video_row(2, note="here")]
    path = Path(write_rows(tmp_path / "rows.json", rows))
    path.write_bytes(path.read_bytes().replace(b"here", b"\xff\xfe  "))
    config = {"annotations": [str(path)], "video_root": str(media), "use_matching": True}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(config))
    result = run("data", "check", tmp_path / "stage.yaml")
    assert result.exit_code == 2 and "2 problems" in result.output
    assert "row 1 (id v1): conversations is 5" in result.output and "row 2: not UTF-8" in result.output
