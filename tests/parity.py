"""Compares this package with golden figures of the original: `python tests/parity.py DIR [DIR ...]`.

Walks folders in the layout of the golden figures, prints a line per quantity (case, quantity, greatest absolute
difference, ok or FAIL) and the number of quantities checked. Exits with 1 on any FAIL, on a file that it did not read,
and where there was nothing to check.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BatchFeature, LogitsProcessor
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from etchat_hf.chat_templates import load_chat_template
from etchat_hf.conversion.convert import Options, convert_checkpoint, convert_pieces
from etchat_hf.conversion.tokens import load_qformer_tokenizer
from etchat_hf.conversion.weight_map import originals_of
from etchat_hf.evaluation import evaluate_charades, evaluate_etbench
from etchat_hf.inference import load
from etchat_hf.processing_etchat import ETChatProcessor
from etchat_hf.video_decoding_etchat import sample_frame_indices
from etchat_hf.video_processing_etchat import ETChatVideoProcessor, pad_to_square

PLACEHOLDER = -200
TOLERANCE = 2e-5
GRADIENT_TOLERANCE, GRADIENT_FLOOR = 1e-4, 1e-6
ROLES = {"human": "user", "gpt": "assistant"}
CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "merges.txt", "vocab.txt")


@dataclass
class Run:
    """
    What one run has found.

    Args:
        options (`argparse.Namespace`): the command line.
        read (`set` of `Path`): files that took part.
        checked, failed (`int`): quantities.
    """

    options: argparse.Namespace
    read: set = field(default_factory=set)
    checked: int = 0
    failed: int = 0

    def json(self, path: Path):
        self.read.add(path)
        return json.loads(path.read_text(encoding="utf-8"))

    def tensors(self, path: Path) -> dict[str, torch.Tensor]:
        self.read.add(path)
        return load_file(path)

    def folder(self, path: Path) -> Path:
        for pattern in CHECKPOINT_FILES:
            self.read.update(path.glob(pattern))
        return path

    def report(self, case: str, quantity: str, difference: float, ok: bool):
        self.checked += 1
        self.failed += not ok
        print(f"{case:<32} {quantity:<34} {difference:10.3e}  {'ok' if ok else 'FAIL'}")

    def close(self, case: str, quantity: str, ours, theirs, tolerance: float = TOLERANCE):
        ours, theirs = (torch.as_tensor(value, dtype=torch.float64) for value in (ours, theirs))
        same_shape = ours.shape == theirs.shape
        difference = (
            float((ours - theirs).abs().max().detach()) if same_shape and ours.numel() else 0.0 if same_shape else inf
        )
        self.report(case, quantity, difference, difference <= tolerance)

    def equal(self, case: str, quantity: str, ours, theirs):
        same = bool(torch.equal(ours, theirs)) if isinstance(ours, torch.Tensor) else ours == theirs
        self.report(case, quantity, 0.0 if same else 1.0, same)
        if not same and not isinstance(ours, torch.Tensor):
            print(f"  ours:   {ours!r:.400}\n  theirs: {theirs!r:.400}")


inf = float("inf")


class ForceVid(LogitsProcessor):
    """Makes `<vid>` the token of some steps, as the golden figures were made."""

    def __init__(self, steps: list[int], prompt_length: int, match_token_id: int):
        self.columns, self.match_token_id = {prompt_length + step for step in steps}, match_token_id

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] in self.columns:
            scores = torch.full_like(scores, -inf).index_fill(1, torch.tensor([self.match_token_id]), 0.0)
        return scores


def convert(run: Run, folder: Path, work: Path):
    """The case's checkpoint as a model and processor of ours, in float32."""
    options = Options(
        qformer_tokenizer=str(find_bert(run, folder)),
        vision_heads=run.options.vision_heads,
        qformer_heads=run.options.qformer_heads,
    )
    base = folder / "base"
    if base.is_dir():
        run.folder(base)
    convert_checkpoint(run.folder(folder / "original"), work, base=base if base.is_dir() else None, options=options)
    return load(work, dtype="float32", device="cpu")


def find_bert(run: Run, folder: Path) -> Path:
    """The Q-Former's vocabulary: `bert/` beside the case or further up."""
    if run.options.qformer_tokenizer is not None:
        return run.options.qformer_tokenizer
    for parent in (folder, *folder.parents):
        if (parent / "bert" / "vocab.txt").is_file():
            run.folder(parent / "bert")
            return parent / "bert"
    raise FileNotFoundError(f"{folder}: no bert/vocab.txt in it or above; give --qformer-tokenizer.")


