"""Bulk inference with a tiny random model on real videos: one process or three, killed or not, answers are equal."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor
from typer.testing import CliRunner

from etchat_hf import ClipEncoder, ETChatForConditionalGeneration
from etchat_hf.chat_templates import load_chat_template
from etchat_hf.cli import main
from etchat_hf.evaluation import evaluate_charades, evaluate_mvbench, pipeline
from etchat_hf.evaluation.answering import build_inputs, write_prompt
from etchat_hf.evaluation.cli import app as evaluate_app
from etchat_hf.evaluation.clips import sample_video
from etchat_hf.evaluation.infer_cli import app
from etchat_hf.evaluation.predictions import load_predictions
from etchat_hf.evaluation.runner import Settings, infer
from etchat_hf.evaluation.tasks import CHARADES, ETBENCH, MVBENCH
from etchat_hf.inference import ask, load
from etchat_hf.toy.tiny_model import build_model, build_processor

sys.path.insert(0, str(Path(__file__).parents[1]))
from video_files import cut_short, write_video  # noqa: E402

NUM_VIDEOS = 8
SETTINGS = Settings(batch_size=3, max_new_tokens=16)
FAILING = {4: "src holds 500", 9: "missing.mp4", 12: "torn.mp4", 15: "not a path inside", 20: "0 times", 22: "'q'"}


@pytest.fixture(scope="module")
def tiny():
    """A random model whose answers are varied and full of `<vid>`."""
    torch.manual_seed(0)
    processor = build_processor()
    processor.chat_template = load_chat_template("phi3")
    template = build_model(processor)
    config = template.config
    config.use_matching = config.bi_attention = True
    model = ETChatForConditionalGeneration(config).eval()
    model.generation_config = template.generation_config
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3)
        model.lm_head.weight[processor.match_token_id] *= 2
        model.lm_head.weight[model.generation_config.eos_token_id] *= 1.2  # answers of different lengths
    return model, processor


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny):
    """A model's folder, videos, and E.T. Bench rows of which six must fail, each in its own way."""
    folder = tmp_path_factory.mktemp("world")
    model, processor = tiny
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    videos = folder / "videos"
    (videos / "deep").mkdir(parents=True)
    for k in range(NUM_VIDEOS):
        write_video(videos / "deep" / f"{k}.mp4", num_frames=20 + 10 * k, fps=5)
    cut_short(videos / "deep" / "0.mp4", videos / "torn.mp4", keep=0.2)
    rows = [make_row(k) for k in range(30)]
    rows[4]["src"] = [500.0, 501.0]
    rows[9]["video"] = "missing.mp4"
    rows[12]["video"] = "torn.mp4"
    rows[15]["video"] = "../torn.mp4"
    rows[20]["q"], rows[20]["src"] = "Is it <vid>?", []
    rows[22]["q"] = None
    (folder / "rows.json").write_text(json.dumps(rows, indent=2))
    return folder, rows


def make_row(k: int) -> dict:
    """Rows of five tasks in turn; some videos are asked about often, some once."""
    video = k % NUM_VIDEOS if k < 20 else 7
    row = {"version": 1.0, "idx": k, "task": ("tvg", "rar", "vhd", "gvq", "tem")[k % 5], "source": "toy"}
    row |= {"video": f"deep/{video}.mp4", "duration": 4.0 + 2 * video}
    row["q"] = {
        "tvg": "When is the red circle visible?",
        "rar": "Which shape is shown at <vid>?\n(A) a red circle (B) a blue square",
        "vhd": "Look: <image>\nWhen does it change, and where in <image>?",
        "gvq": "Which shape is visible? (A) a red circle (B) a blue square",
        "tem": "It is visible from <vid> to <vid>. When is it visible again?",
    }[row["task"]]
    row |= {"src": {"rar": [2.4], "tem": [0.5, 3.0]}.get(row["task"], []), "o": ["a red circle", "a blue square"]}
    return row | {"p": 1, "tgt": [[1.0, 3.0]] if row["task"] in ("tem", "vhd") else [1.0, 3.0]}


@pytest.fixture(scope="module")
def alone(tiny, world):
    """What one process answers."""
    folder, rows = world
    return infer(*tiny, ETBENCH, rows, folder / "videos", SETTINGS, show_progress=False)


