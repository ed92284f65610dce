"""Claims: a long video streams through the processor in bounded memory, at the speed of decoding it, and faster where
few of its frames are wanted.

    python benchmarks/video_decoding.py                # an hour of 1080p: takes a quarter of an hour on two cores
    python benchmarks/video_decoding.py --minutes 20   # a shorter video

Consuming the file at 1 fps, chunk by chunk (decoded, resized, normalised), takes less than 600 MB above what the
imports take, and at most 1.3 times the time of decoding its frames with PyAV, on all cores, and throwing them away. It
can take less than that: our reader passes over pictures that are neither sampled nor needed for others. One frame per
minute, of a file with a keyframe every 10 s, takes at most half of that time: the reader seeks.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from reporting import report

from etchat_hf.video_decoding_etchat import open_video
from etchat_hf.video_processing_etchat import ETChatVideoProcessor

FPS, SIZE = 30, (1920, 1080)
LOOP_SECONDS = 10
MEMORY_LIMIT, TIME_LIMIT, SPARSE_LIMIT = 600, 1.3, 0.5  # MB, and times the decoding alone


def write_loop(path: Path) -> None:
    """A landscape of smooth noise that pans, in 10 s: costs an encoder and a decoder what filmed video does."""
    width, height = SIZE
    coarse = np.random.default_rng(0).integers(0, 256, (height // 20 + 2, width // 10 + 2, 3), np.uint8)
    landscape = av.VideoFrame.from_ndarray(coarse, format="rgb24").reformat(width * 2, height, "rgb24").to_ndarray()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = FPS * LOOP_SECONDS
        for k in range(FPS * LOOP_SECONDS):
            shift = 3 * k
            picture = np.ascontiguousarray(landscape[:, shift : shift + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_video(path: Path, minutes: float) -> None:
    """The loop over and over, without encoding it again."""
    loop = path.with_name("loop.mp4")
    write_loop(loop)
    with av.open(str(loop)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        shift = int(Fraction(LOOP_SECONDS) / stream.time_base)
        for k in range(round(minutes * 60 / LOOP_SECONDS)):
            source.seek(0)
            for packet in source.demux(stream):
                if packet.size:
                    packet.pts += k * shift
                    packet.dts += k * shift
                    packet.stream = copy
                    target.mux(packet)


def decode_only(path: str) -> int:
    """What any reader has to do: decode every frame, with all threads."""
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        return sum(1 for _ in container.decode(video=0))


def sparse(path: str) -> int:
    """A frame of each minute, in the middle between two keyframes."""
    reader = open_video(path, "pyav")
    return sum(1 for _ in reader.read(range(FPS * LOOP_SECONDS // 2, reader.num_frames, 60 * FPS)))


def stream(path: str) -> int:
    """All of it at 1 fps, in chunks."""
    processor = ETChatVideoProcessor(decoder="pyav")
    return sum(len(chunk["pixel_values"]) for chunk in processor.iter_frames(path, chunk_size=32, fps=1))


def measured(work, path: str, results) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    count = work(path)
    seconds = time.perf_counter() - begin
    unit = 1e6 if sys.platform == "darwin" else 1e3
    results.put((count, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit))


def run(work, path: Path) -> tuple[int, float, float]:
    """Frames, seconds, and MB above the imports, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measured, args=(work, str(path), results))
    process.start()
    process.join()
    return results.get()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    results = {work: [] for work in (decode_only, stream, sparse)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.mp4"
        # In a process of its own: a child's peak begins at what its parent has in memory.
        writer = multiprocessing.get_context("spawn").Process(target=write_video, args=(path, args.minutes))
        writer.start()
        writer.join()
        print(f"{args.minutes:g} minutes of {SIZE[0]} x {SIZE[1]} at {FPS} fps, {path.stat().st_size / 1e6:.0f} MB")
        for _ in range(args.repeats):
            for work, measures in results.items():
                count, seconds, memory = run(work, path)
                print(f"  {work.__name__:12} {count:7} frames {seconds:8.1f} s {memory:8.0f} MB above the imports")
                measures.append((seconds, memory))
    claim = f"{args.minutes:g} minutes of 1080p at 1 fps, chunk by chunk"
    decoding = [seconds for seconds, _ in results[decode_only]]
    streaming, seeking = (
        [seconds / alone for (seconds, _), alone in zip(results[work], decoding, strict=True)]
        for work in (stream, sparse)
    )
    held = [
        report(
            f"{claim}: memory above the imports", [memory for _, memory in results[stream]], MEMORY_LIMIT, unit="MB"
        ),
        report(f"{claim} / decoding it", streaming, TIME_LIMIT),
        report("one frame per minute / decoding all", seeking, SPARSE_LIMIT),
    ]
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
