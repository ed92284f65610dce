"""Ask the bundled toy model when things happen in a video that it has never seen:

    python examples/demo.py

Writes out/demo.mp4 and out/demo.png: frames, and below them when each shape is visible and when the model says so.
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw
from transformers.utils import logging

from etchat_hf.inference import ask, load
from etchat_hf.toy import bundled_checkpoint
from etchat_hf.toy.world import COLORS, VIDEO_FPS, Scene, draw_scene, render, write_video

SECOND, FRAME, ROW, LABEL = 44, 40, 34, 130  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the toy model about a fresh toy video.")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6, 10**9), help="of the video")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    video = args.output / "demo.mp4"
    scene = draw_scene(args.seed)
    write_video(scene, video)
    print(f"{video}: {scene.duration} s of shapes, drawn from --seed {args.seed}")

    model, processor = load(bundled_checkpoint(), device="cpu")
    rows = []
    for name in dict.fromkeys(event.name for event in scene.events):
        truth = scene.spans(name)
        question = f"When is the {name} visible?" if len(truth) == 1 else f"List every time the {name} appears."
        answer = ask(model, processor, video, question, max_new_tokens=64)
        rows.append((name, truth, answer["spans"]))
        print(f"\n{question}\n  model: {answer['answer']}\n  truth: {', '.join(f'{a} - {b}' for a, b in truth)}")
    picture = args.output / "demo.png"
    draw_timeline(scene, rows).save(picture)
    print(f"\n{picture}: above each line what is true, below it what the model says")


def draw_timeline(scene: Scene, rows: list[tuple[str, list, list]]) -> Image.Image:
    """A frame per second, and for each `(name, true spans, answered spans)` a row with both as bars."""
    canvas = Image.new("RGB", (LABEL + SECOND * scene.duration + 10, 80 + ROW * len(rows)), "white")
    brush = ImageDraw.Draw(canvas)
    frames = list(render(scene))[::VIDEO_FPS]
    for second, frame in enumerate(frames):
        x = LABEL + second * SECOND
        canvas.paste(Image.fromarray(frame).resize((FRAME, FRAME)), (x, 8))
        brush.text((x + FRAME // 2, 52), str(second), fill="black", anchor="mt")
    for index, (name, truth, answer) in enumerate(rows):
        y = 80 + index * ROW
        brush.text((8, y + 7), name, fill="black")
        color = COLORS[name.split()[0]]
        for spans, top, fill in ((truth, y, color), (answer, y + 13, tuple(value // 2 for value in color))):
            for start, end in spans:
                left, right = sorted((LABEL + start * SECOND, LABEL + end * SECOND + FRAME))
                brush.rectangle((left, top, right, top + 10), fill=fill)
    return canvas


if __name__ == "__main__":
    main()
