"""Every block of code of the documentation is run by a test, or says here why none can."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import Block, blocks, commands, pages
from tests.workshop import ROOT

PAGE, START = "tests/cli/test_commands_page.py", "tests/cli/test_start_page.py"
PYTHON, MODELS = "tests/hhdeploy/test_python_page.py", "tests/examples/test_models_page.py"
SERVING, RAY = "tests/runtime/serving/test_serving_page.py", "tests/runtime/serving/test_ray.py"
WEB, JS = "tests/js/test_web.py", "tests/js/test_package.py"
CPP, STARTER = "tests/examples/test_cpp.py", "tests/examples/test_starter.py"
LOAD, ABUSE = "tests/cli/test_bench_serve.py", "tests/cli/test_bench_abuse.py"
BUILDING, RTX = "tests/hhdeploy/test_building.py", "tests/runtime/test_tensorrt.py"

# Page -> the test that runs its blocks as they stand: small models and files under their names,
# and options added where the page's own would take minutes. A number is a block's place.
RUN: dict[str, dict[int | str, str]] = {
    "docs/calibration.md": {0: PAGE},
    "docs/commands.md": {
        **dict.fromkeys((0, 1, 2, 3, 4, 5, 8, 9), PAGE),
        6: WEB,
        7: BUILDING,
    },
    "docs/howto/int8.md": {0: PAGE, 1: PAGE, 2: PAGE},
    "docs/howto/jetson.md": {0: PAGE},
    "docs/howto/many-tasks.md": {0: PAGE, 1: PAGE, 2: LOAD, "python": PAGE},
    "docs/howto/peft.md": {0: START},
    "docs/howto/ray.md": {0: RAY},
    "docs/importing.md": {2: PAGE},
    "docs/models.md": {"python": MODELS},
    "docs/python.md": {"python": PYTHON},
    "docs/repositories.md": {1: PAGE},
    "docs/serving.md": {
        "bash": SERVING,
        "python": SERVING,
        "json": STARTER,
        **dict.fromkeys((0, 5, 6, 8), SERVING),
        9: RAY,
        11: ABUSE,
    },
    "docs/start.md": {1: START, 2: START, 3: START, "python": START},
    "docs/web.md": {0: WEB},
    "examples/cpp/README.md": {1: CPP},
    "docs/tensorrt.md": {"python": RTX},
    "examples/starter/README.md": {0: STARTER, 1: STARTER},
    "examples/vits14/README.md": {1: PAGE},
    "js/README.md": {1: JS, 2: JS},
}

# What a test runs in other words, or in part: first line -> where, and what is different.
IN_OTHER_WORDS = {
    "make test     # creates": (".ci/run", "this very run"),
    "hhdeploy serve OUT --ray --replicas 4": (RAY, "two replicas, and no `serve deploy`"),
    "hhdeploy bench OUT --serve  ": (LOAD, "the second line; the first with other options"),
    "hhdeploy build served": (BUILDING, "the engine is built, as on other pages; to run it is not"),
    "hhdeploy build OUT --backend tensorrt-rtx": (
        BUILDING,
        "the first line: the other needs a GPU",
    ),
    "hhdeploy ovms tasks served --name vit": (PAGE, "no server: none was at hand"),
    "hhdeploy triton tasks models --name vit": (PAGE, "no tritonserver: none was at hand"),
    "pip install openvino": (CPP, "without the installation"),
    "make demo     # creates": ("tests/cli/test_machine_commands.py", "without the installation"),
    "npm ci --prefix js": (JS, "the same, where npm is"),
    "make gpu-check": ("tests/test_gpu_check.py", "a rehearsal on the CPU"),
    "python -m tests.soak.bundle": ("tests/hhdeploy/bundle/test_crashes.py", "seconds of it"),
}

# What no test runs, and why: page -> what it lacks.
NOT_RUN = {
    "docs/howto/jetson.md": "what is left needs a Jetson; the page says so",
    "docs/howto/ray.md": "needs a cluster of several machines",
    "docs/tensorrt.md": "needs a Jetson",
    "docs/start.md": "installs from a package index: make release-check does",
    "docs/versions.md": "installs from a package index, for minutes",
    "examples/vits14/README.md": "downloads 0.6 GB and trains for an hour",
}

# Formulas, trees of files, answers, and a synopsis of words that are none of the user's.
NO_PROGRAM = re.compile(
    r"ΔW|p = W|y = |hhdeploy\.json |\{\"model_name\"|hhdeploy adapter import SOURCE"
)


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
    assert account(Block("docs/commands.md", "python", "print()\n"), 99) is None


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
