"""What messages advise can be done: the commands take it, with these very options."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.reading import graph_hint
from hhdeploy.cli import main
from hhdeploy.errors import BundleError
from hhdeploy.exporting.bundles import _check_precisions
from hhdeploy.parity import PARITY
from tests.workshop import ROOT

TYPED = sorted({p for stage, p in PARITY if stage == "twin"})
QUANTISED = sorted({p for stage, p in PARITY if stage == "quantised"})


def parsed(words: list[str]) -> click.Context:
    """``hhdeploy COMMAND ...``, read by click and not run. Raises its UsageError."""
    program, name, *arguments = words
    assert program == "hhdeploy"
    command = main.get_command(click.Context(main), name)
    assert command is not None, f"there is no command {name}"
    return command.make_context(name, arguments)


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_missing_quantised_graph_comes_from_calibrate(small, precision):
    with pytest.raises(BundleError, match=f"no {precision} graph; it has float32") as caught:
        Bundle.open(small).graph(precision)
    advice = str(caught.value).partition("Add it with: ")[2]
    given = parsed(shlex.split(advice)).params
    assert (given["bundle"], given["precision"]) == (small, precision)


@pytest.mark.parametrize("precision", TYPED)
def test_a_missing_typed_graph_comes_from_export(small, precision):
    with pytest.raises(BundleError, match=rf"no {precision} graph.*--precision {precision}\."):
        Bundle.open(small).graph(precision)
    _check_precisions([precision])


def test_what_is_no_precision_gets_the_list_and_no_command(small):
    hint = graph_hint(small, "float8")
    listed = hint.partition(": ")[2].rstrip(".").split(", ")
    assert sorted(listed) == sorted(["float32", *TYPED, *QUANTISED])


# --- every flag in every message ----------------------------------------------------------------

# Who prints the messages of a file (or of one function of it), where these do not name the command
# themselves; all of them must have the flag. The longest name that fits counts.
ANY = "any"  # what several commands share, each with options of its own
OWNERS: dict[str, tuple[str, ...]] = {
    "calibration/": ("calibrate",),
    "exporters/engine": ("build",),
    "exporters/trace.py": ("export",),
    "exporters/triton.py": ("triton",),
    "hhdeploy/exporting/": ("export",),
    "hhdeploy/verifying/bundles.py::verify_against_torch": ("verify",),
    "hhdeploy/backbones/timm.py": ("export", "verify", "train", "adapter import"),
    "hhdeploy/building.py": ("build",),
    "hhdeploy/files/caches.py": (ANY,),
    "hhdeploy/quantising/": ("calibrate",),
    "hhdeploy/cli/__init__.py": (ANY,),
    "hhdeploy/cli/adapter.py::inspect": ("adapter inspect",),
    "hhdeploy/cli/adapter_import.py": ("adapter import",),
    "hhdeploy/cli/bench_serve.py": ("bench",),
    "hhdeploy/cli/cache.py": ("cache list", "cache clear"),
    "hhdeploy/cli/ui.py": (ANY,),
    "hhdeploy/demo.py": ("demo",),
    "hhdeploy/files/directories.py": ("export", "train", "triton", "adapter import"),
    "hhdeploy/adapters/importers/": ("adapter import",),
    "hhdeploy/plan.py": ("export",),
    "hhdeploy/verifying/": ("export", "verify"),
    "hhdeploy/adapters/checks.py::_check_base": (
        "export",
        "adapter add",
        "adapter import",
        "serve",
    ),
    "hhdeploy/bundle/store.py": (
        "adapter add",
        "adapter remove",
        "build",
        "calibrate",
        "export",
        "verify",
    ),
    "hhdeploy/training/": ("train",),
    "hhdeploy/triton.py": ("triton",),
    "runtime/serving/": ("serve",),
}
# No messages: a style sheet, whose variables look like flags.
NO_MESSAGES = ("calibration/report/style.py",)

# Of this program; a placeholder in a flag is a flag that nobody can check.
_FLAG = re.compile(r"(?<![\w-])(?<!tritonserver )--[a-z][a-z0-9-]*(?:\{\})?")
_WORD = re.compile(r"(?<![\w-])[a-z]+")
_COMMAND = re.compile(r"hhdeploy ((?:adapter |cache )?[a-z]+)")
_VERBS = {"export": "export", "exported": "export", "build": "build", "serve": "serve",
          "calibrate": "calibrate", "verify": "verify", "train": "train"}  # fmt: skip
_SENTENCE = re.compile(r"(?<=[.;\n])\s")


def commands() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {sub}": c for sub, c in command.commands.items()}
    return found


COMMANDS = commands()


def flags_of(name: str) -> set[str]:
    params = COMMANDS[name].params
    return {o for p in params for o in (*p.opts, *p.secondary_opts)} | {"--help", "--version"}


@dataclass(frozen=True)
class Advice:
    """A flag in a text, and the command that the text names for it, if any."""

    where: str
    flag: str
    command: str | None
    text: str


def advice_in(where: str, text: str) -> list[Advice]:
    found = []
    for sentence in _SENTENCE.split(text):
        for match in _FLAG.finditer(sentence):
            before = sentence[: match.start()]
            named = _COMMAND.findall(before)
            verbs = [w for w in _WORD.findall(before.lower()) if w in _VERBS]
            command: str | None = None
            if named:
                command = named[-1] if named[-1] in COMMANDS else named[-1].split()[0]
            elif verbs:
                command = _VERBS[verbs[-1]]
            found.append(Advice(where, match.group(), command, sentence))
    return found


def texts_in(path: Path) -> list[tuple[str, str]]:
    """(file::function, text) of every string that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(ROOT).as_posix()
    found: list[tuple[str, str]] = []

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.JoinedStr):
            found.append((f"{name}::{function}", "".join(map(shown, node.values))))
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((f"{name}::{function}", node.value))
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(tree, "")
    return found


