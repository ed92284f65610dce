import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

import etchat_hf
from etchat_hf.cli import main
from etchat_hf.verification import write_clip


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_ask_prints_json_as_the_last_line(converted, clip):
    command = [sys.executable, "-m", "etchat_hf.cli", "ask", str(clip), "When does it appear?"]
    command += ["--model", str(converted), "--max-new-tokens", "4", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["duration"] == 12.0 and answer["fps"] == 1.0 and answer["num_frames"] == 12
    assert answer["frame_indices"] == list(range(0, 120, 10))
    assert answer["frame_times"] == [float(second) for second in range(12)]
    assert {"answer", "timestamps", "spans", "confidences", "frames"} <= answer.keys()


def test_ask_times_follow_the_sampling(capsys, eager_vid, clip):
    options = ("--model", eager_vid, "--max-new-tokens", 3, "--fps", 2, "--json")
    code, out, _ = run(capsys, "ask", clip, "When?", *options)
    answer = json.loads(out.splitlines()[-1])
    assert code == 0 and answer["fps"] == 2.0 and len(answer["timestamps"]) == 3
    assert answer["timestamps"] == [frame / 2 for frame in answer["frames"]]
    assert answer["answer"] == "".join(f"{seconds:g}" for seconds in answer["timestamps"])


@pytest.mark.parametrize("spelling", [("--src", "1.2", "3"), ("--src", "1.2", "--src", "3"), ("--src=1.2", "--src=3")])
def test_ask_takes_times(capsys, converted, clip, spelling):
    options = ("--model", converted, "--max-new-tokens", 2, "--json", *spelling)
    code, out, err = run(capsys, "ask", clip, "What is between <vid> and <vid>?", *options)
    assert code == 0, err
    assert "answer" in json.loads(out.splitlines()[-1])


@pytest.fixture
def bad_files(tmp_path, converted, golden, clip):
    """Things that are not what they should be, by name."""
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:200])
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / "bare").mkdir()
    short = shutil.copytree(converted, tmp_path / "short")
    tensors = load_file(short / "model.safetensors")
    tensors.pop("vid_head.0.bias")
    save_file(tensors, short / "model.safetensors", {"format": "pt"})
    cut = shutil.copytree(converted, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:100000])
    narrow = shutil.copytree(converted, tmp_path / "narrow")
    tensors = load_file(narrow / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()
    save_file(tensors, narrow / "model.safetensors", {"format": "pt"})
    odd = shutil.copytree(converted, tmp_path / "odd")
    (odd / "config.json").write_text(json.dumps(json.loads((odd / "config.json").read_text()) | {"alpha": "two"}))
    return {"original": golden / "phi3_stage3" / "original", "tmp": tmp_path}


@pytest.mark.parametrize(
    ("video", "question", "options", "message"),
    [
        ("{tmp}/none.mp4", "When?", (), "none.mp4"),
        ("{tmp}/empty.mp4", "When?", (), "empty.mp4"),
        ("{tmp}/cut.mp4", "When?", (), "cut.mp4"),
        ("{tmp}/notes.txt", "When?", (), "notes.txt"),
        ("{tmp}/bare", "When?", (), "bare"),
        ("{clip}", "After <vid>?", (), "1 <vid>, but src gives 0"),
        ("{clip}", "When?", ("--src", "1"), "0 <vid>, but src gives 1"),
        ("{clip}", "After <vid>?", ("--src", "99"), "99.0 s"),
        ("{clip}", "After <vid>?", ("--src", "-1"), "-1.0 s"),
        ("{clip}", "<image> When?", (), "2 <image> placeholders"),
        ("{clip}", " ", (), "QUESTION is empty"),
        ("{clip}", "When?", ("--fps", "0"), "fps"),
        ("{clip}", "When?", ("--max-frames", "-3"), "max_frames"),
        ("{clip}", "When?", ("--dtype", "int3"), "int3"),
        ("{clip}", "When?", ("--device", "abacus"), "abacus"),
        ("{clip}", "When?", ("--model", "{tmp}/none"), "does not exist"),
        ("{clip}", "When?", ("--model", "../none"), "does not exist"),
        ("{clip}", "When?", ("--model", "{tmp}/bare"), "no config.json"),
        ("{clip}", "When?", ("--model", "{tmp}/notes.txt"), "is a file"),
        ("{clip}", "When?", ("--model", "{original}"), "etchat convert"),
        ("{clip}", "When?", ("--model", "{tmp}/short"), "missing keys: vid_head.0.bias"),
        ("{clip}", "When?", ("--model", "{tmp}/cut"), "cut cannot be loaded"),
        ("{clip}", "When?", ("--model", "{tmp}/narrow"), "mismatched keys"),
        ("{clip}", "When?", ("--model", "{tmp}/odd"), "alpha"),
        ("{clip}", "When?", ("--fps", "1e9"), "fps=1e+09"),
    ],
)
def test_ask_refuses_in_one_line(capsys, converted, clip, bad_files, video, question, options, message):
    names = bad_files | {"clip": clip}
    options = [option.format(**names) for option in options]
    model = [] if "--model" in options else ["--model", converted]
    code, out, err = run(capsys, "ask", video.format(**names), question, *model, *options)
    assert code == 2 and out == ""
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("etchat: error: ")
    assert "Traceback" not in err


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"etchat_hf {etchat_hf.__version__}\n")