def test_rows_keep_their_structure_and_failures_their_reason(world, alone):
    _, rows = world
    assert [{key: value for key, value in row.items() if key != "a"} for row in alone.predictions] == rows
    assert list(alone.failures) == list(FAILING)
    for index, words in FAILING.items():
        assert words in alone.failures[index]
        assert alone.predictions[index]["a"] == ""
    answers = [row["a"] for index, row in enumerate(alone.predictions) if index not in FAILING]
    assert sum(map(bool, answers)) > 18 and len(set(answers)) > 12
    assert any(character.isdigit() for answer in answers for character in answer)


def test_answers_equal_those_of_a_single_question(tiny, world, alone):
    folder, rows = world
    for index in (0, 3, 14, 29):
        row = rows[index]
        single = ask(*tiny, folder / "videos" / row["video"], row["q"], src=row["src"], max_new_tokens=16)
        assert alone.predictions[index]["a"] == single["answer"]


def test_choice_is_begun_and_penalised_as_in_the_original(tiny, world, alone):
    folder, rows = world
    model, processor = tiny
    row = rows[1]
    content = [{"type": "video"}, {"type": "text", "text": row["q"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(
        text=prompt + "Best Option: (",
        videos=str(folder / "videos" / row["video"]),
        qformer_text=row["q"],
        src=row["src"],
    )
    penalty, skipped = RepetitionPenaltyLogitsProcessor(1.2), (processor.match_token_id, processor.image_token_id)

    def without_frames(ids, scores):
        return penalty(torch.tensor([[i for i in ids[0].tolist() if i not in skipped]]), scores)

    outputs = model.generate(
        **inputs, max_new_tokens=16, logits_processor=[without_frames], return_dict_in_generate=True
    )
    expected = processor.post_process(outputs)[0]["text"]
    plain = processor.post_process(model.generate(**inputs, max_new_tokens=16, return_dict_in_generate=True))
    assert alone.predictions[1]["a"] == expected != plain[0]["text"]


def test_penalty_counts_neither_padding_nor_frames(tiny, world, monkeypatch):
    folder, rows = world
    model, processor = tiny
    generate, calls = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **inputs: calls.append(inputs) or generate(**inputs))
    infer(model, processor, ETBENCH, rows[1:12:5], folder / "videos", SETTINGS, show_progress=False)
    (inputs,) = calls
    ids, counted = inputs["input_ids"], inputs["logits_processor"][0].counted
    assert (ids == processor.tokenizer.pad_token_id).any()
    assert torch.equal(counted, (ids != processor.tokenizer.pad_token_id) & (ids != processor.image_token_id))


def test_placeholders_of_the_question_all_show_the_video(tiny, world, alone):
    folder, rows = world
    model, processor = tiny
    row = rows[2]
    prompt = processor.apply_chat_template([{"role": "user", "content": row["q"]}], add_generation_prompt=True)
    video, question = str(folder / "videos" / row["video"]), row["q"].replace("<image>", "").strip()
    inputs = processor(text=prompt, videos=[video] * 2, qformer_text=[question] * 2)
    outputs = model.generate(**inputs, max_new_tokens=16, return_dict_in_generate=True)
    assert processor.post_process(outputs)[0]["text"] == alone.predictions[2]["a"]


@pytest.mark.parametrize("use_time_tag", [False, True])
def test_inputs_equal_the_processors(tiny, world, use_time_tag, monkeypatch):
    folder, rows = world
    model, processor = tiny
    monkeypatch.setattr(processor, "use_time_tag", use_time_tag)
    monkeypatch.setattr(model.config, "use_time_tag", use_time_tag)
    shown = [rows[6], rows[14], rows[8]]  # two of them about one video
    assert shown[0]["video"] == shown[1]["video"] != shown[2]["video"]
    paths = [folder / "videos" / row["video"] for row in shown]
    clips = [sample_video(processor.video_processor, paths[k]) for k in (0, 0, 2)]
    requests = [ETBENCH.request(row) for row in shown]
    prompts = [write_prompt(processor, model.config, *pair, 16) for pair in zip(requests, clips, strict=True)]
    found = build_inputs(processor, prompts, [0, 0, 1], [clips[0].frame_times, clips[2].frame_times])
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": f"<image>\n{row['q']}"}], add_generation_prompt=True
        )
        for row in shown
    ]
    texts[0] += "Best Option: ("
    expected = processor(
        text=texts, videos=paths, qformer_text=[r["q"] for r in shown], src=[r["src"] for r in shown],
        padding_side="left",
    )  # fmt: skip
    assert len(expected.pop("pixel_values")) == len(clips[0].frame_times) + len(clips[2].frame_times)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]) if torch.is_tensor(value) else value == expected[key], key