def messages(conversations: list[dict], image=None) -> list[dict]:
    """Conversations of the original as messages; `image` in place of each placeholder."""
    result = []
    for turn in conversations:
        content = turn["value"]
        if image is not None and "<image>" in content:
            clip, text = {"type": "image", "image": image}, {"type": "text", "text": content.replace("<image>", "")}
            text["text"] = text["text"].strip("\n")
            content = [clip, text] if turn["value"].startswith("<image>") else [text, clip]
        result.append({"role": ROLES[turn["from"]], "content": content})
    return result


def tokenize(processor: ETChatProcessor, conversations: list[dict], template: str | None = None):
    """Ids with the original's placeholder, one per clip; labels; and the Q-Former's text of each placeholder."""
    size = processor.video_processor.size
    blank = torch.zeros(3, size, size, dtype=torch.uint8)
    chat = messages(conversations, blank)
    prompt = processor.apply_chat_template(chat, chat_template=template)
    batch = processor.apply_chat_template(
        chat,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        src=[0.0] * prompt.count("<vid>") if "<image>" in prompt else None,
    )
    ids, mask = batch["input_ids"][0], batch["assistant_masks"][0]
    labels = torch.where(mask.bool(), ids, -100)
    texts = batch["qformer_input_ids"] if "qformer_input_ids" in batch else ids.new_zeros((0, 0))
    return torch.where(ids == processor.image_token_id, PLACEHOLDER, ids), labels, texts


def without_quirks(labels: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """The original's labels less the token before an answer that two conversation types add (SPEC, section 3)."""
    quirk = (ours == -100) & (labels != -100) & torch.cat([(ours != -100)[1:], ours.new_zeros(1, dtype=torch.bool)])
    return labels.masked_fill(quirk, -100)


def expand(ids: torch.Tensor, filler: int, num_frames: int, values: torch.Tensor | None = None) -> list[int]:
    values = ids if values is None else values
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [x for token, value in pairs for x in ([filler] * num_frames if token == PLACEHOLDER else [value])]


def check_inference(run: Run, case: str, path: Path, model, processor):
    spec, golden = run.json(path), run.tensors(path.with_suffix(".safetensors"))
    turn = {"role": "user", "content": f"<image>\n{spec['query']}"}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    run.equal(case, "prompt", prompt, spec["prompt"])
    ids = processor.tokenizer(spec["prompt"], return_tensors="pt").input_ids[0]
    ids = torch.where(ids == processor.image_token_id, PLACEHOLDER, ids)
    run.equal(case, "prompt ids", ids, golden["prompt_ids"])

    frames = golden["pixel_values"]
    texts = processor.qformer_tokenizer([spec["query"]], return_tensors="pt", truncation=True)
    features = model.get_vision_features(frames)
    run.close(case, "vision features", features, golden["vision_features"])
    rows = len(frames), -1
    embeds = model.model.get_frame_embeds(features, texts.input_ids.expand(rows), texts.attention_mask.expand(rows))
    run.close(case, "frame embeddings", embeds, golden["frame_embeds"])

    prompt_ids = torch.tensor([expand(golden["prompt_ids"], processor.image_token_id, len(frames))])
    inputs = {
        "input_ids": prompt_ids,
        "attention_mask": torch.ones_like(prompt_ids),
        "pixel_values": frames,
        "frame_times": [spec["frame_times"] or [0.0]],
        "placeholder_clips": [[0] * spec["prompt"].count("<image>")],
        "qformer_input_ids": texts.input_ids,
        "qformer_attention_mask": texts.attention_mask,
    }
    if spec["src"]:
        inputs["vid_times"] = [spec["src"]]
    check_generation(run, case, model, processor, inputs, spec, golden)
    if "match_probs" in golden:
        check_match_probabilities(run, case, model, inputs, golden)


def check_generation(run: Run, case: str, model, processor, inputs: dict, spec: dict, golden: dict):
    length, steps = inputs["input_ids"].shape[1], len(golden["generated_ids"])
    forced = (
        [ForceVid(spec["forced_vid_steps"], length, model.config.match_token_id)] if model.config.use_matching else []
    )
    outputs = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=steps,
        eos_token_id=-1,  # the golden figures go on after it
        logits_processor=forced,
        return_dict_in_generate=True,
        output_logits=True,
    )
    run.equal(case, "generated ids", outputs.sequences[0, length:], golden["generated_ids"])
    run.close(case, "step logits", torch.cat(outputs.logits), golden["step_logits"])
    if "match_frames" in spec:
        run.equal(case, "match frames", [match.frame for match in outputs.matches[0]], spec["match_frames"])
        at_vid = golden["match_probs"][golden["generated_ids"] == model.config.match_token_id]
        run.close(
            case, "match distributions of <vid>", torch.stack([m.probabilities for m in outputs.matches[0]]), at_vid
        )
    if "text" in spec:
        # With the frames' numbers for seconds, and special tokens left in, as the original's figure has them.
        known = golden["generated_ids"][golden["generated_ids"] != processor.image_token_id]
        text = processor._decode(known.tolist())
        for match in outputs.matches[0]:
            text = text.replace("<vid>", str(match.frame), 1)
        run.equal(case, "text", text.strip(), spec["text"])