def shown(part: ast.AST) -> str:
    """A part of an f-string: text, the texts that a placeholder may become, or {}."""
    texts = [n.value for n in ast.walk(part) if isinstance(n, ast.Constant)]
    return "".join(t for t in texts if isinstance(t, str)) or "{}"


def sources() -> list[Path]:
    roots = ("hhdeploy", "exporters", "calibration", "runtime")
    files = [f for root in roots for f in sorted((ROOT / root).rglob("*.py"))]
    return [f for f in files if not any(p.is_symlink() for p in f.parents)]


def wrong(advice: Advice, owners: tuple[str, ...]) -> str | None:
    """What is wrong with it, or None."""
    if advice.command is not None:
        lacking = [c for c in (advice.command,) if advice.flag not in flags_of(c)]
    elif owners == (ANY,):
        lacking = [] if any(advice.flag in flags_of(c) for c in COMMANDS) else ["every command"]
    else:
        lacking = [c for c in owners if advice.flag not in flags_of(c)] if owners else ["?"]
    if lacking:
        return f"{advice.where}: {advice.flag}: {', '.join(lacking)} lacks it: {advice.text!r}"
    return None


def owners_of(where: str) -> tuple[str, ...]:
    fitting = [key for key in OWNERS if where.startswith(key)]
    if fitting:
        return OWNERS[max(fitting, key=len)]
    command = re.match(r"hhdeploy/cli/(\w+)\.py", where)
    return (command.group(1),) if command and command.group(1) in COMMANDS else ()


def test_no_message_advises_a_flag_that_its_command_lacks():
    found = [
        problem
        for path in sources()
        if path.relative_to(ROOT).as_posix() not in NO_MESSAGES
        for where, text in texts_in(path)
        for advice in advice_in(where, text)
        if (problem := wrong(advice, owners_of(where)))
    ]
    assert not found, "\n".join(found)


def test_the_check_sees_what_is_wrong():
    """The messages that it found when it was written."""
    planted = [
        ("runtime/serving/x.py::f", "--watch: there is nothing to watch."),
        ("hhdeploy/x.py::f", "Add it with: hhdeploy predict OUT --against-torch"),
        ("hhdeploy/x.py::f", "Export the bundle again with --max-slots 9."),
        ("hhdeploy/backbone.py::f", "Check --model and --model-args."),
        ("hhdeploy/adapters/checks.py::_check_base", "Pass the checkpoint with --checkpoint."),
        ("exporters/engine.py::f", "--min-{}: expected 1 or more."),
        ("hhdeploy/nobody.py::f", "Use --overwrite."),
    ]
    for where, text in planted:
        found = advice_in(where, text)
        assert found
        assert any(wrong(advice, owners_of(where)) for advice in found), (where, text)
    (right,) = advice_in("x", "Lower it, or build with --max-batch 3.")
    assert not wrong(right, ())


def test_owners_are_commands_and_their_files_exist():
    for key, owners in OWNERS.items():
        assert owners == (ANY,) or set(owners) <= COMMANDS.keys()
        file = key.partition("::")[0]
        assert list(ROOT.glob(f"{file}*")), f"{file} has moved"


_SHOWN = re.compile(r"hhdeploy ((?:adapter |cache )?[a-z]+)([^`#\n]*)")


def test_the_documents_show_no_flag_that_its_command_lacks():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
    found, seen = [], 0
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, rest in _SHOWN.findall(text):
            name = name if name in COMMANDS else name.split()[0]
            for flag in _FLAG.findall(rest):
                seen += 1
                if name not in COMMANDS or flag not in flags_of(name):
                    found.append(f"{page.relative_to(ROOT)}: hhdeploy {name} {flag}")
    assert not found, "\n".join(found)
    assert seen > 20