def test_answer_start_follows_a_space_where_the_prompt_ends_in_none(tiny, world, monkeypatch):
    folder, rows = world
    model, processor = tiny
    monkeypatch.setattr(processor, "chat_template", load_chat_template("vicuna_v1"))
    clip = sample_video(processor.video_processor, folder / "videos" / rows[1]["video"])
    prompt = write_prompt(processor, model.config, ETBENCH.request(rows[1]), clip, 16)
    assert prompt.text.endswith(" ASSISTANT: Best Option: (")


@pytest.mark.parametrize("batch_size", [1, 8])
def test_answers_do_not_depend_on_the_batch_size(tiny, world, alone, batch_size):
    folder, rows = world
    settings = Settings(batch_size=batch_size, max_new_tokens=16, decode_workers=1)
    other = infer(*tiny, ETBENCH, rows, folder / "videos", settings, show_progress=False)
    assert (other.predictions, other.failures) == (alone.predictions, alone.failures)


def test_each_row_ends_where_its_context_does(tiny, world, monkeypatch):
    folder, rows = world
    model, processor = tiny
    same_question = [{**rows[0], "video": f"deep/{k}.mp4"} for k in range(NUM_VIDEOS)]
    clip = sample_video(processor.video_processor, folder / "videos" / "deep" / f"{NUM_VIDEOS - 1}.mp4")
    longest = write_prompt(processor, model.config, ETBENCH.request(rows[0]), clip, 16)
    limit = len(processor.tokenizer(longest.text).input_ids) + 2
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", limit)
    single, batched = (
        infer(*tiny, ETBENCH, same_question, folder / "videos", Settings(batch_size=size), show_progress=False)
        for size in (1, NUM_VIDEOS)
    )
    assert single.predictions == batched.predictions and not single.failures
    assert len(single.predictions[-1]["a"]) < max(len(row["a"]) for row in single.predictions)


def test_sampling_is_reproducible_by_row(tiny, world, alone):
    folder, rows = world
    sampled = [
        infer(
            *tiny,
            ETBENCH,
            rows[:8],
            folder / "videos",
            Settings(batch_size=batch_size, max_new_tokens=16, sample=True, seed=seed),
            show_progress=False,
        ).predictions
        for batch_size, seed in ((3, 1), (1, 1), (3, 2))
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0] != alone.predictions[:8]