def check_match_probabilities(run: Run, case: str, model, inputs: dict, golden: dict):
    """The distribution at every step, `<vid>` or not: decoding by hand, along the golden tokens."""
    with torch.no_grad():
        outputs = model(**inputs, use_cache=True)
        scores = [outputs.match_scores[:, -1]]
        for token in golden["generated_ids"][:-1]:
            outputs = model(
                input_ids=token.view(1, 1),
                past_key_values=outputs.past_key_values,
                vid_frames=scores[-1].argmax(-1, keepdim=True).float(),
                **{key: outputs[key] for key in ("frame_embeds", "frame_keys", "frame_mask")},
            )
            scores.append(outputs.match_scores[:, -1])
    scores = torch.cat(scores)
    run.close(case, "match distributions", scores.softmax(-1), golden["match_probs"])
    run.equal(case, "match argmax", scores.argmax(-1), golden["match_argmax"])


def check_training(run: Run, case: str, path: Path, model, processor):
    spec, golden = run.json(path), run.tensors(path.with_suffix(".safetensors"))
    template = load_chat_template("plain") if path.stem.endswith("plain") else None
    rows, labels, texts, clips, frame_times, vid_times, pixels = [], [], [], [], [], [], []
    for index, item in enumerate(spec["items"]):
        ids, ours, questions = tokenize(processor, item["conversations"], template)
        run.equal(case, f"input ids {index}", ids, golden[f"input_ids_{index}"])
        run.equal(case, f"labels {index}", ours, without_quirks(golden[f"labels_{index}"], ours))
        count = int((ids == PLACEHOLDER).sum())
        expected = (
            processor.qformer_tokenizer(item["query"][:count], padding=True, return_tensors="pt") if count else None
        )
        run.equal(case, f"questions {index}", questions, expected.input_ids if count else questions)
        num_frames = item.get("nframes", 0)
        rows.append(expand(golden[f"input_ids_{index}"], processor.image_token_id, num_frames))
        labels.append(expand(golden[f"input_ids_{index}"], -100, num_frames, golden[f"labels_{index}"]))
        clips.append([len(frame_times)] * count)
        vid_times.append([*(item.get("src") or []), *(item.get("tgt") or [])])
        if num_frames:
            frame_times.append(item["frame_times"] or [0.0])
            pixels.append(golden[f"pixel_values_{index}"])
            texts += item["query"][:count]
    longest = max(map(len, rows))
    questions = processor.qformer_tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    batch = BatchFeature(
        {
            "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
            "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in labels]),
            "pixel_values": torch.cat(pixels),
            "frame_times": frame_times,
            "placeholder_clips": clips,
            "qformer_input_ids": questions.input_ids,
            "qformer_attention_mask": questions.attention_mask,
        }
    )
    if model.config.use_matching:
        batch["vid_times"] = vid_times
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    run.close(case, "training loss", outputs.loss.detach(), spec["loss"])
    for index, row in enumerate(rows):
        theirs = golden["logits"][index, : len(row)]
        run.close(case, f"training logits {index}", outputs.logits[index, : len(row)].detach(), theirs)
    check_gradients(run, case, model, spec["grad_norms"])


def check_gradients(run: Run, case: str, model, golden: dict[str, float]):
    ours = {}
    for name, parameter in model.named_parameters():
        originals = originals_of(name)[1]
        if len(originals) == 1 and parameter.grad is not None:
            ours[originals[0]] = float(parameter.grad.norm())
    errors = {}
    for name, norm in golden.items():
        if norm > GRADIENT_FLOOR:
            errors[name] = abs(ours[name] - norm) / norm if name in ours else inf
    worst = max(errors, key=errors.get)
    run.report(case, f"{len(errors)} gradient norms (relative)", errors[worst], errors[worst] <= GRADIENT_TOLERANCE)
    if errors[worst] > GRADIENT_TOLERANCE:
        print(f"  worst: {worst}")


