"""Every -h answers at once, on a machine that has none of the heavy packages."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import click
import pytest

from hhdeploy.cli import _COMMANDS
from hhdeploy.cli.naming import NamedPath
from hhdeploy.cli.wording import all_commands
from tests.workshop import HEAVY, ROOT, blocker, run_command, run_python

BLOCKED = (*HEAVY, "onnxruntime", "nncf", "tensorrt", "peft")
ADAPTER = (
    *("inspect", "import", "extract", "merge", "diff", "list", "add", "remove"),
    *("pack", "unpack"),
)
CACHE = ("list", "clear")
PATHS = [
    (),
    *((name,) for name in _COMMANDS),
    *(("adapter", name) for name in ADAPTER),
    *(("cache", name) for name in CACHE),
]

_ALL = """
import json, sys
from click.testing import CliRunner
from hhdeploy.cli import main

answers = {}
for path in json.loads(sys.argv[1]):
    for flag in ("-h", "--help"):
        result = CliRunner().invoke(main, [*path, flag])
        answers[" ".join([*path, flag])] = [result.exit_code, result.output, repr(result.exception)]
loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(json.loads(sys.argv[2])))
print(json.dumps({"answers": answers, "loaded": loaded}))
"""


@pytest.fixture(scope="module")
def helped():
    """All answers from one interpreter in which the heavy packages cannot be imported."""
    done = run_python(_ALL, json.dumps(PATHS), json.dumps(BLOCKED), blocked=BLOCKED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: " ".join(path) or "hhdeploy")
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(helped, path, flag):
    code, output, error = helped["answers"][" ".join([*path, flag])]
    assert (code, error) == (0, "None"), f"{error}\n{output}"
    assert re.match(rf"Usage: \S+ {' '.join(path)}", output)
    assert "Options:" in output


@pytest.mark.parametrize("path", PATHS, ids=lambda path: " ".join(path) or "hhdeploy")
def test_help_fits_80_columns_and_nothing_is_cut(helped, path):
    text = helped["answers"][" ".join([*path, "--help"])][1]
    assert not [line for line in text.splitlines()[1:] if len(line) > 80 or line.endswith("...")]


def test_help_imports_nothing_heavy(helped):
    assert helped["loaded"] == []


def test_the_group_s_help_names_every_command(helped):
    text = helped["answers"]["-h"][1]
    for name, (_, line) in _COMMANDS.items():
        assert re.search(rf"^  {name}  +{re.escape(line)}", text, re.MULTILINE)


def test_the_groups_commands_are_the_ones_tested():
    from hhdeploy.cli import adapter, cache

    assert sorted(adapter.command.commands) == sorted(ADAPTER)
    assert sorted(cache.command.commands) == sorted(CACHE)


@pytest.mark.parametrize("path", [(), ("export",), ("adapter", "add"), ("verify",)])
def test_help_as_a_user_runs_it(tmp_path, path):
    """A real process; the blocker comes with the interpreter (sitecustomize)."""
    (tmp_path / "sitecustomize.py").write_text(blocker(BLOCKED))
    command = [sys.executable, "-X", "importtime", "-c", "from hhdeploy.cli import main; main()"]
    done = run_command([*command, *path, "-h"], path=(tmp_path, ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ")
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert "click" in imported, "the list of imports was not understood"
    assert imported.isdisjoint(BLOCKED)


def test_every_default_is_stated():
    """Of options whose default is a value: a flag is off, and what is not given is None."""
    silent = []
    for path, command in all_commands().items():
        settings = getattr(command, "context_settings", {})
        context = click.Context(command, **{k: v for k, v in settings.items() if "show" in k})
        for option in command.params:
            if not isinstance(option, click.Option) or option.required:
                continue
            value = option.get_default(context)
            on_and_off = option.is_flag and option.secondary_opts
            given = bool(on_and_off) if isinstance(value, bool) else isinstance(value, int | float)
            text = " ".join(option.get_help_record(context) or ())
            if given and "default" not in text.lower():
                silent.append(f"{path} {option.opts[0]}")
    assert not silent


def test_every_path_refuses_the_empty_one(call):
    """Of a variable that is not set: click takes it for the working directory."""
    paths = [
        (path, option)
        for path, command in all_commands().items()
        for option in command.params
        if isinstance(option.type, click.Path)
    ]
    assert len(paths) > 50
    assert not [(path, o.name) for path, o in paths if not isinstance(o.type, NamedPath)]
    for line in (
        ["adapter", "list", ""],
        ["export", "", "--model", "x"],
        ["export", "out", "--model", "x", "--checkpoint", ""],
        ["predict", "bundle", ""],
        ["export", "out", "--model", "x", "--adapter", ""],
    ):
        result = call(*line)
        assert result.exit_code == 2
        assert "found an empty one." in result.stderr


def test_the_blocker_blocks():
    done = run_python("import torch", blocked=BLOCKED)
    assert done.returncode == 1
    assert "torch is blocked in this test" in done.stderr


def test_the_version(call):
    result = call("--version")
    assert result.exit_code == 0
    assert re.search(r"\d+\.\d+", result.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("export",),
        ("export", "out", "--model", "vit_tiny_patch16_224"),
        ("verify",),
        ("verify", "bundle", "--device", "tpu"),
        ("predict", "bundle"),
        ("predict", "bundle", "image.png", "--top", "0"),
        ("adapter", "add", "bundle"),
        ("adapter", "frobnicate"),
        ("verify", "bundle", "--verify-images", "0"),
    ],
)
def test_calls_that_are_no_commands_show_the_usage(call, arguments):
    """click's own convention: exit code 2, the usage, and one line that says what is wrong."""
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    assert len(re.findall("^Error: ", result.stderr, re.MULTILINE)) == 1
    assert not result.stdout


def test_python_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "hhdeploy", "--version"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("hhdeploy, version ")
