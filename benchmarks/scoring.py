"""Claim: scoring E.T. Bench's 7,289 answers, captions included, takes at most 150 times `json.load` of their file.

That is 5 s where parsing the 5 MB takes 33 ms. Writes answers of realistic length for every task, then parses and
scores them in turns; the sentence encoder is left out.
Run as `python benchmarks/scoring.py [--repeats N]`.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from reporting import note, report

from etchat_hf.evaluation import evaluate_etbench

LIMIT = 150
# Samples of each task; together the benchmark's 7,289.
SIZES = {
    "rar": 500, "eca": 500, "rvq": 500, "tvg": 1000, "epm": 1000, "tal": 900,
    "evs": 400, "vhd": 700, "dvc": 600, "slc": 389, "tem": 500, "gvq": 300,
}  # fmt: skip
WORDS = "a person opens the door then walks to table and pours water into cup while camera moves slowly left".split()
EVENTS = {"dvc": 5, "slc": 8, "tal": 4, "evs": 6}


def make_row(task: str, idx: int, rng: random.Random) -> dict:
    """One annotation with an answer that is about right."""
    row = {"version": 1.0, "idx": idx, "task": task, "source": f"{task}_{idx % 2}", "video": f"{task}/{idx}.mp4"}
    row |= {"duration": 180.0, "q": " ".join(rng.choices(WORDS, k=60))}
    starts = sorted(rng.uniform(0, 160) for _ in range(EVENTS.get(task, 1)))
    target = [[round(start, 1), round(start + rng.uniform(2, 20), 1)] for start in starts]
    spans = [f"{abs(start + rng.gauss(0, 3)):.1f} - {end + rng.gauss(0, 3):.1f}" for start, end in target]
    sentences = [" ".join(rng.choices(WORDS, k=12)) for _ in target]
    options = [" ".join(rng.choices(WORDS, k=8)) for _ in range(4)]
    choice = {"o": options, "p": rng.randrange(4)}
    if task in ("rar", "eca", "rvq"):
        return row | choice | {"a": rng.choice("ABCD") + ") " + options[0] if rng.random() < 0.9 else options[1]}
    if task == "gvq":
        return row | choice | {"tgt": target[0], "a": f"({rng.choice('ABCD')}) It happens at {spans[0]} seconds."}
    if task in ("dvc", "slc"):
        answer = " ".join(f"{span} seconds, {' '.join(rng.choices(WORDS, k=12))}." for span in spans)
        return row | {"tgt": target, "g": sentences, "a": answer}
    answer = f"The event happens in {', '.join(spans)} seconds."
    return row | {"tgt": target[0] if task in ("tvg", "epm") else target, "a": answer}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rng = random.Random(0)
    tasks = [task for task, size in SIZES.items() for _ in range(size)]
    reading, scoring = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.json"
        path.write_text(json.dumps([make_row(task, idx, rng) for idx, task in enumerate(tasks)]))
        size = path.stat().st_size
        for _ in range(options.repeats):
            start = time.perf_counter()
            rows = json.loads(path.read_text(encoding="utf-8"))
            reading.append(time.perf_counter() - start)
            start = time.perf_counter()
            result = evaluate_etbench(rows, "jaccard")
            scoring.append(time.perf_counter() - start)
    absent = sorted({metric for metrics in result["absent"].values() for metric in metrics})
    seconds = f"Parsing {min(reading):.3f} s, scoring {min(scoring):.2f} s; absent: {', '.join(absent)}."
    note(f"{len(tasks):,} answers, {size / 1e6:.1f} MB. {seconds}")
    ratios = [ours / theirs for ours, theirs in zip(scoring, reading, strict=True)]
    return int(not report("scoring / json.load of the answers", ratios, LIMIT))


if __name__ == "__main__":
    sys.exit(main())