def check_lora(run: Run, case: str, folder: Path, model):
    """Each merged matrix against base + alpha / r * B A, in float64."""
    adapter = run.tensors(folder / "original" / "adapter_model.safetensors")
    settings = run.json(folder / "original" / "adapter_config.json")
    base, trained = run.tensors(folder / "base" / "model.safetensors"), model.state_dict()
    for key, a in adapter.items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        b = adapter[key.replace(".lora_A", ".lora_B")]
        merged = base[name].double() + settings["lora_alpha"] / settings["r"] * (b.double() @ a.double())
        ours = trained[name.replace("model.layers", "model.language_model.layers")]
        run.close(case, f"merged {name.removeprefix('model.').removesuffix('.weight')}", ours, merged, 1e-6)


def check_checkpoint(run: Run, folder: Path):
    with tempfile.TemporaryDirectory() as work:
        model, processor = convert(run, folder, Path(work) / "converted")
    if (folder / "base").is_dir():
        check_lora(run, folder.name, folder, model)
    for path in sorted(folder.glob("infer_*.json")):
        check_inference(run, f"{folder.name}/{path.stem}", path, model, processor)
    for path in sorted(folder.glob("train_*.json")):
        check_training(run, f"{folder.name}/{path.stem}", path, model, processor)


def check_pieces(run: Run, folder: Path):
    spec, golden = run.json(folder / "expected.json"), run.tensors(folder / "expected.safetensors")
    vision, qformer = folder / "eva_vit_g.pth", folder / "instruct_blip_vicuna7b_trimmed.pth"
    run.read |= {vision, qformer}
    options = Options(
        qformer_tokenizer=str(find_bert(run, folder)),
        vision_heads=run.options.vision_heads,
        qformer_heads=run.options.qformer_heads,
    )
    size = golden["pixel_values"].shape[-1]
    with tempfile.TemporaryDirectory() as work:
        target = Path(work) / "converted"
        convert_pieces(run.folder(folder / "llm"), vision, qformer, target, image_size=size, options=options)
        model, processor = load(target, dtype="float32", device="cpu")
    case = folder.name
    texts = processor.qformer_tokenizer([spec["query"]], return_tensors="pt", truncation=True)
    run.equal(case, "qformer input ids", texts.input_ids[0], golden["qformer_input_ids"])
    with torch.no_grad():
        features = model.get_vision_features(golden["pixel_values"])
        run.close(case, "vision features", features, golden["vision_features"])
        compressor, rows = model.model.compressor, (len(features), -1)
        queries = compressor.query_tokens.expand(len(features), -1, -1)
        mask = torch.ones(len(features), queries.shape[1] + texts.input_ids.shape[1])
        hidden = compressor.qformer(
            input_ids=texts.input_ids.expand(rows),
            attention_mask=mask,
            query_embeds=queries,
            encoder_hidden_states=compressor.vision_layernorm(features),
        ).last_hidden_state[:, : queries.shape[1]]
        run.close(case, "Q-Former hidden states", hidden, golden["qformer_hidden"])
        logits = model(input_ids=golden["text_ids"][None]).logits[0]
        run.close(case, "text logits", logits, golden["text_logits"])


def check_prompts(run: Run, folder: Path):
    qformer_tokenizer = load_qformer_tokenizer(str(find_bert(run, folder)), None)
    for spec in run.json(folder / "prompts.json"):
        case = f"{folder.name}/{spec['conv_type']}/{spec['case']}"
        tokens = run.folder(folder / "tokenizers" / spec.get("tokenizer", spec["conv_type"]))
        template = load_chat_template(spec["conv_type"])
        tokenizer = AutoTokenizer.from_pretrained(tokens)
        processor = ETChatProcessor(ETChatVideoProcessor(size=28), tokenizer, qformer_tokenizer, template)
        chat = messages(spec["conversations"])
        ids, labels, _ = tokenize(processor, spec["conversations"])
        run.equal(case, "input ids", ids.tolist(), spec["input_ids"])
        if "training_prompt" in spec:
            run.equal(case, "training prompt", processor.apply_chat_template(chat), spec["training_prompt"])
        if "labels" in spec:
            theirs = without_quirks(torch.tensor(spec["labels"]), labels)
            run.equal(case, "labels", labels.tolist(), theirs.tolist())
        if "generation_prompt" in spec:
            prompt = processor.apply_chat_template(chat[:-1], add_generation_prompt=True)
            run.equal(case, "generation prompt", prompt, spec["generation_prompt"])
            ids = tokenizer(prompt).input_ids
            ids = [PLACEHOLDER if token == processor.image_token_id else token for token in ids]
            run.equal(case, "generation ids", ids, spec["generation_ids"])


