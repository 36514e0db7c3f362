"""docs/start.md: its three ways in as they stand there, on small models under the same names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from hhdeploy.bundle import Bundle
from tests.calibration.conftest import write_pictures
from tests.runtime.serving.servers import running_server
from tests.support import TINY_ARGS, TINY_MODEL, assert_parity
from tests.workshop import ROOT

VIT, HF = "vit_base_patch16_224", "transformers:google/vit-base-patch16-224"


def ways() -> list[list[list[str]]]:
    """The commands of every block of the section, each as its words."""
    text = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    section = text.split("\n## Three ways in\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    return [[shlex.split(line) for line in block.splitlines()] for block in blocks]


def edge() -> str:
    """The page's Python."""
    text = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code.replace('device="auto", threads=2', 'device="cpu", threads=1')


@pytest.fixture
def here(tmp_path, monkeypatch, workshop) -> Path:
    """A working directory with pictures, and the ViT's folder as timm saves it."""
    for number, label in enumerate(("daisy", "rose")):
        write_pictures(tmp_path / "flowers" / label, 8, number)
    shutil.copy(tmp_path / "flowers" / "daisy" / "0.png", tmp_path / "photo.jpg")
    model = workshop.backbone.model
    config = {"architecture": TINY_MODEL, "model_args": TINY_ARGS, "num_classes": 5}
    config["pretrained_cfg"] = model.pretrained_cfg
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()},
        tmp_path / "vit" / "model.safetensors",
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(succeed, words, models):
    """A command of the page, its model one that is here."""
    assert words[0] == "hhdeploy"
    return succeed(*(models.get(word, word) for word in words[1:]))


def test_each_is_three_commands_at_most():
    assert len(ways()) == 3
    assert all(len(way) <= 3 for way in ways())


def test_from_a_folder_of_images_to_an_answer(here, succeed, capsys):
    way = ways()[0]
    said = [run(succeed, words, {VIT: "vit"}) for words in way]
    assert "daisy" in said[-1]
    assert "rose" in said[-1]
    # At the edge, with what the commands wrote.
    exec(compile(edge(), "docs/start.md", "exec"), {})
    assert capsys.readouterr().out.split()[0] in ("daisy", "rose")


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about training
def test_from_a_peft_folder_to_a_server(here, succeed):
    from benchmarks.peft_methods import images, logits_of, trained, transformers_vit
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.backbones.spec import BackboneSpec

    transformers_vit(here / "hf")
    model = f"transformers:{here / 'hf' / 'vit'}"
    backbone = load_backbone(BackboneSpec(model))
    arguments = {"r": 3, "target_modules": ["q_proj", "mlp.fc1"], "modules_to_save": ["classifier"]}
    adapter = trained(backbone, "LORA", arguments)
    adapter.save_pretrained(str(here / "peft-lora"))
    *before, serve = ways()[1]
    for words in before:
        run(succeed, words, {HF: model})
    assert serve[:2] == ["hhdeploy", "serve"]
    with running_server(here / serve[2], here / "log", *serve[3:]) as server:
        status, found = server.logits(serve[2], "mine", images())
    assert status == 200, found
    assert_parity(logits_of(adapter), np.asarray(found), "branches", "float32")


def test_from_a_checkpoint_to_int8(here, succeed, workshop):
    shutil.copy(workshop.checkpoint, here / "tuned.safetensors")
    said = [run(succeed, words, {VIT: "vit"}) for words in ways()[2]]
    assert {"float32", "int8"} == set(Bundle.open(here / "folded").manifest.graphs)
    assert "model" in said[-1]