def test_each_video_is_encoded_once(tiny, world, alone, monkeypatch):
    folder, rows = world
    model, processor = tiny
    encoded = []
    encode = model.get_vision_features
    monkeypatch.setattr(model, "get_vision_features", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    infer(model, processor, ETBENCH, rows, folder / "videos", SETTINGS, show_progress=False)
    assert sorted(encoded) == [4 + 2 * k for k in range(NUM_VIDEOS)]


def test_out_of_memory_falls_back_to_single_rows(tiny, world, alone, monkeypatch, capsys):
    folder, rows = world
    answer_batch = pipeline.answer_batch

    def small_memory(model, processor, prompts, *rest):
        if len(prompts) > 1 or "from" in prompts[0].text:
            raise torch.OutOfMemoryError("tried to allocate")
        return answer_batch(model, processor, prompts, *rest)

    monkeypatch.setattr(pipeline, "answer_batch", small_memory)
    result = infer(*tiny, ETBENCH, rows[:6], folder / "videos", SETTINGS, show_progress=False)
    assert [row["a"] for row in result.predictions[:4]] == [row["a"] for row in alone.predictions[:4]]
    assert set(result.failures) == {4} and "out of memory" in capsys.readouterr().err


def test_out_of_memory_in_the_vision_encoder_fails_the_rows_of_that_video(tiny, world, alone, monkeypatch):
    folder, rows = world
    model = tiny[0]
    encode = model.get_vision_features

    def small_memory(pixels):
        if len(pixels) == 8:  # those of the third video
            raise torch.OutOfMemoryError("tried to allocate")
        return encode(pixels)

    monkeypatch.setattr(model, "get_vision_features", small_memory)
    result = infer(*tiny, ETBENCH, rows[:4], folder / "videos", SETTINGS, show_progress=False)
    assert result.failures == {2: "out of memory: tried to allocate"}
    assert [result.predictions[k]["a"] for k in (0, 1, 3)] == [alone.predictions[k]["a"] for k in (0, 1, 3)]


def test_stored_clips_that_vanish_during_the_run_are_decoded(tiny, world, alone, tmp_path, monkeypatch):
    folder, rows = world
    infer(
        *tiny,
        ETBENCH,
        rows[:4],
        folder / "videos",
        SETTINGS,
        show_progress=False,
        encoder=ClipEncoder(*tiny, tmp_path),
    )
    encoder = ClipEncoder(*tiny, tmp_path)
    encode = encoder.encode

    def too_late(clip):
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
        return encode(clip)

    monkeypatch.setattr(encoder, "encode", too_late)
    result = infer(*tiny, ETBENCH, rows[:4], folder / "videos", SETTINGS, show_progress=False, encoder=encoder)
    assert result.predictions[:4] == alone.predictions[:4] and not result.failures


def test_a_cache_that_cannot_be_written_stops_nothing(tiny, world, alone, tmp_path):
    folder, rows = world
    encoder = ClipEncoder(*tiny, tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").touch()
    with pytest.warns(UserWarning, match="a clip is not stored"):
        result = infer(*tiny, ETBENCH, rows[:4], folder / "videos", SETTINGS, show_progress=False, encoder=encoder)
    assert result.predictions[:4] == alone.predictions[:4] and not result.failures


def test_too_long_a_video_fails_and_says_what_to_do(tiny, world):
    folder, rows = world
    result = infer(*tiny, ETBENCH, rows[:2], folder / "videos", Settings(fps=500), show_progress=False)
    assert all("--fps" in reason for reason in result.failures.values()) and len(result.failures) == 2


def test_too_long_a_question_fails_and_is_not_blamed_on_the_video(tiny, world):
    folder, rows = world
    limit = tiny[0].config.text_config.max_position_embeddings
    question = {**rows[0], "q": "When? " * limit}
    result = infer(*tiny, ETBENCH, [question], folder / "videos", SETTINGS, show_progress=False)
    assert "the question is too long: its text takes" in result.failures[0] and "--fps" not in result.failures[0]


def test_training_mode_neither_matters_nor_changes(tiny, world, alone):
    folder, rows = world
    model, processor = tiny
    model.train()
    result = infer(model, processor, ETBENCH, rows[:3], folder / "videos", SETTINGS, show_progress=False)
    assert model.training and [row["a"] for row in result.predictions] == [row["a"] for row in alone.predictions[:3]]
    model.eval()


@pytest.mark.parametrize(("length", "is_span"), [(2, True), (3, False)])
def test_charades_predicts_the_matched_seconds(tiny, world, tmp_path, monkeypatch, length, is_span):
    """Of answers that are nothing but `<vid>`: two make a span, as they come; three make none."""
    model, processor = tiny
    others = [token for token in range(model.config.text_config.vocab_size) if token != processor.match_token_id]
    monkeypatch.setattr(model.generation_config, "suppress_tokens", others)
    folder, _ = world
    lines = "".join(f"deep/{k} 1.0 3.0##the red circle appears.\n" for k in range(4)) + "nowhere 0 1##a.\n"
    (tmp_path / "test.txt").write_text(lines)
    rows = CHARADES.read(tmp_path / "test.txt")
    settings = Settings(batch_size=2, max_new_tokens=length)
    result = infer(*tiny, CHARADES, rows, folder / "videos", settings, show_progress=False)
    for k, row in enumerate(result.predictions[:4]):
        question = "Localize the video moment according to the query 'the red circle appears'."
        single = ask(*tiny, folder / "videos" / "deep" / f"{k}.mp4", question, max_new_tokens=length)
        assert row["response"] == single["answer"] and len(single["timestamps"]) == length
        assert row["pred"] == single["timestamps"]
    assert result.predictions[4]["pred"] is None and list(result.failures) == [4]
    scores = evaluate_charades(result.predictions)
    assert scores["total"] == 5 and scores["failed"] == (1 if is_span else 5)


def test_mvbench_answers_can_be_scored(tiny, world):
    folder, _ = world
    rows = [
        {"task": "t", "video": "deep/1.mp4", "question": "What?", "candidates": ["a", "b"], "answer": "b"} | segment
        for segment in ({}, {"start": 1.0, "end": 3.0}, {"start": 50, "end": 60})
    ]
    result = infer(*tiny, MVBENCH, rows, folder / "videos", SETTINGS, show_progress=False)
    assert list(result.failures) == [2] and result.predictions[0]["a"] != result.predictions[1]["a"]
    assert evaluate_mvbench(result.predictions)["by_task"]["t"]["Total"] == 3


def command(world, output, *options):
    folder, _ = world
    options = ("--batch-size", 3, "--max-new-tokens", 16, "--output", output, *options)
    files = ("--annotations", folder / "rows.json", "--videos", folder / "videos", "--model", folder / "model")
    return [str(part) for part in ("etbench", *files, *options)]


def run_rank(rank: int, count: int, port: int, log: Path, arguments: list[str]) -> None:
    """One process of a launch, told of the others as torchrun and accelerate tell it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(log, "a", buffering=1)
    app(arguments)


def start_processes(count: int, log: Path, arguments: list[str]) -> list:
    """Starts `etchat infer` on so many processes; a server that has imported everything forks them, to save time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["etchat_hf.inference", "etchat_hf.evaluation.runner", "etchat_hf.toy.tiny_model"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=run_rank, args=(r, count, port, log, arguments)) for r in range(count)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list) -> list[int]:
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


def journal_records(output: Path) -> list[dict]:
    lines = [line for file in (output / "progress").glob("*.jsonl") for line in file.read_bytes().split(b"\n")[:-1]]
    return [json.loads(line) for line in lines]


def journal_rows(output: Path) -> list[int]:
    return sorted(record["row"] for record in journal_records(output))


def check_files(output: Path, alone) -> None:
    text = json.dumps(alone.predictions, ensure_ascii=False, indent=1) + "\n"
    assert (output / "predictions.json").read_text() == text
    failures = json.loads((output / "failures.json").read_text())
    assert {entry["row"]: entry["reason"] for entry in failures} == alone.failures
    assert sorted(path.name for path in output.iterdir()) == ["failures.json", "predictions.json", "progress"]


def test_accelerate_launch_writes_the_same_files_once(world, alone, tmp_path):
    output, script, log = tmp_path / "out", tmp_path / "infer.py", tmp_path / "log.txt"
    script.write_text("from etchat_hf.evaluation.infer_cli import app\napp()\n")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    with open(log, "w") as file:
        launched = subprocess.run(
            [*launcher, str(script), *command(world, output)], stdout=file, stderr=file, timeout=120
        )
    assert launched.returncode == 1, log.read_text()  # some rows failed
    check_files(output, alone)
    # Both processes did their share, no row was done twice, and only one process spoke.
    assert len(list((output / "progress").glob("*.jsonl"))) == 2
    assert journal_rows(output) == sorted(set(range(30)) - {22})
    assert log.read_text().count("24 of 30 rows answered") == 1


def test_three_processes_write_the_same_files(world, alone, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log.txt"
    assert finish(start_processes(3, log, command(world, output))) == [1, 0, 0]
    check_files(output, alone)
    assert journal_rows(output) == sorted(set(range(30)) - {22})
    assert log.read_text().count("24 of 30 rows answered") == 1


@pytest.mark.parametrize(("first", "second", "answers"), [(2, 3, 6), (1, 2, 14)])
def test_a_killed_run_goes_on_with_another_number_of_processes(world, alone, tmp_path, first, second, answers):
    output, log = tmp_path / "out", tmp_path / "log.txt"
    processes = start_processes(first, log, command(world, output))
    deadline = time.monotonic() + 60
    while len(journal_records(output)) < answers:
        assert processes[0].is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    for process in processes:
        process.kill()
    assert finish(processes) == [-signal.SIGKILL] * first
    assert not (output / "predictions.json").exists()
    survived = journal_records(output)
    assert answers <= len(survived) < 29
    journals = sorted((output / "progress").glob("*.jsonl"))
    with open(journals[0], "ab") as file:
        file.write(b'{"row": 29, "text": "tor')

    assert finish(start_processes(second, log, command(world, output))) == [1, *[0] * (second - 1)]
    check_files(output, alone)
    for journal in journals:
        journal.unlink()
    answered = {record["row"] for record in survived if "error" not in record}
    assert answered and not answered & set(journal_rows(output))


def test_command_line_defaults_resumes_retries_and_scores(world, tmp_path):
    folder, rows = world
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    (tmp_path / "videos").mkdir()
    for k in (1, 2):
        shutil.copy(folder / "videos" / "deep" / f"{k}.mp4", tmp_path / "videos" / f"{k}.mp4")
    few = [{**rows[k], "video": f"{k % 3 + 1}.mp4"} for k in (0, 1, 3)] + [{**rows[0], "video": "3.mp4", "idx": 9}]
    (tmp_path / "rows.json").write_text(json.dumps(few))
    paths = ["--annotations", tmp_path / "rows.json", "--videos", tmp_path / "videos", "--model", model]
    arguments = [str(part) for part in ("etbench", *paths, "--max-new-tokens", 8)]

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "3 of 4 rows answered" in result.stderr
    scored = CliRunner().invoke(evaluate_app, ["etbench", str(model / "etbench"), "--similarity", "jaccard"])
    assert scored.exit_code == 0 and "1 x failed inference: row 3: no 3.mp4" in scored.stderr

    shutil.copy(folder / "videos" / "deep" / "3.mp4", tmp_path / "videos" / "3.mp4")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "4 of 4 rows answered, 3 of them already there" in result.stderr
    assert journal_rows(model / "etbench") == [0, 1, 2, 3, 3]

    result = CliRunner().invoke(app, [*arguments, "--sample"])
    assert isinstance(result.exception, ValueError) and "not the same sampling seed" in str(result.exception)
    result = CliRunner().invoke(app, [*arguments, "--sample", "--restart"])
    assert result.exit_code == 0 and journal_rows(model / "etbench") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--annotations": "{tmp}/none.json"}, "none.json: No such file or directory"),
        ({"--annotations": "{tmp}"}, "Is a directory"),
        ({"--annotations": "{tmp}/empty.json"}, "empty.json: the array is empty"),
        ({"--annotations": "{tmp}/dict.json"}, "dict.json: expected a JSON array of rows, got dict"),
        ({"--annotations": "{tmp}/list.json"}, "list.json row 0: expected a JSON object, got 3"),
        ({"--annotations": "{tmp}/torn.json"}, "torn.json: not a JSON file"),
        ({"--videos": "{tmp}/none"}, "none: no such folder of videos"),
        ({"--videos": "{tmp}/torn.json"}, "torn.json: no such folder of videos"),
        ({"--model": "{tmp}/none"}, "none does not exist, and is not a Hub id"),
        ({"--model": "{tmp}"}, "holds no config.json"),
        ({"--output": "{tmp}/torn.json"}, "torn.json: File exists"),
        ({"--output": "{tmp}/torn.json/deep"}, "torn.json/deep: Not a directory"),
        ({"--batch-size": "0"}, "batch_size is 0; it must be positive"),
        ({"--max-new-tokens": "-1"}, "max_new_tokens is -1; it must be positive"),
        ({"--fps": "0"}, "fps is 0.0; it must be positive"),
        ({"--fps": "nan"}, "fps is nan; it must be positive"),
        ({"--decode-workers": "0"}, "decode_workers is 0; it must be positive"),
        ({"--seed": "-1"}, "seed is -1; it must not be negative"),
        ({"--dtype": "int3"}, "'int3'"),
        ({"--device": "abacus"}, "abacus"),
    ],
)
def test_bad_arguments_are_named_in_one_line(world, tmp_path, capsys, changed, message):
    folder, _ = world
    for name, content in (("empty", "[]"), ("dict", "{}"), ("list", "[3]"), ("torn", "[")):
        (tmp_path / f"{name}.json").write_text(content)
    options = {"--annotations": folder / "rows.json", "--videos": folder / "videos", "--model": folder / "model"}
    options |= {"--output": tmp_path / "out"} | {key: value.format(tmp=tmp_path) for key, value in changed.items()}
    with pytest.raises(SystemExit) as stop:
        main(["infer", "etbench", *(str(part) for option in options.items() for part in option)])
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert stop.value.code == 2 and captured.out == "" and "Traceback" not in captured.err
    assert last.startswith("etchat: error: ") and message in last
    assert not (tmp_path / "out" / "predictions.json").exists()


