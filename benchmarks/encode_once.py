"""Claims: a further question on a clip costs at most 1.05 times what Q-Former and language model alone cost, a clip
that is found on disk costs at most half of encoding it, and a turn of a conversation costs no more than in proportion
to its number.

The question is `etchat_hf.inference.ask` from text to text: template, tokenizers, checks, generation, matches, answer.
What it is compared with is the compressor called once and transformers' own Phi-3 with the same weights, given
embedded tokens. Both generate as many tokens, in turns. The model has mid-size, the processor is the toy's.
"""

import sys
import tempfile
from pathlib import Path

import torch
from measuring import ratios, seconds
from mid_size import FRAMES, SIZE, build_model, build_parser, parse
from reporting import note, report
from transformers import Phi3ForCausalLM

from etchat_hf import ClipEncoder, ETChatVideoProcessor
from etchat_hf.chat_templates import load_chat_template
from etchat_hf.inference import Chat, ask
from etchat_hf.toy.tiny_model import build_processor
from etchat_hf.verification import CLIP_SECONDS, write_clip

LIMIT, FOUND_LIMIT = 1.05, 0.5
QUESTION = "When is the red square visible, and what happens to it after that?"
NEW_TOKENS, TURNS = 32, (1, 2, 4, 8)


def build(arguments):
    processor = build_processor()
    processor.chat_template = load_chat_template("phi3")
    processor.video_processor = ETChatVideoProcessor(size=SIZE)
    ids = {"match_token_id": processor.match_token_id, "image_token_id": processor.image_token_id}
    model = build_model(arguments.full_size, arguments.device, **ids)
    model.generation_config.eos_token_id = None  # every answer has the same length
    model.generation_config.pad_token_id = 0
    return model, processor


def plain_language_model(model) -> Phi3ForCausalLM:
    """transformers' own, around the same weights."""
    with torch.device("meta"):
        plain = Phi3ForCausalLM(model.config.text_config)
    plain.model, plain.lm_head = model.model.language_model, model.lm_head
    plain.generation_config = model.generation_config
    return plain.eval()


def turn(model, processor, clip, number: int, reinsert_clip: bool):
    """A function that asks the question as turn `number` of a conversation whose answers are short."""
    chat = Chat(model, processor, clip, reinsert_clip=reinsert_clip)
    chat.ask(QUESTION, max_new_tokens=1)
    question = chat.messages[0]
    again = question | {"content": question["content"][1:]}
    said = {"role": "assistant", "content": "It is visible at the beginning."}
    history = [message for _ in range(number - 1) for message in (again, said)]
    history[:1] = [question] * bool(history)

    def work():
        chat.messages, chat.times = list(history), []
        chat.ask(QUESTION, max_new_tokens=NEW_TOKENS)
        assert not chat.left_out

    return work


def report_turns(model, processor, clip, repeats: int) -> bool:
    """What a turn costs by its number; with the clip shown again the prompt has that many times the frames."""
    lines = []
    for reinsert in (True, False):
        turns = [turn(model, processor, clip, number, reinsert) for number in TURNS]
        rounds = [[seconds(work) for work in turns] for _ in range(repeats + 1)][1:]
        fastest = [min(times) for times in zip(*rounds, strict=True)]
        costs = [time / fastest[0] for time in fastest]
        lines.append(", ".join(f"turn {number} {cost:.2f} x" for number, cost in zip(TURNS, costs, strict=True)))
        if reinsert:
            values = [times[-1] / times[0] for times in rounds]
    note(
        "A turn of a conversation, beside its first: "
        + lines[0]
        + ". Each turn reads the whole conversation anew, in "
        "which every turn shows the clip again, compressed for its own question; so the turns together grow as the "
        "square of their number. With reinsert_clip=False: " + lines[1] + "."
    )
    return report(
        f"turn {TURNS[-1]} of a conversation / its first turn, no more than in proportion", values, TURNS[-1]
    )


def main() -> int:
    arguments = parse(build_parser(__doc__))
    model, processor = build(arguments)
    plain = plain_language_model(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        video = Path(folder) / "clip.mp4"
        write_clip(video, fps=30)
        sampling = {"num_frames": FRAMES}
        clip = processor.encode(video, model, **sampling)
        message = [{"type": "video", "video": clip}, {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(model.device)
        ids = inputs["input_ids"]
        words = [inputs[f"qformer_{name}"].expand(FRAMES, -1) for name in ("input_ids", "attention_mask")]

        def question():
            return ask(model, processor, clip, QUESTION, max_new_tokens=NEW_TOKENS)

        def alone():
            frames = model.model.compressor(clip.vision_features, *words)
            is_frame = ids == processor.image_token_id
            embeds = model.get_input_embeddings()(ids.masked_fill(is_frame, 0))
            embeds = embeds.masked_scatter(is_frame[..., None], frames.to(embeds))
            return plain.generate(inputs_embeds=embeds, max_new_tokens=NEW_TOKENS, do_sample=False)

        assert alone().shape[-1] == NEW_TOKENS and len(question()["frame_times"]) == FRAMES
        held = [
            report("a further question / Q-Former and LLM alone", ratios(question, alone, arguments.repeats), LIMIT)
        ]

        cached = ClipEncoder(model, processor, Path(folder) / "cache")
        cached.encode(video, **sampling)
        fresh = ClipEncoder(model, processor)
        found = ratios(
            lambda: cached.encode(video, **sampling), lambda: fresh.encode(video, **sampling), arguments.repeats
        )
        held.append(report("finding a clip on disk / decoding and encoding it", found, FOUND_LIMIT))
        encoding = min(seconds(lambda: fresh.encode(video, **sampling)) for _ in range(3))
        asking = min(seconds(question) for _ in range(3))
        note(
            f"{FRAMES} frames of {CLIP_SECONDS} s, answers of {NEW_TOKENS} tokens: encoding the clip takes "
            f"{encoding / asking:.1f} times as long as a question."
        )
        held.append(report_turns(model, processor, clip, arguments.repeats))
        decoding = min(
            seconds(lambda: processor.video_processor(video, return_tensors="pt", **sampling)) for _ in "12"
        )
        note(
            "Training with `vision_cache_dir` knows clips by their pixels, not by their file: it shares no entries "
            f"with ask and infer, and decodes each video in each epoch, which takes {decoding:.2f} s for this clip; "
            f"encoding it, which it spares, takes {encoding - decoding:.2f} s."
        )
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