def check_frames(run: Run, folder: Path):
    spec, golden = run.json(folder / "frames.json"), run.tensors(folder / "frames.safetensors")
    for item in spec["cases"]:
        frames, pixels = golden[f"frames_{item['i']}"], golden[f"pixel_values_{item['i']}"]
        processor = ETChatVideoProcessor(size=item["size"])
        ours = processor(frames, video_metadata={"frame_times": list(range(len(frames)))})["pixel_values"]
        run.equal(f"{folder.name}/{item['i']}", "pixel values", ours.to(pixels.dtype), pixels)
    for item in spec["sampling"]:
        case = f"{folder.name}/{item['num_frames']} at {item['avg_fps']:g}, fps {item['fps']:g}"
        indices = sample_frame_indices(item["num_frames"], item["avg_fps"], item["fps"])
        run.equal(case, "sampled indices", indices.tolist(), item["indices"])
        times = [round(index / item["avg_fps"], 1) for index in indices.tolist()]
        run.close(case, "sampled times", times, item["times"], 1e-9)


def check_padding(run: Run, folder: Path):
    run.json(folder / "pad_square.json")
    golden = run.tensors(folder / "pad_square.safetensors")
    mean = ETChatVideoProcessor().image_mean
    for name in sorted(key for key in golden if key.startswith("image_")):
        padded = torch.from_numpy(pad_to_square(golden[name].numpy(), mean))
        run.equal(f"{folder.name}/{name}", "square padding", padded, golden[name.replace("image", "padded")])


def check_metrics(run: Run, folder: Path):
    for path in sorted(folder.glob("*_expected.json")):
        expected, predictions = run.json(path), run.json(path.with_name(path.name.replace("expected", "predictions")))
        if path.name.startswith("charades"):
            ours = evaluate_charades(predictions)
        else:
            ours = evaluate_etbench(predictions, similarity="jaccard")
        for key in expected.keys() - {"note"}:
            run.equal(f"{folder.name}/{path.stem}", key, _like(ours[key], expected[key]), expected[key])


def _like(ours, theirs):
    """`ours` without the figures that the golden ones leave out, such as caption metrics."""
    if isinstance(theirs, dict):
        return {key: _like(ours[key], value) for key, value in theirs.items() if key in ours}
    return ours


CHECKS: dict[str, Callable[[Run, Path], None]] = {
    "original/config.json": check_checkpoint,
    "expected.safetensors": check_pieces,
    "prompts.json": check_prompts,
    "frames.json": check_frames,
    "pad_square.json": check_padding,
    "*_expected.json": check_metrics,
}


def attempt(run: Run, folder: Path, check: Callable[[Run, Path], None]):
    """A case that cannot be read fails; the others are still checked."""
    try:
        check(run, folder)
    except Exception as error:  # whatever a broken file makes fail is a failure of its case
        run.report(folder.name, type(error).__name__, inf, False)
        print(f"  {error}")


def main(arguments: list[str] | None = None) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--vision-heads", type=int, default=4, help="attention heads of the vision encoder (4)")
    parser.add_argument("--qformer-heads", type=int, default=4, help="attention heads of the Q-Former (4)")
    parser.add_argument("--qformer-tokenizer", type=Path, help="folder with vocab.txt (bert/ beside or above a case)")
    run = Run(parser.parse_args(arguments))
    torch.set_num_threads(1)  # sums in one order, so that a difference is never the machine's
    run.options.folders = [root.resolve() for root in run.options.folders]
    for root in run.options.folders:
        if not root.is_dir():
            parser.error(f"{root} is no folder")
        for folder in sorted(path for path in (root, *root.rglob("*")) if path.is_dir()):
            for pattern, check in CHECKS.items():
                if any(folder.glob(pattern)):
                    attempt(run, folder, check)
    unread = [
        path
        for root in run.options.folders
        for path in sorted(root.rglob("*"))
        if path.is_file() and path not in run.read and path.suffix != ".md"
    ]
    for path in unread:
        print(f"not read: {path}")
    print(f"{run.checked} quantities checked, {run.failed} failed, {len(unread)} files not read")
    return int(run.failed > 0 or bool(unread) or run.checked == 0)


if __name__ == "__main__":
    sys.exit(main())
