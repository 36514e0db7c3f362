"""docs/start.md: its three ways in as they stand there, on small models under the same names."""

from __future__ import annotations

import re
import shlex
import shutil

import numpy as np
import pytest

from hhdeploy.bundle import Bundle
from tests.docs.pages import Block, blocks, commands
from tests.runtime.serving.servers import running_server
from tests.support import assert_parity
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


def how_to() -> Block:
    """The first commands of the how-to for PEFT; the others build an engine."""
    return blocks("docs/howto/peft.md")[0]


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
    # The how-to's way from the same folder.
    shutil.rmtree(here / "served")
    shutil.rmtree(here / "adapters")
    said = [run(succeed, shlex.split(line), {HF: model}) for line in commands(how_to())]
    assert set(Bundle.open(here / "served").manifest.graphs) == {"float32", "float16"}
    assert "mine" in said[-1]


def test_from_a_checkpoint_to_int8(here, succeed, workshop):
    shutil.copy(workshop.checkpoint, here / "tuned.safetensors")
    said = [run(succeed, words, {VIT: "vit"}) for words in ways()[2]]
    assert {"float32", "int8"} == set(Bundle.open(here / "folded").manifest.graphs)
    assert "model" in said[-1]
