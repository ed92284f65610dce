"""Claim: `etchat compress` takes at most 1.5 times as long as a bare PyAV transcode of the same files.

The bare transcode decodes every file, keeps the frames that a step of 1 / fps seconds calls for, scales them, and
encodes them with the same settings in the same number of processes. It neither looks for exact times, nor reads back
what it wrote, nor makes files appear at once, nor can it go on where it was stopped: these cost what the ratio says.
Run as `python benchmarks/compression.py [--videos N] [--repeats N] [--workers N]`.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from measuring import ratios
from reporting import report

from etchat_hf.data.compress import X264_OPTIONS, Compression, compress_tree

LIMIT = 1.5
SIZE, FPS, SECONDS = (640, 360), 25, 20


def write_video(path: Path, seed: int) -> None:
    """H.264 of a bright disc that moves over a shaded ground, with the faint grain that a camera leaves."""
    rng = np.random.default_rng(seed)
    width, height = SIZE
    y, x = np.mgrid[:height, :width]
    ground = (40 + 80 * x / width + 60 * y / height)[..., None] * rng.uniform(0.5, 1, 3)
    grain = rng.integers(0, 6, (8, height, width, 1))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(FPS * SECONDS):
            disc = (x - 2 * number) ** 2 + (y - height / 2) ** 2 < 3000
            picture = np.where(disc[..., None], 230, ground) + grain[number % len(grain)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))


def transcode(source: Path, target: Path, settings: Compression) -> None:
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        video = reader.streams.video[0]
        video.thread_type = "AUTO"
        width = 2 * round(settings.size * video.width / video.height / 2)
        stream = writer.add_stream("libx264", rate=Fraction(settings.fps), options=X264_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, settings.size, "yuv420p"
        due = 0.0
        for frame in reader.decode(video):
            if frame.time < due:
                continue
            due += 1 / settings.fps
            small = frame.reformat(width=width, height=settings.size, format="yuv420p", interpolation="AREA")
            small.pts = None
            writer.mux(stream.encode(small))
        writer.mux(stream.encode(None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    settings, runs = Compression(fps=3, size=224), itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder) / "videos"
        videos.mkdir()
        for number in range(options.videos):
            write_video(videos / f"{number}.mp4", number)

        def ours() -> None:
            done = compress_tree(videos, Path(folder) / str(next(runs)), settings, workers=options.workers)
            assert done.written == options.videos, done.failed

        def bare() -> None:
            target = Path(folder) / str(next(runs))
            target.mkdir()
            with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("forkserver")) as pool:
                sources = sorted(videos.iterdir())
                list(pool.map(transcode, sources, [target / path.name for path in sources], [settings] * len(sources)))

        values = ratios(ours, bare, options.repeats)
    sys.exit(not report(f"compressing {options.videos} videos / a bare transcode of them", values, LIMIT))


if __name__ == "__main__":
    main()
