"""Claim: bulk inference takes at most 1.15 times as long as the model alone, since decoding overlaps with it.

Writes H.264 videos, decodes them all beforehand and times the model on them, then times a whole run from the files.
The videos are as the training guide has them: 3 frames per second, short side 224. The model gets one thread, so that
on a CPU too decoding happens beside it and not in its place; where other programs leave no core free for decoding, the
figure means nothing. Both are timed in turns, and the fastest run of each counts: other programs only ever add time.
Run as `python benchmarks/inference_overlap.py [--videos N] [--repeats N]`.
"""

import argparse
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from unittest import mock

import av
import numpy as np
import torch
from reporting import note, report

from etchat_hf import ClipEncoder, ETChatForConditionalGeneration
from etchat_hf.chat_templates import load_chat_template
from etchat_hf.evaluation import pipeline, runner
from etchat_hf.evaluation.clips import sample_video
from etchat_hf.evaluation.tasks import ETBENCH
from etchat_hf.toy.tiny_model import build_model, build_processor

LIMIT = 1.15
SIZE, FPS, SECONDS = (304, 224), 3, 30


def write_video(path: Path, seed: int) -> None:
    """H.264 of a bright disc that moves over a shaded ground, with the faint grain that a camera leaves."""
    rng = np.random.default_rng(seed)
    width, height = SIZE
    y, x = np.mgrid[:height, :width]
    ground = (40 + 80 * x / width + 60 * y / height)[..., None] * rng.uniform(0.5, 1, 3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(FPS * SECONDS):
            disc = (x - 3 * number) ** 2 + (y - height / 2) ** 2 < 900
            picture = np.where(disc[..., None], 230, ground) + rng.integers(0, 3, (height, width, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))


def build():
    """The toy's model with all its parts, untrained: how long it takes does not depend on what it says."""
    torch.manual_seed(0)
    processor = build_processor()
    processor.chat_template = load_chat_template("phi3")
    template = build_model(processor)
    template.config.use_matching = template.config.bi_attention = True
    model = ETChatForConditionalGeneration(template.config).eval()
    model.generation_config = template.generation_config
    return model, processor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = build()
    settings = runner.Settings(batch_size=4, max_new_tokens=128)
    rows = [
        {"task": "tvg", "video": f"{k}.mp4", "q": "When is the red circle visible?"} for k in range(options.videos)
    ]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for k, row in enumerate(rows):
            write_video(folder / row["video"], k)
        start = time.perf_counter()
        paths, encoder = [folder / row["video"] for row in rows], ClipEncoder(model, processor)
        clips = {path: encoder.decode(sample_video(processor.video_processor, path)) for path in paths}
        decoding = time.perf_counter() - start

        def run() -> runner.Inference:
            return runner.infer(model, processor, ETBENCH, rows, folder, settings, show_progress=False)

        alone, whole = [], []
        for _ in range(options.repeats):
            with (
                mock.patch.object(pipeline, "sample_video", lambda _, path, *rest: path),
                mock.patch.object(ClipEncoder, "decode", lambda _, path: clips[path]),
            ):
                alone.append(run().model_seconds)
            result = run()
            if result.failures:
                sys.exit(f"rows failed: {result.failures}")
            whole.append(result.wall_seconds)
    note(f"Decoding takes {decoding:.1f} s: one after the other would be {1 + decoding / min(alone):.2f} x.")
    return int(not report("Bulk inference from files / the model alone", [min(whole) / min(alone)], LIMIT))


if __name__ == "__main__":
    sys.exit(main())
