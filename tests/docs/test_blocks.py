"""Every block of code of the documentation is run by a test, or says here why none can."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import Block, blocks, commands, pages
from tests.workshop import ROOT

PAGE, START = "tests/cli/test_commands_page.py", "tests/cli/test_start_page.py"
PYTHON, MODELS = "tests/hhdeploy/test_python_page.py", "tests/examples/test_models_page.py"
HTTP, RAY = "tests/runtime/serving/test_http.py", "tests/runtime/serving/test_ray.py"

# Page -> the test that runs its blocks as they stand, on small models. A number is a block's place.
RUN: dict[str, dict[int | str, str]] = {
    "docs/commands.md": {0: PAGE, 1: PAGE, 2: PAGE, 3: PAGE, 4: PAGE, 5: PAGE, 8: PAGE},
    "docs/howto/int8.md": {0: PAGE, 1: PAGE, 2: PAGE},
    "docs/howto/many-tasks.md": {0: PAGE, "python": PAGE},
    "docs/howto/peft.md": {0: START},
    "docs/models.md": {"python": MODELS},
    "docs/python.md": {"python": PYTHON},
    "docs/serving.md": {"bash": HTTP, "python": HTTP},
    "docs/start.md": {1: START, 2: START, 3: START, "python": START},
}

# What a test runs in other words, or in part: first line -> where, and what is different.
IN_OTHER_WORDS = {
    "make test     # creates": (".ci/run", "this very run"),
    "hhdeploy calibrate OUT --data images/ --precision int8": (PAGE, "other names"),
    "hhdeploy serve tasks --adapters-dir fleet": (
        "tests/runtime/serving/test_fleet.py",
        "the same options in a process of the test's",
    ),
    "hhdeploy serve OUT --model-name vit --adapters-dir": (
        "tests/runtime/serving/test_fleet.py",
        "the same options in a process of the test's",
    ),
    "hhdeploy serve OUT --model-name vit ": (HTTP, "as the test's server"),
    "openssl rand": (HTTP, "the block after it asks such a server"),
    "(umask 077; openssl rand": (
        "tests/runtime/serving/test_access.py",
        "certificates and tokens of the test's own",
    ),
    "hhdeploy bench tasks --serve": ("tests/cli/test_bench_serve.py", "fewer requests"),
    "hhdeploy bench OUT --serve  ": ("tests/cli/test_bench_serve.py", "fewer requests"),
    "hhdeploy bench OUT --serve --abuse": ("tests/cli/test_bench_serve.py", "for a second"),
    "hhdeploy serve tasks --ray": (RAY, "other names and ports"),
    "hhdeploy serve OUT --ray": (RAY, "other names and ports"),
    "hhdeploy adapter import SOURCE": ("tests/cli/test_adapters.py", "it is the usage"),
    "hhdeploy web tasks site": ("tests/js/test_web.py", "other names"),
    "hhdeploy web BUNDLE site/": ("tests/js/test_web.py", "other names"),
    "hhdeploy adapter merge birds": (PAGE, "other names"),
    "hhdeploy web ": ("tests/js/test_web.py", "other names"),
    "hhdeploy cache list": (PAGE, "as it stands"),
    "hhdeploy sign ": ("tests/cli/test_provenance.py", "other names, and folders for a hub"),
    "hhdeploy ovms tasks served --name vit": (
        "tests/cli/test_ovms.py",
        "other names, and no server: none was at hand",
    ),
    "hhdeploy triton tasks models --name vit": (
        "tests/exporters/test_triton.py",
        "other names, and no tritonserver: none was at hand",
    ),
    "pip install openvino": ("tests/examples/test_cpp.py", "without the installation"),
    "build/classify OUT cat.png": ("tests/examples/test_cpp.py", "other names"),
    "S=examples/starter": ("tests/cli/test_machine_commands.py", "the demo, on the same files"),
    "import json, timm": ("tests/cli/test_machine_commands.py", "the demo reads the same files"),
    "from hhdeploy.runtime import open_session": (
        "tests/runtime/test_tensorrt.py",
        "stand-ins of an engine",
    ),
    "hhdeploy build OUT --backend tensorrt-rtx": (
        "tests/hhdeploy/test_building.py",
        "the compiler takes a minute a graph: small ones",
    ),
    "hhdeploy build tasks --backend tensorrt-rtx": (
        "tests/hhdeploy/test_building.py",
        "the compiler takes a minute a graph: small ones",
    ),
    "make demo     # creates": ("tests/cli/test_machine_commands.py", "without the installation"),
    'import * as ort from "onnxruntime-web"': ("tests/js/test_package.py", "other names"),
    'import * as ort from "onnxruntime-node"': ("tests/js/test_package.py", "other names"),
    "npm ci --prefix js": ("tests/js/test_package.py", "the same, where npm is"),
    "make gpu-check": ("tests/test_gpu_check.py", "a rehearsal on the CPU"),
    "python -m tests.soak.bundle": ("tests/hhdeploy/bundle/test_crashes.py", "seconds of it"),
}

# What no test runs, and why: page -> what it lacks.
NOT_RUN = {
    "docs/howto/jetson.md": "needs a Jetson; the page says so",
    "docs/howto/peft.md": "needs a GPU that TensorRT-RTX runs on",
    "docs/howto/ray.md": "needs a cluster of several machines",
    "docs/tensorrt.md": "needs a Jetson",
    "docs/start.md": "installs from a package index: make release-check does",
    "docs/versions.md": "installs from a package index, for minutes",
    "examples/serving/README.md": "needs a Ray cluster that runs",
    "examples/vits14/README.md": "downloads 0.6 GB and trains for an hour",
}

# Formulas, trees of files and answers.
NO_PROGRAM = re.compile(r"ΔW|p = W|y = |hhdeploy\.json |\{\"model_name\"")


def account(block: Block, place: int) -> tuple[str, str] | None:
    """Where a block is run, or why not; None: nobody says."""
    run = RUN.get(block.page, {})
    for key in (place, block.kind):
        if key in run and key != "":
            return run[key], "as it stands"
    if NO_PROGRAM.match(block.head):
        return "", "no program"
    found = [told for head, told in IN_OTHER_WORDS.items() if block.head.startswith(head)]
    if found:
        return found[0]
    return ("", NOT_RUN[block.page]) if block.page in NOT_RUN else None


ALL = [(block, place) for page in pages() for place, block in enumerate(blocks(page))]


def test_every_block_is_accounted_for():
    silent = [f"{block.page}: {block.head}" for block, place in ALL if not account(block, place)]
    assert not silent
    assert len(ALL) > 70


def test_a_block_that_is_planted_is_not():
    assert account(Block("docs/idea.md", "", "hhdeploy frobnicate\n"), 9) is None
    assert account(Block("docs/commands.md", "python", "print()\n"), 9) is None


def test_what_is_named_is_there():
    """The tests, the pages and the blocks that the tables speak of."""
    heads = [block.head for block, _ in ALL]
    for head, (test, _) in IN_OTHER_WORDS.items():
        assert (ROOT / test).is_file(), test
        assert any(h.startswith(head) for h in heads), head
    for page, told in RUN.items():
        places = {place for block, place in ALL if block.page == page}
        kinds = {block.kind for block, _ in ALL if block.page == page}
        assert told.keys() <= places | kinds, page
        assert all((ROOT / test).is_file() for test in told.values())
    assert NOT_RUN.keys() <= set(pages())


def test_readme_s_commands_are_the_makefile_s():
    (block,) = blocks("README.md")
    assert commands(block) == ["make demo", "make test"]
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    shown = {w for b, _ in ALL for line in commands(b) for w in re.findall(r"^make ([\w-]+)", line)}
    assert shown <= set(targets), shown - set(targets)
    assert {"demo", "test", "lint", "docs", "release-check", "gpu-check", "bench"} <= shown


@pytest.mark.parametrize("page", ["README.md"])
def test_readme_is_one_screen(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert len(re.findall(r"^!\[", text, re.M)) == 1
    assert len(re.findall(r"^\|---", text, re.M)) == 1
