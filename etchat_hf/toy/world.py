"""The toy world: short videos of coloured shapes of which every moment is known.

A scene is drawn from a seed alone and rendered to H.264 by PyAV's own encoder. Shapes appear, move, change colour and
vanish on whole seconds, because the toy model looks at one frame per second: its best answer is then exact.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

COLORS = {"red": (225, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 235), "yellow": (240, 215, 50)}
SHAPES = ("square", "ring", "cross")
BACKGROUNDS = ((20, 20, 24), (70, 70, 76), (52, 40, 60), (36, 56, 60))
SIZE = 112  # pixels; two of the tiny model's
VIDEO_FPS = 2
SHORTEST, LONGEST = 10, 20  # seconds


@dataclass(frozen=True)
class Event:
    """
    A shape of one colour, from its first to its last frame.

    Args:
        color (`str`): one of `COLORS`.
        shape (`str`): one of `SHAPES`.
        start, end (`int`): seconds since the video's first frame, both visible.
        lane (`int`): 0 for the upper half, 1 for the lower.
        path (`tuple[float, float]`): horizontal centre at the start and at the end, as a share of the width.
    """

    color: str
    shape: str
    start: int
    end: int
    lane: int
    path: tuple[float, float]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """
    What a video shows.

    Args:
        duration (`int`): seconds.
        background (`tuple[int, int, int]`): RGB.
        events (`tuple[Event, ...]`): in order of their start.
        change (`tuple[Event, Event]`, *optional*): two of `events`, of which the second takes the first's place in
            another colour.
    """

    duration: int
    background: tuple[int, int, int]
    events: tuple[Event, ...]
    change: tuple[Event, Event] | None = None

    def spans(self, name: str) -> list[list[int]]:
        """When the shape of that name is visible: `[start, end]` in seconds, in order."""
        return [[event.start, event.end] for event in self.events if event.name == name]


def draw_scene(seed: int) -> Scene:
    """A random scene; the same seed gives the same one."""
    rng = random.Random(seed)
    duration = rng.randint(SHORTEST, LONGEST)
    names = [(color, shape) for color in COLORS for shape in SHAPES]
    rng.shuffle(names)
    first, second, third = names[:3]
    kind = rng.choice(("one", "two", "two", "repeat", "change"))
    change = None
    if kind == "one":
        events = _sequence(rng, duration, [first])
    elif kind == "two":
        events = _sequence(rng, duration, [first]) + _sequence(rng, duration, [second], lane=1)
    elif kind == "repeat":
        events = _sequence(
            rng, duration, [first, second, first] if duration > 13 and rng.random() < 0.5 else [first] * 2
        )
    else:
        other = rng.choice([color for color in COLORS if color != first[0]])
        before, after = _change(rng, duration, first, other)
        events, change = [before, after], (before, after)
    return Scene(duration, rng.choice(BACKGROUNDS), tuple(sorted(events, key=lambda event: event.start)), change)


def _sequence(rng: random.Random, duration: int, names: list[tuple[str, str]], lane: int = 0) -> list[Event]:
    """Events one after the other, with at least a second between them."""
    # 2 n cuts of the whole seconds, of which each event takes a pair; a third of a second's distance is none.
    spare = duration - 4 * len(names)
    cuts = sorted(rng.randint(0, spare) for _ in range(2 * len(names)))
    events = []
    for i, (color, shape) in enumerate(names):
        start, end = cuts[2 * i] + 4 * i, cuts[2 * i + 1] + 4 * i + 2
        events.append(Event(color, shape, start, end, lane, _path(rng)))
    return events


def _change(rng: random.Random, duration: int, name: tuple[str, str], other: str) -> tuple[Event, Event]:
    start = rng.randint(0, duration - 7)
    end = rng.randint(start + 5, duration - 1)
    moment = rng.randint(start + 2, end - 2)
    lane, (left, right) = rng.randint(0, 1), _path(rng)
    middle = left + (right - left) * (moment - start) / (end - start)
    before = Event(name[0], name[1], start, moment - 1, lane, (left, middle))
    return before, Event(other, name[1], moment, end, lane, (middle, right))


def _path(rng: random.Random) -> tuple[float, float]:
    left = rng.uniform(0.25, 0.75)
    return left, min(max(left + rng.choice((0, 0, -0.4, 0.4)), 0.25), 0.75)


def render(scene: Scene) -> Iterator[np.ndarray]:
    """The frames of a scene at `VIDEO_FPS`: uint8 RGB (SIZE, SIZE, 3)."""
    for index in range(scene.duration * VIDEO_FPS):
        picture = Image.new("RGB", (SIZE, SIZE), scene.background)
        brush = ImageDraw.Draw(picture)
        for event in scene.events:
            seconds = index / VIDEO_FPS
            # A second that is sampled belongs to the event whole: between two of them the next one has begun.
            if event.start <= seconds <= event.end:
                _draw(brush, event, (seconds - event.start) / max(event.end - event.start, 1))
        yield np.asarray(picture)


def _draw(brush: ImageDraw.ImageDraw, event: Event, progress: float) -> None:
    half = SIZE * 0.2
    x = SIZE * (event.path[0] + (event.path[1] - event.path[0]) * progress)
    y = SIZE * (0.25 + 0.5 * event.lane)
    box = (x - half, y - half, x + half, y + half)
    color = COLORS[event.color]
    if event.shape == "square":
        brush.rectangle(box, fill=color)
    elif event.shape == "ring":
        brush.ellipse(box, outline=color, width=round(SIZE * 0.08))
    else:
        arm = SIZE * 0.05
        brush.rectangle((x - half, y - arm, x + half, y + arm), fill=color)
        brush.rectangle((x - arm, y - half, x + arm, y + half), fill=color)


def write_video(scene: Scene, path: str | Path) -> None:
    """Encodes a scene as H.264 in an MP4 file."""
    with av.open(str(path), "w") as container:
        # One thread: the bytes of the file must not depend on the machine.
        stream = container.add_stream("libx264", rate=VIDEO_FPS, options={"crf": "20", "threads": "1", "bf": "0"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for frame in render(scene):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