def test_what_is_answered_is_not_asked_again(tiny, world, tmp_path, monkeypatch):
    folder, rows = world
    settings = Settings(batch_size=2, max_new_tokens=4)
    infer(*tiny, ETBENCH, rows[:4], folder / "videos", settings, tmp_path, show_progress=False)
    (journal,) = (tmp_path / "progress").glob("*.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    lost = json.loads(lines[-1])["row"]
    journal.write_text("".join(lines[:-1]))
    asked = []
    answer_batch = pipeline.answer_batch
    monkeypatch.setattr(pipeline, "answer_batch", lambda *args: asked.append(len(args[2])) or answer_batch(*args))
    before = json.loads((tmp_path / "predictions.json").read_text())
    result = infer(*tiny, ETBENCH, rows[:4], folder / "videos", settings, tmp_path, show_progress=False)
    assert asked == [2] and result.num_known == 3  # the lost row, in the company it had
    assert result.predictions == before and journal_rows(tmp_path).count(lost) == 1
    infer(*tiny, ETBENCH, rows[:4], folder / "videos", settings, tmp_path, show_progress=False)
    assert asked == [2]


def test_restarting_discards_the_merged_answers_at_once(tiny, world, tmp_path, monkeypatch):
    folder, rows = world
    settings = Settings(max_new_tokens=2)
    infer(*tiny, ETBENCH, rows[:2], folder / "videos", settings, tmp_path, show_progress=False)
    assert load_predictions([tmp_path])[0]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "answer_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        infer(*tiny, ETBENCH, rows[:2], folder / "videos", settings, tmp_path, restart=True, show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["progress"]
    with pytest.raises(ValueError, match="unfinished, with 0 answers"):
        load_predictions([tmp_path])


def test_broken_annotations_spoil_no_other_rows_score(tiny, world, tmp_path):
    folder, rows = world
    few = [dict(row) for row in rows[:4]]
    del few[1]["source"]
    few[2]["tgt"], few[3]["video"] = "1 - 3", 5
    infer(*tiny, ETBENCH, few, folder / "videos", SETTINGS, tmp_path, show_progress=False)
    scored = CliRunner().invoke(evaluate_app, ["etbench", str(tmp_path), "--similarity", "jaccard"])
    assert scored.exit_code == 0, scored.exception
    assert "3 x broken annotation: " in scored.stderr and "row 1 (idx 1): field 'source' is missing" in scored.stderr
    assert "failed inference: row 3: field 'video' should be str, got 5" in scored.stderr


def test_answers_of_another_model_are_not_taken_over(tiny, world, tmp_path):
    folder, rows = world
    model, processor = tiny
    settings = Settings(max_new_tokens=2)
    infer(model, processor, ETBENCH, rows[:1], folder / "videos", settings, tmp_path, show_progress=False)
    bias = model.vid_head[1].bias
    with torch.no_grad():
        bias += 1.0
    with pytest.raises(ValueError, match="not the same model"):
        infer(model, processor, ETBENCH, rows[:1], folder / "videos", settings, tmp_path, show_progress=False)
    with torch.no_grad():
        bias -= 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, processor: setattr(processor.video_processor, "fps", 2.0), "not the same processor"),
        (lambda model, processor: setattr(processor, "chat_template", "{{ messages }}"), "not the same processor"),
        (lambda model, processor: setattr(model.generation_config, "suppress_tokens", [5]), "same configuration"),
    ],
)
def test_answers_of_other_settings_are_not_taken_over(world, tmp_path, change, message):
    folder, rows = world
    model, processor = load(folder / "model")
    settings = Settings(max_new_tokens=2)
    infer(model, processor, ETBENCH, rows[:1], folder / "videos", settings, tmp_path, show_progress=False)
    model, processor = load(folder / "model")
    result = infer(model, processor, ETBENCH, rows[:1], folder / "videos", settings, tmp_path, show_progress=False)
    assert result.num_known == 1
    change(model, processor)
    with pytest.raises(ValueError, match=message):
        infer(model, processor, ETBENCH, rows[:1], folder / "videos", settings, tmp_path, show_progress=False)
    with pytest.raises(ValueError, match="not the same annotations"):
        infer(model, processor, ETBENCH, rows[:2], folder / "videos", settings, tmp_path, show_progress=False)
