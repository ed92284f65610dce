"""A converted folder is enough: it loads where this package is not installed, and so does what is saved from it."""

import json
import os
import shutil
import subprocess
import sys

from etchat_hf.configuration_etchat import AUTO_MAP

SCRIPT = """
import json, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in ("etchat_hf", "torchvision", "decord")
        return None if absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

source, target, clip = sys.argv[1:]
answers = []
for folder in (source, target + "/1", target + "/2"):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    other = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    messages = [{"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "When?"}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    outputs = [network.generate(**inputs, max_new_tokens=6, do_sample=False).tolist() for network in (model, other)]
    assert outputs[0] == outputs[1]
    answers.append(outputs[0])
    following = target + ("/2" if folder.endswith("/1") else "/1")
    if folder != target + "/2":
        model.save_pretrained(following)
        processor.save_pretrained(following)
print(json.dumps(answers))
"""


def test_folder_loads_without_the_package(converted, tmp_path):
    from etchat_hf.verification import write_clip

    write_clip(tmp_path / "clip.mp4", fps=5, size=32)
    source = shutil.copytree(converted, tmp_path / "model")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "saved"), str(tmp_path / "clip.mp4")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    answers = json.loads(run.stdout.strip().splitlines()[-1])
    assert answers[0] == answers[1] == answers[2]
    for folder in (source, tmp_path / "saved" / "1", tmp_path / "saved" / "2"):
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map == AUTO_MAP
        for reference in auto_map.values():
            assert (folder / f"{reference.split('.')[0]}.py").is_file()
