"""docs/commands.md and the how-tos: their commands in turn, on small models of the same names."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
from safetensors.torch import load_file, save_file

from hhdeploy.bundle import Bundle
from tests.calibration.conftest import write_pictures
from tests.docs.pages import Block, blocks, commands, words_of
from tests.hhdeploy.bundle.test_signing import pair
from tests.runtime.serving.servers import running_server
from tests.support import images
from tests.workshop import contents

VIT, HF = "vit_base_patch16_224", "transformers:google/vit-base-patch16-224"
# A folder stands for the hub's repository.
HUB = {"hf://me/tasks": "hub/tasks"}
# What takes a compiler, a server or many minutes; tests/docs/test_blocks.py says where it runs.
LEFT_OUT = (
    *("hhdeploy build", "hhdeploy serve", "hhdeploy bench tasks --serve", "hhdeploy doctor"),
    *("hhdeploy web", "hhdeploy adapter import SOURCE", "hhdeploy adapter extract CHECKPOINT"),
)
# After the commands of docs/commands.md, which made what these speak of.
OTHERS = ("docs/repositories.md", "docs/importing.md", "docs/calibration.md", "docs/howto/int8.md")


def lines(page: str) -> list[list[str]]:
    """The hhdeploy commands of a page that run here, as words."""
    shell = [line for block in blocks(page) if not block.kind for line in commands(block)]
    ours = [line for line in shell if line.startswith("hhdeploy ")]
    return [shlex.split(line)[1:] for line in ours if not line.startswith(LEFT_OUT)]


def run(succeed, words: list[str]) -> str:
    """A command with the small model, and a calibration that leaves images to judge on."""
    few = ["--images", "8"] if words[0] == "calibrate" and "--check" not in words else []
    names = {VIT: "vit", **HUB}
    return succeed(*(names.get(word, word) for word in words), *few)


def serve_fleet(here) -> None:
    """The how-to's server, and a folder of its fleet that is asked for by its name."""
    _, bundle, *options = words_of("docs/howto/many-tasks.md", "hhdeploy serve ")
    with running_server(here / bundle, here / "log", *options) as server:
        assert server.json("GET", "/v2/models/first/ready") == (
            200,
            {"name": "first", "ready": True},
        )
        status, found = server.logits(bundle, "first", images(1))
        assert status == 200, found


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
    pair(here)
    return here


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about training
def test_the_commands_of_the_pages(there, succeed, capsys):
    said = {}
    for words in lines("docs/commands.md"):
        said[" ".join(words)] = run(succeed, words)
    succeed("adapter", "add", "tasks", "pets=adapters/flowers")
    for made, name in (("adapters/flowers", "birds"), ("adapters/mine", "planes")):
        shutil.copytree(made, name)
    shutil.copytree("images/flowers", "images/pets")
    for page in OTHERS:
        bundle = {"OUT": "tasks"} if page == "docs/calibration.md" else {}
        for words in lines(page):
            said[" ".join(words)] = run(succeed, [bundle.get(word, word) for word in words])
    assert "daisy" in said["predict tasks photo.jpg --adapter flowers --precision int8"]
    assert "pets" in said["adapter list tasks"]
    tasks = Bundle.open(there / "tasks")
    assert [entry.name for entry in tasks.manifest.adapters] == ["flowers", "lora", "pets"]
    assert set(tasks.manifest.graphs) == {"float32", "int8"}
    for made in ("tasks", "tasks_pictures", "vit", "vit_pictures"):
        assert (there / "models" / made / "config.pbtxt").is_file()
    configuration = json.loads((there / "served" / "config.json").read_text())
    served = [entry["config"]["name"] for entry in configuration["model_config_list"]]
    assert served == ["tasks", "vit"]
    assert contents(there / "pulled").keys() >= {"hhdeploy.json", "model.sig"}
    assert (there / "page.html").is_file() and (there / "report.html").is_file()
    older = json.loads((there / "older" / "hhdeploy.json").read_text())
    assert older["versions"]

    succeed("adapter", "add", "tasks", "emoji=adapters/flowers")
    shutil.copytree(there / "tasks", there / "vits14" / "bundles" / "branches")
    shutil.copytree(there / "adapters" / "flowers", there / "vits14" / "adapters" / "hta" / "solar")
    shutil.copy("photo.jpg", "photo.png")
    predicted, inspected = (run(succeed, words) for words in lines("examples/vits14/README.md"))
    assert "daisy" in predicted and "additive" in inspected

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
    serve_fleet(there)

    shutil.rmtree(there / "tasks")
    (words,) = lines("docs/howto/jetson.md")
    run(succeed, words)
    assert set(Bundle.open(there / "tasks").manifest.graphs) == {"float32", "float16"}


def test_no_command_is_overlooked():
    assert len(lines("docs/commands.md")) == 29
    assert len(lines("docs/howto/int8.md")) == 4
    assert len(lines("docs/repositories.md")) == 3
    assert len(lines("docs/importing.md")) == 3
    assert len(lines("docs/calibration.md")) == 3
    assert len(lines("docs/howto/jetson.md")) == 1
    assert len(lines("docs/howto/many-tasks.md")) == 1
    assert len(lines("docs/howto/peft.md")) == 6
    assert len(lines("examples/vits14/README.md")) == 2


def test_a_comment_is_no_command_and_a_long_line_is_one():
    text = "# why\nhhdeploy a b \\\n    c  # and so on\n\nhhdeploy d '#e'\n"
    assert commands(Block("x.md", "", text)) == ["hhdeploy a b      c", "hhdeploy d '#e'"]
