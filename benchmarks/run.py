"""Runs all benchmarks, each in a process of its own, and writes benchmarks/RESULTS.md: `make bench`.

`python benchmarks/run.py [SCRIPT ...]` runs only those; the results of others stay, if they are of the same day,
machine and versions. Exit code: 0 if every claim holds or its script says why it cannot, 1 if one is missed without a
reason or a script broke.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from reporting import RESULTS_VARIABLE

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "RESULTS.md"
# torchao slows every import of transformers down: only its own benchmark gets it, from where `make` puts it.
QUANTISED = FOLDER.parent / ".venv" / "quantised"
HELPERS = {"measuring.py", "mid_size.py", "reporting.py", "run.py"}
FULL_SIZE_ON_GPU = {"decoding.py", "training_step.py", "vision.py"}
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "av", "decord", "torchao")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", help="names such as vision.py; all by default")
    chosen = parser.parse_args().scripts
    names = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in HELPERS)
    if unknown := set(chosen) - set(names):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    sections, good = results_so_far() if chosen else {}, True
    for name in chosen or names:
        print(f"== {name}", flush=True)
        entries, minutes, broke = run_script(name)
        if name in FULL_SIZE_ON_GPU and torch.cuda.is_available():
            more = run_script(name, "--device", "cuda", "--full-size")
            entries, minutes, broke = entries + more[0], minutes + more[1], broke or more[2]
        elif name in FULL_SIZE_ON_GPU:
            entries.append({"claim": "The same at full size, in bfloat16 on a GPU", "not_run": "there is none here"})
        good = good and not broke and all(entry.get("held", True) or entry["reason"] for entry in entries)
        sections[name] = section(name, entries, minutes, broke)
        partial = RESULTS.with_suffix(".partial")
        partial.write_text("\n\n".join([heading(), *sorted(sections.values())]) + "\n", encoding="utf-8")
        os.replace(partial, RESULTS)
    print(f"wrote {RESULTS.relative_to(FOLDER.parent)}")
    return int(not good)


def results_so_far() -> dict[str, str]:
    """The sections of RESULTS.md by their script, if this machine wrote it today with these versions."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
    if not text.startswith(heading()):
        return {}
    sections = ("## " + part.strip() for part in text.split("\n## ")[1:])
    return {part.split(maxsplit=2)[1]: part for part in sections}


def run_script(name: str, *arguments: str) -> tuple[list[dict], float, bool]:
    """What a script recorded, how many minutes it took, and whether it ended otherwise than by its claims."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        path.touch()
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, str(FOLDER / name), *arguments],
            env=os.environ
            | {RESULTS_VARIABLE: str(path)}
            | ({"PYTHONPATH": str(QUANTISED)} if name == "quantised.py" else {}),
            cwd=FOLDER.parent,
        )
        minutes = (time.perf_counter() - start) / 60
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    missed = any(entry.get("held") is False for entry in entries)
    return entries, minutes, process.returncode != 0 and not (process.returncode == 1 and missed)


def heading() -> str:
    rows = [f"- {name}: {value}" for name, value in {**machine(), "Versions": versions()}.items()]
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "Written by `make bench`: each figure is a ratio, or a size above what is named beside it, measured in",
            "one run on one machine. A claim holds if the median of its repeats does.",
            "",
            f"- Date: {datetime.date.today().isoformat()}",
            *rows,
        ]
    )


def machine() -> dict[str, str]:
    model = platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"Machine": f"{model}, {cores} cores, {memory:.0f} GiB of memory; GPU: {gpu}"}


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    return ", ".join(found)


def section(name: str, entries: list[dict], minutes: float, broke: bool) -> str:
    lines = [f"## {name}", "", f"{minutes:.1f} minutes."]
    if broke:
        lines += ["", "**The script broke before it was through.**"]
    claims = [entry for entry in entries if "claim" in entry]
    if claims:
        lines += ["", "| claim | min | median | max | limit | |", "|---|---|---|---|---|---|", *map(row, claims)]
    for entry in entries:
        if entry.get("held") is False and entry["reason"]:
            lines += ["", f"Missed: {entry['claim']}.", "", entry["reason"]]
        elif "note" in entry:
            lines += ["", entry["note"]]
    return "\n".join(lines)


def row(entry: dict) -> str:
    if "not_run" in entry:
        return f"| {entry['claim']} | | | | | not run: {entry['not_run']} |"
    low, median, high = (f"{entry[key]:.3g}" for key in ("min", "median", "max"))
    limit = f"{'at most' if entry['at_most'] else 'at least'} {entry['limit']:g} {entry['unit']}"
    return f"| {entry['claim']} | {low} | {median} | {high} | {limit} | {'holds' if entry['held'] else '**missed**'} |"


if __name__ == "__main__":
    sys.exit(main())
