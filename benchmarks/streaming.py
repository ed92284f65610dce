"""Claim: 665 K rows of annotations (a JSON array of some 600 MB) need under 300 MB, and give a first batch in 6 s.

Generates the file, then reads it in fresh processes: without and with the cached index, and for comparison with one
`json.load`. Run as `python benchmarks/streaming.py [--rows N] [--folder DIR]`.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reporting import note, report

WORDS = (
    "a person opens the door and red square moves before blue circle appears on the table while camera walks".split()
)
REPEATS = 3
# What it is called, seconds to the first batch, MB above the imports.
LIMITS = {"first": ("index to be made", 6.0, 300), "again": ("index cached", 2.0, 300)}


def write_annotations(path: Path, rows: int) -> None:
    """Rows of stage 2's shape: images, videos and text, two questions each; 890 bytes on average."""
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(22, 62))) for _ in range(2000)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            picks = rng.choices(sentences, k=3)
            kind = ({"image": f"coco/{number}.jpg"}, {"video": f"{number}.mp4", "duration": 90.5}, {})[number % 3]
            values = [picks[0], picks[1], "What happens then?", picks[2]]
            turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
            row = {"id": str(number), **kind, "conversations": turns}
            file.write(("[" if number == 0 else ", ") + json.dumps(row))
        file.write("]")


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_ours(path: Path) -> dict:
    """Index, order and read a first batch of 16 rows, then one in every hundred of the epoch's rows."""
    from etchat_hf.data import DataSource, ETChatBatchSampler, ETChatDataset

    imported = peak_megabytes()
    start = time.perf_counter()
    dataset = ETChatDataset([DataSource(str(path))], encoder=None)  # rows are read, not encoded
    batches = iter(ETChatBatchSampler(dataset, batch_size=16))

    def read(batch):
        located = [dataset.source_of(key.row) for key in batch]
        return [source.files[0].read(int(source.row_of[position])) for source, position in located]

    assert len(read(next(batches))) == 16
    first = time.perf_counter() - start
    for number, batch in enumerate(batches):
        if number % 100 == 0:
            read(batch)
    return {"rows": len(dataset), "first batch, s": first, "peak MB above import": peak_megabytes() - imported}


def measure_json_load(path: Path) -> dict:
    imported = peak_megabytes()
    start = time.perf_counter()
    with open(path, encoding="utf-8") as file:
        rows = len(json.load(file))
    return {
        "rows": rows,
        "first batch, s": time.perf_counter() - start,
        "peak MB above import": peak_megabytes() - imported,
    }


def in_fresh_process(what: str, path: Path) -> dict:
    command = [sys.executable, __file__, "--measure", what, "--folder", str(path.parent)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=665_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--measure", choices=("first", "again", "json.load"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure = measure_json_load if arguments.measure == "json.load" else measure_ours
        print(json.dumps(measure(arguments.folder / "annotations.json")))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "annotations.json"
        write_annotations(path, arguments.rows)
        print(f"{arguments.rows} rows, {path.stat().st_size / 1e6:.0f} MB")
        results = {"json.load": [in_fresh_process("json.load", path)], "first": [], "again": []}
        for _ in range(REPEATS):
            path.touch()  # the index of an older file does not count
            for what in LIMITS:
                results[what].append(in_fresh_process(what, path))
    for what, (result, *_) in results.items():
        print(f"{what:10s}" + "".join(f"  {name} {value:8.1f}" for name, value in result.items()))
    loaded, first = (results[what][0]["peak MB above import"] for what in ("json.load", "first"))
    ratio = loaded / first
    note(f"{arguments.rows} rows; json.load of the whole file needs {ratio:.0f} times the memory.")
    held = []
    for what, (name, seconds, megabytes) in LIMITS.items():
        times, memory = ([run[key] for run in results[what]] for key in ("first batch, s", "peak MB above import"))
        held.append(report(f"First batch, {name}", times, seconds, unit="s"))
        held.append(report(f"Memory above the imports, {name}", memory, megabytes, unit="MB"))
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
