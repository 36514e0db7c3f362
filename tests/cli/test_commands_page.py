"""docs/commands.md and the how-tos: their commands in turn, on small models of the same names."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
from safetensors.torch import load_file, save_file

from hhdeploy.bundle import Bundle
from tests.calibration.conftest import write_pictures
from tests.docs.pages import Block, blocks, commands

VIT, HF = "vit_base_patch16_224", "transformers:google/vit-base-patch16-224"
# What takes a compiler, a server or many minutes; tests/docs/test_blocks.py says where it runs.
LEFT_OUT = (
    *("hhdeploy build", "hhdeploy serve", "hhdeploy bench tasks --serve", "hhdeploy doctor"),
    *("hhdeploy web", "hhdeploy sign", "hhdeploy push", "hhdeploy pull"),
    "hhdeploy verify tasks --signature",
)


def lines(page: str) -> list[list[str]]:
    """The hhdeploy commands of a page that run here, as words."""
    shell = [line for block in blocks(page) if not block.kind for line in commands(block)]
    ours = [line for line in shell if line.startswith("hhdeploy ")]
    return [shlex.split(line)[1:] for line in ours if not line.startswith(LEFT_OUT)]


def run(succeed, words: list[str]) -> str:
    """A command with the small model, and a calibration that leaves images to judge on."""
    few = ["--images", "8"] if words[0] == "calibrate" and "--check" not in words else []
    return succeed(*("vit" if word == VIT else word for word in words), *few)


@pytest.fixture
def there(here, workshop):
    """`here`, and what the pages' commands find in it."""
    from benchmarks.peft_methods import trained
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.backbones.spec import BackboneSpec

    write_pictures(here / "faces", 6, 5)
    ages = [f"{index}.png,{20 + index}" for index in range(6)]
    (here / "ages.csv").write_text("\n".join(["path,age", *ages]) + "\n")
    arguments = {"r": 3, "target_modules": ["qkv", "mlp.fc1"], "modules_to_save": ["head"]}
    trained(load_backbone(BackboneSpec("vit")), "LORA", arguments).save_pretrained("peft-lora")
    tuned = load_file(workshop.checkpoint)
    weight = tuned["blocks.1.mlp.fc2.weight"]
    weight += weight[:, :1] @ weight[:1]  # of rank 1
    save_file(tuned, here / "tuned.safetensors")
    shutil.copytree(here / "flowers", here / "images" / "flowers")
    for column in range(2):  # of an adapter without class names
        write_pictures(here / "images" / "lora" / str(column), 6, column)
    return here


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about training
def test_the_commands_of_the_pages(there, succeed, capsys):
    said = {}
    for page in ("docs/commands.md", "docs/howto/int8.md"):
        for words in lines(page):
            said[" ".join(words)] = run(succeed, words)
    assert "daisy" in said["predict tasks photo.jpg --adapter flowers --precision int8"]
    assert "pets" in said["adapter list tasks"]
    tasks = Bundle.open(there / "tasks")
    assert [entry.name for entry in tasks.manifest.adapters] == ["flowers", "lora"]
    assert set(tasks.manifest.graphs) == {"float32", "int8"}
    assert (there / "models" / "tasks" / "config.pbtxt").is_file()
    assert (there / "page.html").is_file() and (there / "report.html").is_file()
    older = json.loads((there / "older" / "hhdeploy.json").read_text())
    assert older["versions"]

    shutil.rmtree(there / "tasks")
    page = "docs/howto/many-tasks.md"
    for words in lines(page):
        run(succeed, words)
    for name in ("first", "second"):
        shutil.copytree(there / "adapters" / "both", there / "fleet" / name)
    (code,) = (block.text for block in blocks(page) if block.kind == "python")
    capsys.readouterr()
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out == "3 tasks\n"


def test_no_command_is_overlooked():
    assert len(lines("docs/commands.md")) == 25
    assert len(lines("docs/howto/int8.md")) == 4
    assert len(lines("docs/howto/many-tasks.md")) == 1
    assert len(lines("docs/howto/peft.md")) == 6


def test_a_comment_is_no_command_and_a_long_line_is_one():
    text = "# why\nhhdeploy a b \\\n    c  # and so on\n\nhhdeploy d '#e'\n"
    assert commands(Block("x.md", "", text)) == ["hhdeploy a b      c", "hhdeploy d '#e'"]