def test_usage_errors_exit_with_2(capsys, clip):
    assert run(capsys, "ask", clip)[0] == 2
    assert run(capsys, "ask", clip, "When?", "--model", "x", "--frobnicate")[0] == 2
    assert run(capsys, "nonsense")[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("After <vid>?",), "1 <vid>, but src gives 0"),
        (("When?", "--window", "0"), "longer than its overlap"),
        (("When?", "--window", "5", "--overlap", "5"), "longer than its overlap"),
    ],
)
def test_what_needs_no_model_is_checked_before_one_is_loaded(capsys, clip, options, message):
    code, _, err = run(capsys, "ask", clip, *options, "--model", "no/such/model")
    assert code == 2 and message in err


def test_verify_reports(capsys, converted):
    code, out, _ = run(capsys, "verify", converted)
    assert code == 0
    for line in ("load: ok", "prompt ids: [521, 347, 13", "question: When does the red square appear?", "answer: "):
        assert line in out


def test_convert_is_the_script(capsys, golden, tmp_path):
    options = ("--qformer-tokenizer", golden / "bert", "--vision-heads", 4, "--qformer-heads", 4)
    source = golden / "phi3_stage3" / "original"
    assert run(capsys, "convert", source, tmp_path / "cli", *options)[0] == 0
    script = [sys.executable, "conversion/convert_original.py", source, tmp_path / "script", *options]
    root = golden.parents[1]
    result = subprocess.run([str(part) for part in script], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
    for file in sorted((tmp_path / "cli").rglob("*")):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "script" / file.relative_to(tmp_path / "cli")).read_bytes(), file


def test_ask_several_questions_of_a_clip_encoded_once(capsys, converted, eager_vid, clip, tmp_path):
    options = ("--model", eager_vid, "--max-new-tokens", 2, "--json")
    code, out, err = run(capsys, "ask", clip, "When?", "And after <vid>?", *options, "--src", "3")
    assert code == 0, err
    first, second = map(json.loads, out.splitlines())
    assert (first["question"], second["question"]) == ("When?", "And after <vid>?")
    alone = [
        run(capsys, "ask", clip, "When?", *options),
        run(capsys, "ask", clip, "And after <vid>?", *options, "--src", "3"),
    ]
    assert [json.loads(out) for _, out, _ in alone] == [first, second]
    code, out, _ = run(capsys, "ask", clip, "When?", "Where?", *options, "--window", 6)
    assert code == 0 and [len(json.loads(line)["windows"]) for line in out.splitlines()] == [2, 2]
    code, out, err = run(capsys, "ask", clip, "When?", "And after <vid>?", *options, "--src", "3", "--src", "4")
    assert (code, out) == (2, "") and "hold 1 <vid>, but src gives 2 times" in err


def test_a_conversation_goes_on_beyond_the_context_and_says_what_it_leaves_out(tmp_path):
    write_clip(tmp_path / "dense.mp4", fps=25, size=64)
    command = [sys.executable, "-m", "etchat_hf.cli", "ask", str(tmp_path / "dense.mp4"), "--interactive"]
    command += ["--fps", "25", "--max-new-tokens", "4", "--json"]
    questions = ["When?", "When?", "word " * 600, "When?"]
    result = subprocess.run(command, input="\n".join(questions), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["num_frames"] for answer in answers] == [256] * 3
    assert answers[1] == answers[2] == answers[0]  # each had the context for itself
    told = [line for line in result.stderr.splitlines() if "left out" in line or "error" in line]
    assert len(told) == 3 and "turn 1 of it is" in told[0] and "turn 2 of it is" in told[2]
    assert told[1].startswith("etchat: error: ") and "the question is too long" in told[1]
    assert "indexing errors" not in result.stderr


def test_ask_and_infer_share_a_cache(capsys, eager_vid, clip, tmp_path, monkeypatch):
    options = ("--model", eager_vid, "--max-new-tokens", 2, "--cache", tmp_path / "cache")
    code, expected, err = run(capsys, "ask", clip, "When?", *options)
    assert code == 0 and len(list((tmp_path / "cache").glob("*.safetensors"))) == 1, err
    monkeypatch.setattr("etchat_hf.video_decoding_etchat.PyAVReader.read", None)  # nothing is decoded again
    assert run(capsys, "ask", clip, "When?", *options)[:2] == (0, expected)
    (tmp_path / "rows.json").write_text(json.dumps([{"task": "tvg", "video": clip.name, "q": "When?"}]))
    places = ("--annotations", tmp_path / "rows.json", "--videos", clip.parent, "--output", tmp_path / "out")
    code, _, err = run(capsys, "infer", "etbench", *places, *options)
    assert code == 0 and "1 of 1 rows answered" in err
