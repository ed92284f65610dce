"""The toy's data on disk, laid out as the real one's: media in folders, annotations in JSON arrays."""

import json
import random
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from PIL import Image

from .annotations import CAPTION_QUESTIONS, COLOR_QUESTION, WHICH_QUESTIONS, ask_all, caption, choose
from .world import COLORS, Scene, draw_scene, render, write_video

Track = Callable[[Iterable, str], Iterable]
# Times that all is asked about a training video, in other words each time.
ROUNDS = 2


def generate(folder: str | Path, seed: int, num_train: int, num_unseen: int, track: Track) -> None:
    """
    Writes videos and images, and `stage1.json`, `stage2.json`, `stage3.json` and `unseen.json`.

    Args:
        folder (`str` or `Path`): made if it is missing.
        seed (`int`): of everything; the same seed writes the same bytes.
        num_train, num_unseen (`int`): videos. No unseen one repeats a scene of training.
        track (`Callable`): shows the progress of an iterable; gets it and a description.
    """
    folder = Path(folder)
    for name in ("videos", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    scenes = _distinct_scenes(seed, num_train + num_unseen)
    for index, scene in track(list(enumerate(scenes)), "videos"):
        write_video(scene, folder / "videos" / f"{index:04}.mp4")
    rng = random.Random(seed)
    train, unseen = list(enumerate(scenes))[:num_train], list(enumerate(scenes))[num_train:]
    rows = {
        "stage1": [_image_row(folder, i, scene, rng) for i, scene in train],
        "stage2": [row for i, scene in train for row in _chat_rows(i, scene, rng)],
        "stage3": [row for i, scene in train for _ in range(ROUNDS) for row in _timed_rows(i, scene, rng)],
        "unseen": [row for i, scene in unseen for row in _timed_rows(i, scene, rng)],
    }
    for name, content in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _distinct_scenes(seed: int, number: int) -> list[Scene]:
    def scenes():
        known = set()
        index = 0
        while True:
            scene = draw_scene(seed * 1_000_000 + index)
            index += 1
            if scene not in known:
                known.add(scene)
                yield scene

    return list(islice(scenes(), number))


def _image_row(folder: Path, index: int, scene: Scene, rng: random.Random) -> dict:
    event = rng.choice(scene.events)
    frames = list(render(scene))
    second = (event.start + event.end) // 2
    name = f"{index:04}.png"
    Image.fromarray(frames[second * len(frames) // scene.duration]).save(folder / "images" / name)
    shown = [event.name for event in scene.events if event.start <= second <= event.end]
    return {"image": name} | _conversation("What can be seen here?", " and ".join(f"a {name}" for name in shown))


def _chat_rows(index: int, scene: Scene, rng: random.Random) -> list[dict]:
    video = {"video": f"{index:04}.mp4", "duration": scene.duration}
    rows = [video | _conversation(rng.choice((*CAPTION_QUESTIONS, *WHICH_QUESTIONS)), f"{caption(scene)}.")]
    question, answer = choose(scene, rng)
    rows.append(video | _conversation(question, answer))
    if index % 10 == 0:
        rows.append(_conversation(COLOR_QUESTION, f"{', '.join(COLORS)}.", placeholder=""))
    return rows


def _timed_rows(index: int, scene: Scene, rng: random.Random) -> list[dict]:
    rows = []
    for number, asked in enumerate(ask_all(scene, rng)):
        row = {"id": f"{index:04}-{number}", "video": f"{index:04}.mp4", "duration": scene.duration}
        row |= {"task": asked["task"], "source": "toy"} | {key: asked[key] for key in ("src", "tgt") if key in asked}
        rows.append(row | _conversation(asked["question"], asked["answer"]))
    return rows


def _conversation(question: str, answer: str, placeholder: str = "<image>\n") -> dict:
    turns = [{"from": "human", "value": f"{placeholder}{question}"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns}
