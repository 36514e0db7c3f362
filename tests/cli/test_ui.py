"""What commands share: reading ``[NAME=]DIR``, numbers."""

from __future__ import annotations

import ast
import math
import re
import shlex
from pathlib import Path

import click
import pytest
from click import UsageError

from hhdeploy.choices import AUTO
from hhdeploy.cli import progress, ui
from hhdeploy.cli.naming import _named_directory, named_directories
from hhdeploy.cli.parity_table import describe_data
from hhdeploy.cli.wording import all_commands
from hhdeploy.errors import OptionError
from tests.test_house import found_by


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with directories whose names hold "="."""
    for name in ("runs/lr=0.1", "plain", "both=plain", "odd=name"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "name", "directory"),
    [
        ("plain", "plain", "plain"),
        ("cars=plain", "cars", "plain"),
        ("cars=nowhere", "cars", "nowhere"),
        ("runs/lr=0.1", "lr=0.1", "runs/lr=0.1"),
        ("./odd=name", "odd=name", "odd=name"),
        ("odd=name", "odd=name", "odd=name"),
        ("cars=runs/lr=0.1", "cars", "runs/lr=0.1"),
        ("./both=plain", "both=plain", "both=plain"),
        ("both=./plain", "both", "plain"),
        ("runs/lr=0.2", "lr=0.2", "runs/lr=0.2"),  # a typing error: named whole
        ("a/b=plain", "a/b", "plain"),  # no name, but meant as one: refused later
    ],
)
def test_a_path_may_hold_an_equals_sign(here, value, name, directory):
    assert _named_directory(value) == (name, Path(directory))


def test_a_name_that_is_none_says_how_to_give_one(here):
    for value in ("runs/lr=0.1", "a/b=plain", "=plain", "backbone=plain"):
        with pytest.raises(OptionError, match=r"Give it as NAME=DIR\.$"):
            named_directories([value])
    assert named_directories(["cars=runs/lr=0.1"]) == {"cars": Path("runs/lr=0.1")}


def test_absolute_paths_may_too(here):
    path = here / "runs" / "lr=0.1"
    assert _named_directory(str(path)) == ("lr=0.1", path)
    assert named_directories([f"cars={path}"]) == {"cars": path}


def test_what_can_be_read_both_ways_is_refused_with_both(here):
    with pytest.raises(UsageError, match="both both=plain and plain are directories") as caught:
        named_directories(["both=plain"])
    for advised in (f"NAME={here}/both=plain", f"both={here}/plain"):
        assert advised in str(caught.value)
        assert set(named_directories([advised])) <= {"NAME", "both"}


def test_nothing_behind_the_equals_sign_is_refused(here):
    with pytest.raises(UsageError, match="no directory after '='"):
        named_directories(["cars="])


def test_what_was_left_out_of_a_folder_is_said():
    data = {"kind": "images", "folder": "photos"}
    assert describe_data(data) == "images in photos/"
    skipped = {".txt": 1, ".heic": 2}
    assert describe_data(data | {"skipped": skipped}).endswith("left out: 2 .heic, 1 .txt")


NUMBERS = [
    (name, parameter)
    for name, command in all_commands().items()
    for parameter in command.params
    if isinstance(parameter.type, click.FloatRange) or parameter.name == "seed"
]


@pytest.mark.parametrize(
    ("command", "option"), NUMBERS, ids=lambda each: getattr(each, "name", each)
)
def test_what_is_no_number_is_refused(command, option):
    """nan is in every range of click's: one waited for ever, others ended in tracebacks."""
    wrong = ["nan", "-1"]
    wrong += ["1" + 20 * "0"] if option.name == "seed" else []
    wrong += ["inf"] if option.name not in ("lock_timeout", "seed") else []
    for text in wrong:
        with pytest.raises(click.BadParameter):
            option.type.convert(text, option, None)
    assert option.type.convert("0.5" if option.name != "seed" else "5", option, None) > 0


def test_every_device_says_what_auto_takes():
    devices = [
        (name, option)
        for name, command in all_commands().items()
        for option in command.params
        if option.name == "device"
    ]
    assert {"bench", "calibrate", "predict", "serve", "train", "verify"} <= {n for n, _ in devices}
    for name, option in devices:
        said = "auto: cuda, else cpu." if name == "train" else AUTO
        assert option.help.endswith(said), name
        # In the order that it says, every name is one.
        names = said.removesuffix(".").replace(",", "").split()
        assert next(n for n in names if n in option.type.choices and n != "auto") == "cuda"


def test_a_wait_may_have_no_end():
    options = [option for _, option in NUMBERS if option.name == "lock_timeout"]
    assert options
    assert {option.type.convert("inf", option, None) for option in options} == {math.inf}


ODD = f"runs[v2] {20 * 'of-the-week-'}:car:"


def test_what_is_said_is_no_markup_and_is_whole(capsys):
    ui.say_unverified(Path(ODD), ["[b]"])
    ui.console().print(ui.table(ODD, ("a",), [("b",)]))
    with progress.steps(quiet=False) as step:
        step(f"loading {ODD}")
    with progress.phased_steps(quiet=False) as (step, _):
        step(f"building {ODD}")
    said = capsys.readouterr()
    run = f"run hhdeploy verify {shlex.quote(ODD)} --against-torch"
    assert said.out.splitlines()[:2] == [f"[b] is not verified: {run}", ODD]
    assert f"loading {ODD} " in said.err
    assert f"building {ODD} " in said.err


def markup(tree):
    """Text with rich's markup, and consoles that would read it."""
    found = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"\[(/|bold|dim|red|green|yellow)\]", node.value)
    ]
    calls = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return found + [name for name in calls if name in ("Console", "Text.from_markup")]


def test_nothing_that_is_printed_is_markup():
    """Names and paths would be taken for it, too."""
    found = {"hhdeploy/cli/progress.py": 2 * ["Console"], "hhdeploy/cli/ui.py": ["Console"]}
    assert found_by(markup) == found
    assert markup(ast.parse('print(f"[dim]{name}[/]")')) == ["[dim]", "[/]"]
