"""Questions about toy scenes, in the annotation format of the training data; times are seconds.

Each task words its question in a few ways, so that the answer must come from the meaning rather than from one string.
"""

import random

from .world import COLORS, SHAPES, Scene

TASKS = ("tvg", "tal", "vhd", "dvc", "rar", "tem")
SPAN_TASKS = ("tvg", "tal", "dvc", "tem")

CAPTION_QUESTIONS = ("Describe the video.", "What does the video show?", "What can be seen here?")
CHOICE_QUESTION = "Which of these shapes appears?"
LETTERS = "ABCD"
COLOR_QUESTION = "Which colours are there in this world?"
WHICH_QUESTIONS = ("Which shapes appear in the video?", "Name the shapes in the order in which they appear.")
QUESTIONS = {
    "tvg": ("When is the {} visible?", "Localize the {} in the video.", "When does the {} appear?"),
    "tal": ("Find all moments when the {} is visible.", "List every time the {} appears."),
    "vhd": ("At which moment does the {} turn {}?", "When does the {} become {}?"),
    "dvc": ("List all events with their times.", "Describe all events and when they happen."),
    "rar": ("What is visible at <vid>?", "Which shape is shown at <vid>?"),
    "tem": ("The video shows a shape from <vid> to <vid>. When is it visible again?",),
}
SPAN = "<vid> - <vid>"


def caption(scene: Scene) -> str:
    """All shapes in order of appearance, each once: "a red square, then a blue ring"."""
    names = list(dict.fromkeys(event.name for event in scene.events))
    return ", then ".join(f"a {name}" for name in names)


def ask_all(scene: Scene, rng: random.Random) -> list[dict]:
    """
    All that can be asked about a scene, once: a span or several spans per shape, and a question of each other task.

    Returns:
        `list` of `dict` with `task`, `question`, `answer` (with `<vid>` in place of times), and `src` and `tgt`
        (`list` of `float`, seconds) where the question and the answer hold times.
    """
    names = list(dict.fromkeys(event.name for event in scene.events))
    repeated = [name for name in names if len(scene.spans(name)) > 1]
    # Each shape of a video is asked for, so that the question, not the picture alone, decides the answer.
    asked = [_ask_spans(scene, name, rng) for name in names]
    asked += [_ask_captions(scene, rng), _ask_choice(scene, rng)]
    asked += [_ask_highlight(scene, rng)] if scene.change else []
    return asked + [_ask_again(scene, name, rng) for name in repeated]


def _ask_spans(scene: Scene, name: str, rng: random.Random) -> dict:
    spans = scene.spans(name)
    task = "tvg" if len(spans) == 1 else "tal"
    question = rng.choice(QUESTIONS[task]).format(name)
    return {"task": task, "question": question, "answer": ", ".join([SPAN] * len(spans)) + ".", "tgt": sum(spans, [])}


def _ask_highlight(scene: Scene, rng: random.Random) -> dict:
    before, after = scene.change
    question = rng.choice(QUESTIONS["vhd"]).format(before.name, after.color)
    return {"task": "vhd", "question": question, "answer": "<vid>.", "tgt": [after.start]}


def _ask_captions(scene: Scene, rng: random.Random) -> dict:
    answer = " ".join(f"{SPAN}, a {event.name}." for event in scene.events)
    times = [time for event in scene.events for time in (event.start, event.end)]
    return {"task": "dvc", "question": rng.choice(QUESTIONS["dvc"]), "answer": answer, "tgt": times}


def _ask_choice(scene: Scene, rng: random.Random) -> dict:
    event = rng.choice(scene.events)
    # A moment at which nothing else is visible, where there is one.
    inner = [t for t in range(event.start, event.end + 1) if sum(e.start <= t <= e.end for e in scene.events) == 1]
    moment = rng.choice(inner or [event.start])
    shown = [e.name for e in scene.events if e.start <= moment <= e.end]
    options, answer = _options(event.name, shown, rng)
    question = f"{rng.choice(QUESTIONS['rar'])} {options}"
    return {"task": "rar", "question": question, "answer": answer, "src": [moment]}


def choose(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A multiple-choice question about the whole video, without times, and its answer."""
    shown = [event.name for event in scene.events]
    options, answer = _options(rng.choice(shown), shown, rng)
    return f"{CHOICE_QUESTION} {options}", answer


def _options(right: str, shown: list[str], rng: random.Random) -> tuple[str, str]:
    names = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    options = [right, *rng.sample([name for name in names if name not in shown], 3)]
    rng.shuffle(options)
    # The letter behind its option: a small model learns to look up what followed the same words before.
    listed = [f"{option} ({letter})" for letter, option in zip(LETTERS, options, strict=True)]
    return ", ".join(listed), f"{listed[options.index(right)]}."


def _ask_again(scene: Scene, name: str, rng: random.Random) -> dict:
    example, again = scene.spans(name)
    return {
        "task": "tem",
        "question": rng.choice(QUESTIONS["tem"]),
        "answer": f"{SPAN}.",
        "src": example,
        "tgt": again,
    }
