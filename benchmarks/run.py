"""Runs all benchmarks, each in a process of its own, and writes benchmarks/RESULTS.md: `make bench`.

`python benchmarks/run.py [SCRIPT ...]` runs only those; the results of others stay as they are, which takes the same
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
from importlib.metadata import distributions
from pathlib import Path

import torch
from reporting import RESULTS_VARIABLE

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "RESULTS.md"
# torchao slows every import of transformers down: only its own benchmark gets it, from where `make` puts it.
QUANTISED = FOLDER.parent / ".venv" / "quantised"
HELPERS = {"measuring.py", "mid_size.py", "reporting.py", "run.py"}
FULL_SIZE_ON_GPU = {"decoding.py", "encode_once.py", "training_step.py", "vision.py"}
# What no script measures yet: neither here nor where there is a GPU.
ONLY_ON_GPU = {
    "quantised.py": "bitsandbytes 4 bits and QLoRA at full size on a GPU",
    "start.py": "Loading at full size, in bfloat16 onto a GPU",
}
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy", "av", "decord")
PACKAGES_QUANTISED = ("torchao", "bitsandbytes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", help="names such as vision.py; all by default")
    chosen = parser.parse_args().scripts
    names = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in HELPERS)
    if unknown := set(chosen) - set(names):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    sections, good = results_so_far(parser) if chosen else {}, True
    for name in chosen or names:
        print(f"== {name}", flush=True)
        entries, minutes, broke = run_script(name)
        if name in FULL_SIZE_ON_GPU and torch.cuda.is_available():
            more = run_script(name, "--device", "cuda", "--full-size")
            entries, minutes, broke = entries + more[0], minutes + more[1], broke or more[2]
        elif name in FULL_SIZE_ON_GPU:
            entries.append({"claim": "The same at full size, in bfloat16 on a GPU", "not_run": "there is none here"})
        if name in ONLY_ON_GPU:
            why = "no script does it yet" if torch.cuda.is_available() else "there is none here, and no script yet"
            entries.append({"claim": ONLY_ON_GPU[name], "not_run": why})
        good = good and not broke and all(entry.get("held", True) or entry["reason"] for entry in entries)
        sections[name] = section(name, entries, minutes, broke)
        partial = RESULTS.with_suffix(".partial")
        partial.write_text("\n\n".join([heading(), *sorted(sections.values())]) + "\n", encoding="utf-8")
        os.replace(partial, RESULTS)
    print(f"wrote {RESULTS.relative_to(FOLDER.parent)}")
    return int(not good)


def results_so_far(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The sections of RESULTS.md by their script; an error if another machine or other versions wrote it."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else heading()
    if not text.startswith(heading()):
        parser.error(f"{RESULTS} is of another machine or other versions: run all, or the script by itself.")
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
            "one run on one machine. A claim holds if the median of its repeats does; where min and max are empty, it",
            "was measured once.",
            "",
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
    """Of what the scripts import; the last packages may be in QUANTISED, which only quantised.py gets."""
    own, quantised = installed(sys.path), installed([str(QUANTISED), *sys.path])
    found = [f"Python {platform.python_version()}", *(f"{name} {own.get(name, 'absent')}" for name in PACKAGES)]
    found += [f"{name} {quantised.get(name, 'absent')} (quantised.py only)" for name in PACKAGES_QUANTISED]
    return ", ".join(found)


def installed(path: list[str]) -> dict[str, str]:
    """Package -> version; as with imports, the first on the path counts."""
    return {found.name: found.version for found in reversed(list(distributions(path=path)))}


def section(name: str, entries: list[dict], minutes: float, broke: bool) -> str:
    lines = [f"## {name}", "", f"{minutes:.1f} minutes, on {datetime.date.today().isoformat()}."]
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
    if entry["repeats"] == 1:
        low = high = ""
    limit = f"{'at most' if entry['at_most'] else 'at least'} {entry['limit']:g} {entry['unit']}"
    return f"| {entry['claim']} | {low} | {median} | {high} | {limit} | {'holds' if entry['held'] else '**missed**'} |"


if __name__ == "__main__":
    sys.exit(main())
