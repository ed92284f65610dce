"""Weight-only quantisation through transformers' own arguments."""

import json

import pytest
import torch
from transformers.quantizers.base import HfQuantizer

from etchat_hf import ETChatForConditionalGeneration
from etchat_hf.clip_encoder import fingerprint
from etchat_hf.inference import ask, load
from etchat_hf.toy import bundled_checkpoint
from etchat_hf.toy.generate import generate

UNSEEN = 8


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Videos that the toy has never seen, and what it is asked about each."""
    folder = tmp_path_factory.mktemp("toy")
    generate(folder, seed=78, num_train=0, num_unseen=UNSEEN, track=lambda values, description: values)
    rows = json.loads((folder / "unseen.json").read_text())
    return [
        (folder / "videos" / row["video"], row["conversations"][0]["value"].removeprefix("<image>\n"), row.get("src"))
        for row in rows
    ]


def test_what_compares_vid_with_frames_and_the_output_stay_in_floating_point():
    model = ETChatForConditionalGeneration.from_pretrained(bundled_checkpoint())
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    assert {"vid_head", "frm_head", "lm_head"} <= set(kept)


def test_float16_keeps_the_match_heads_in_float32(questions):
    model = ETChatForConditionalGeneration.from_pretrained(bundled_checkpoint(), dtype=torch.float16).eval()
    assert {p.dtype for head in (model.vid_head, model.frm_head) for p in head.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == model.model.vision_tower.dtype == torch.float16
    full, processor = load(bundled_checkpoint())
    video, question, src = questions[0]
    assert (
        ask(model, processor, video, question, src)["frames"] == ask(full, processor, video, question, src)["frames"]
    )


@pytest.mark.parametrize(("bits", "agreement"), [(8, 0.98), (4, 0.95)])
def test_a_quantised_toy_finds_the_same_frames(questions, bits, agreement):
    """The benchmark asks more: at least 98 % for 4 bits, too."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    group = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    settings = TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else group)
    full, processor = load(bundled_checkpoint())
    model = ETChatForConditionalGeneration.from_pretrained(bundled_checkpoint(), quantization_config=settings).eval()
    assert type(model.vid_head[1].weight.data) is torch.Tensor
    assert type(model.model.language_model.layers[0].mlp.down_proj.weight.data) is not torch.Tensor
    assert fingerprint(model) == fingerprint(model) != fingerprint(full)
    frames = [
        [ask(network, processor, video, question, src)["frames"] for video, question, src in questions]
        for network in (full, model)
    ]
    same = sum(ours == theirs for ours, theirs in zip(*frames, strict=True))
    assert same >= agreement * len(questions)
