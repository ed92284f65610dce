"""From an original checkpoint to an answer with seconds: `python examples/quickstart.py`

Converts a tiny bundled checkpoint in the original's layout, writes a real H.264 video, and asks about it in the way
that a plain transformers program would. The weights are random: what is shown is the way, not the wisdom.
"""

import tempfile
from pathlib import Path

import torch
from transformers import LogitsProcessor
from transformers.utils import logging

import etchat_hf  # noqa: F401  registers the Auto classes
from etchat_hf.conversion.convert import Options, convert_checkpoint
from etchat_hf.verification import APPEARS, DISAPPEARS, QUESTION, write_clip

from transformers import AutoModel, AutoProcessor  # isort: skip

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


class SayWhen(LogitsProcessor):
    """Random weights seldom say `<vid>`: makes it the first token and the third, as in "<vid> - <vid>"."""

    def __init__(self, prompt_length: int, match_token_id: int):
        self.columns, self.match_token_id = (prompt_length, prompt_length + 2), match_token_id

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] in self.columns:
            scores = torch.full_like(scores, float("-inf"))
            scores[:, self.match_token_id] = 0.0
        return scores


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        clip, model_folder = Path(folder) / "clip.mp4", Path(folder) / "etchat-tiny"
        write_clip(clip)
        print(f"wrote a clip: a red square from {APPEARS} to {DISAPPEARS} s\n")
        # Head counts are not stored in a checkpoint; those of the published ones are the defaults.
        options = Options(qformer_tokenizer=str(GOLDEN / "bert"), vision_heads=4, qformer_heads=4)
        print(convert_checkpoint(GOLDEN / "phi3_stage3" / "original", model_folder, options=options), "\n")

        model = AutoModel.from_pretrained(model_folder)
        processor = AutoProcessor.from_pretrained(model_folder)
        content = [{"type": "video", "path": str(clip)}, {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        outputs = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            logits_processor=[SayWhen(inputs["input_ids"].shape[1], model.config.match_token_id)],
        )
        (answer,) = processor.post_process(outputs)
        print(f"question:    {QUESTION}\nanswer:      {answer['text']!r}  (random weights)")
        for match in outputs.matches[0]:
            bars = "".join(" ▁▂▃▄▅▆▇█"[min(8, int(8 * p / match.probabilities.max()))] for p in match.probabilities)
            print(f"<vid> at {match.seconds:4.1f} s  frame {match.frame:2d}  |{bars}|")


if __name__ == "__main__":
    main()
