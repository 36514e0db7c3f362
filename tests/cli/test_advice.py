"""What messages advise can be done: in Python as they say it, and on the command line.

The library's messages name Python's parameters, in backticks; commands show flags in their place.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import click
import pytest

import hhdeploy
from hhdeploy import building, quantising
from hhdeploy.adapters import importers
from hhdeploy.bundle import Bundle
from hhdeploy.choices import QUANTISED, TYPED
from hhdeploy.cli import main
from hhdeploy.cli.wording import COMMANDS as FUNCTIONS
from hhdeploy.cli.wording import as_command_line
from hhdeploy.errors import MARK, BundleError, HhdeployError, OptionError, as_code, marked_code
from hhdeploy.exporting.beforehand import check_precisions
from hhdeploy.repositories import ovms, triton
from hhdeploy.runtime import session
from hhdeploy.runtime.serving import server, settings
from hhdeploy.training import recipe
from tests.workshop import ROOT


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
    advice = as_command_line(str(caught.value)).partition("Add it with: ")[2]
    given = parsed(shlex.split(advice)).params
    assert (given["bundle"], given["precision"]) == (small, precision)


@pytest.mark.parametrize("precision", TYPED)
def test_a_missing_typed_graph_comes_from_export(small, precision):
    with pytest.raises(BundleError, match=f"no {precision} graph") as caught:
        Bundle.open(small).graph(precision)
    assert caught.value.parameters == ("precisions",)
    assert f"--precision {precision}." in as_command_line(str(caught.value))
    check_precisions([precision])


# --- every flag in every message ----------------------------------------------------------------

# Who prints the messages of a file (or of one function of it), where these do not name the command
# themselves; all of them must have the flag. The longest name that fits counts.
ANY = "any"  # what several commands share, each with options of its own
OWNERS: dict[str, tuple[str, ...]] = {
    "hhdeploy/bundle/hub.py": ("push",),
    "hhdeploy/bundle/signing.py": ("sign",),
    "calibration/": ("calibrate",),
    "exporters/engine": ("build",),
    "exporters/portable/": ("export",),
    "exporters/trace.py": ("export",),
    "exporters/triton.py": ("triton",),
    "exporters/triton.py::check_model_name": ("ovms", "triton"),
    "hhdeploy/choices.py": (
        "build",
        "calibrate",
        "export",
        "ovms",
        "predict",
        "serve",
        "triton",
        "verify",
    ),
    "hhdeploy/choices.py::seconds": ("build", "calibrate", "export", "verify"),
    "hhdeploy/choices.py::whole": ("calibrate", "export", "verify"),
    "hhdeploy/exporting/": ("export",),
    "hhdeploy/exporting/javascript.py": ("web",),
    "hhdeploy/exporting/web.py": ("web",),
    "hhdeploy/verifying/bundles.py::verify_against_torch": ("verify",),
    "hhdeploy/backbones/": ("export", "verify", "train", "adapter import"),
    "hhdeploy/building.py": ("build",),
    "hhdeploy/files/caches.py": (ANY,),
    "hhdeploy/files/writing.py::as_path": ("export", "verify", "train"),
    "hhdeploy/files/writing.py::default_cache": (ANY,),
    "hhdeploy/quantising.py": ("calibrate",),
    "hhdeploy/cli/__init__.py": (ANY,),
    "hhdeploy/cli/adapter.py::inspect": ("adapter inspect",),
    "hhdeploy/cli/adapter_import.py": ("adapter import",),
    "hhdeploy/cli/adapter_mix.py": ("adapter merge",),
    "hhdeploy/cli/adapter.py::unpack": ("adapter unpack",),
    "hhdeploy/cli/bench_serve.py": ("bench",),
    "hhdeploy/cli/cache.py": ("cache list", "cache clear"),
    "hhdeploy/cli/naming.py": (ANY,),
    "hhdeploy/cli/ui.py": (ANY,),
    "hhdeploy/cli/parity_table.py": ("export", "verify"),
    "hhdeploy/cli/wording.py": (ANY,),
    "hhdeploy/cli/starter.py": ("demo",),
    "hhdeploy/files/folders.py": (ANY,),
    "hhdeploy/files/folders.py::_check_classes": ("train",),  # who has values there
    "hhdeploy/files/directories.py": (
        "export",
        "ovms",
        "train",
        "triton",
        "web",
        "adapter import",
    ),
    "hhdeploy/adapters/importers/": ("adapter import",),
    "hhdeploy/adapters/origin.py::check_reading": ("adapter import",),
    "hhdeploy/adapters/labels.py::_kind": ("train",),  # calibrate knows the kind
    "hhdeploy/adapters/labels.py::_check_": ("train",),
    "hhdeploy/adapters/mixing.py::_value": ("adapter merge",),
    "hhdeploy/adapters/mixing.py::_head_of": ("adapter merge",),
    "hhdeploy/plan.py": ("export",),
    "hhdeploy/verifying/": ("export", "verify"),
    "hhdeploy/adapters/checks.py::model_args_of": ("export", "adapter merge"),
    "hhdeploy/adapters/checks.py::no_place": ("export", "adapter import"),
    "hhdeploy/adapters/bases.py::check_base": (
        "export",
        "adapter add",
        "adapter import",
        "serve",
    ),
    "hhdeploy/bundle/locking.py": (
        "adapter add",
        "adapter remove",
        "build",
        "calibrate",
        "export",
        "verify",
    ),
    "hhdeploy/training/": ("train",),
    "hhdeploy/repositories/graphs.py": ("ovms", "triton"),
    "hhdeploy/repositories/ovms.py": ("ovms",),
    "hhdeploy/repositories/triton.py": ("triton",),
    "hhdeploy/bundle/engines.py": (ANY,),
    "runtime/": (ANY,),
    "runtime/serving/": ("serve",),
}
# Where a word is a parameter's and means something else: a key of a file, a column.
OTHER_MEANING = {
    ("calibration/data.py", "source"),  # a placeholder's
    ("exporters/portable/triton_ensemble.py", "model_name"),
    ("hhdeploy/adapters/config.py", "class_names"),
    ("hhdeploy/files/bundle_checks.py", "adapters"),
    ("hhdeploy/files/bundle_checks.py", "class_names"),
    ("hhdeploy/files/bundle_checks.py", "input_size"),
    ("hhdeploy/adapters/format.py", "class_names"),
    ("hhdeploy/adapters/made.py", "class_names"),
    ("hhdeploy/adapters/checks.py", "input_size"),
    ("hhdeploy/adapters/config.py", "input_size"),
    ("hhdeploy/adapters/config.py", "problem_type"),
    ("hhdeploy/bundle/manifest.py", "problem_type"),
    ("hhdeploy/bundle/membership.py", "input_size"),
    ("hhdeploy/preprocess.py", "input_size"),
    ("hhdeploy/preprocess.py", "preprocess"),
    ("hhdeploy/training/recipe.py", "input_size"),
}
# No messages: a style sheet, whose variables look like flags; the marks themselves; a document.
NO_MESSAGES = ("calibration/report/style.py", "hhdeploy/errors.py", "hhdeploy/bundle/card.py")

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
    """(file::function, text) of every string that is no docstring, and of every `as_code`."""
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
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_asked":
            return  # the help of an option of the command line
        if is_marked(node):
            found.append((f"{name}::{function}", marked_call(node)))
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((f"{name}::{function}", node.value))
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(tree, "")
    return found


def shown(part: ast.AST) -> str:
    """A part of an f-string: text, the texts that a placeholder may become, or {}."""
    if isinstance(part, ast.FormattedValue) and is_marked(part.value):
        return marked_call(part.value)
    texts = [n.value for n in ast.walk(part) if isinstance(n, ast.Constant)]
    return "".join(t for t in texts if isinstance(t, str)) or "{}"


def is_marked(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "as_code"


def marked_call(node: ast.Call) -> str:
    """What `as_code` makes, with {} for each value that is not known here."""
    function, *values = node.args
    assert isinstance(function, ast.Constant), ast.unparse(node)
    words = [value_shown(v) for v in values]
    words += [f"{k.arg}={value_shown(k.value)}" for k in node.keywords]
    return f"`{function.value}({', '.join(words)})`"


def value_shown(node: ast.expr) -> str:
    if is_marked(node):
        return marked_call(node).strip("`")
    return ast.unparse(node) if isinstance(node, ast.Constant) else "{}"


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


def parameters_of_python() -> set[str]:
    """What can be passed to a public function, or to the options that one takes."""
    options = (
        hhdeploy.Reserve,
        building.BuildOptions,
        quantising.CalibrationOptions,
        quantising.CalibrationSettings,
        importers.ImportOptions,
        recipe.TrainSettings,
        settings.ServeSettings,
        server.serve,
        triton.TritonOptions,
        ovms.OvmsOptions,
        session.Session.run,
    )
    # An adapter's configuration is what its file holds, by the same names; Literals take nothing.
    others = {"errors", "HhdeployError", "Adapter", "AdapterConfig", "Device", "Precision"}
    public = [getattr(hhdeploy, name) for name in hhdeploy.__all__ if name not in others]
    found: set[str] = set()
    for taken in (*public, *options):
        found |= set(inspect.signature(taken).parameters)
    return found


PARAMETERS = parameters_of_python()


def problems(where: str, text: str) -> list[str]:
    """What is wrong with a message, for each command that may print it."""
    text = text.replace("`{}`", ONE_OF_MANY.get(where, "`{}`"))
    unknown = [f"{where}: `{mark}` is no Python of ours" for mark in MARK.findall(text)
               if (code := marked_code(mark)) is None or not known(code)]  # fmt: skip
    found = []
    for owner in owners_of(where) or ("",):
        said = as_command_line(text, COMMANDS.get(owner))
        if "`{}`" in said or set(HhdeployError(said).parameters) - PYTHON_ONLY:
            found.append(f"{where}: no flag for what is marked: {said!r}")
        owners = (owner,) if owner else ()
        found += [p for advice in advice_in(where, said) if (p := wrong(advice, owners))]
    return [*unknown, *found]


def known(code: ast.Call) -> bool:
    """All of a mark is a call, or a parameter, of the public Python."""
    functions = {ast.unparse(n.func) for n in ast.walk(code) if isinstance(n, ast.Call)} - {"_"}
    names = set(HhdeployError(f"`{ast.unparse(code)[2:-1]}`").parameters)
    names |= {n.arg for n in ast.walk(code) if isinstance(n, ast.keyword) and n.arg} - OPTIONS
    return functions <= FUNCTIONS.keys() | CONSTRUCTORS and names <= PARAMETERS


# Messages about any parameter of a kind, and one of that kind.
ONE_OF_MANY = {
    "hhdeploy/bundle/hub.py::_place": "`destination`",
    "hhdeploy/bundle/signing.py::_reading": "`key`",
    "hhdeploy/choices.py::_unlike": "`precision`",
    "hhdeploy/choices.py::one_of": "`precision='float8'`",
    "hhdeploy/choices.py::seconds": "`lock_timeout`",
    "hhdeploy/choices.py::whole": "`seed`",
    "hhdeploy/files/writing.py::as_path": "`checkpoint`",
    "runtime/serving/listening.py::listen": "`http_port`",
    "runtime/serving/ray/settings.py::read_settings": "`slots`",
    "runtime/serving/settings.py::_check_range": "`max_batch`",
}
# Parameters that no command has.
PYTHON_ONLY = {"backbone", "cuda_graphs", "hint", "smooth_quant"}
# What holds options, and the parameters that take it.
CONSTRUCTORS = {"BuildOptions", "CalibrationSettings", "Reserve"}
OPTIONS = {"options", "reserve", "settings"}


def library() -> list[tuple[str, str]]:
    """(file::function, text) of everything outside the command line."""
    return [
        found
        for path in sources()
        if path.relative_to(ROOT).as_posix() not in NO_MESSAGES
        and "hhdeploy/cli/" not in path.as_posix()
        for found in texts_in(path)
    ]


def test_no_message_advises_what_python_or_its_command_lacks():
    found = [p for where, text in library() for p in problems(where, text)]
    assert not found, "\n".join(found)


def test_no_command_advises_a_flag_that_its_command_lacks():
    texts = [found for path in (ROOT / "hhdeploy/cli").glob("*.py") for found in texts_in(path)]
    found = [
        problem
        for where, text in texts
        for advice in advice_in(where, text)
        if (problem := wrong(advice, owners_of(where)))
    ]
    assert not found, "\n".join(found)
    assert not [where for where, text in texts if where.endswith("::") and "`" in text]


def test_the_library_names_no_flag_and_no_command():
    found = [
        f"{where}: {text!r}"
        for where, text in library()
        if (_FLAG.search(text) or names_a_command(text))
    ]
    assert not found, "\n".join(found)


def test_the_library_marks_every_parameter():
    """Unmarked, a command would show Python's word where it has a flag."""
    found = [
        f"{where}: {word} in {text!r}"
        for where, text in library()
        if " " in text
        for word in re.findall(
            r"[a-z]+(?:_[a-z]+)+|\b[a-z]+(?==[\w{'])|^[a-z]+(?=(?:\[{}\])?: expected)",
            MARK.sub("", text),
        )
        if word in PARAMETERS and (where.partition("::")[0], word) not in OTHER_MEANING
    ]
    assert not found, "\n".join(found)


def names_a_command(text: str) -> bool:
    """But those for a shell alone: no function does what they do."""
    found = {name.split()[0] for name in _COMMAND.findall(text)}
    return bool(found & COMMANDS.keys() - {"bench", "demo", "doctor"})


def test_the_check_sees_what_is_wrong():
    """The messages that it found when it was written."""
    planted = [
        ("runtime/serving/x.py::f", "--watch: there is nothing to watch."),
        ("hhdeploy/x.py::f", "Add it with: hhdeploy predict OUT --against-torch"),
        ("hhdeploy/x.py::f", "Export the bundle again with --max-slots 9."),
        ("hhdeploy/backbone.py::f", "Check --model and --model-args."),
        ("hhdeploy/adapters/bases.py::check_base", "Pass the checkpoint with --checkpoint."),
        ("exporters/engine.py::f", "--min-{}: expected 1 or more."),
        ("hhdeploy/nobody.py::f", "Use --overwrite."),
    ]
    for where, text in planted:
        assert problems(where, text), text
    marked = [
        ("hhdeploy/plan.py::f", "`max_slots`: there are none."),
        ("hhdeploy/plan.py::f", "`max_ranks=4`: there is no such parameter."),
        ("hhdeploy/plan.py::f", "Build it with `bild('x')`."),
        ("hhdeploy/plan.py::f", "`no code at all`"),
        ("hhdeploy/bundle/x.py::f", "Add it: `build('x', options=BuildOptions(max_rank=2))`"),
    ]
    for where, text in marked:
        assert problems(where, text), text
    assert not problems("hhdeploy/plan.py::f", "Export with `max_rank={}` and `overwrite=True`.")
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


def test_the_javascript_package_advises_what_there_is():
    """Its flags are of `export`, where it names no other command."""
    found, seen = [], 0
    for path in sorted((ROOT / "js" / "src").glob("*.ts")):
        text = re.sub(r"""["`] \+\n\s*["`]""", "", path.read_text(encoding="utf-8"))
        for name in _COMMAND.findall(text):
            seen += 1
            if name not in COMMANDS and name.split()[0] not in COMMANDS:
                found.append(f"{path.name}: there is no hhdeploy {name}")
        for advice in advice_in(path.name, text):
            seen += 1
            found += [problem] if (problem := wrong(advice, ("export",))) else []
    assert not found, "\n".join(found)
    assert seen > 8


# --- the translation itself ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("`max_rank`: expected 0 or more", "--max-rank: expected 0 or more"),
        ("Export with `max_rank=4`.", "Export with --max-rank 4."),
        ("`verify=False`, `cache=None`, `gpu=False`", "--no-verify, --no-cache, --cpu"),
        ("`precisions=['float16', 'bfloat16']`", "--precision float16 --precision bfloat16"),
        ("`model_args={'img_size': 384}`", """--model-args '{"img_size": 384}'"""),
        ("lower `batch[2]`", "lower --max-batch"),
        (
            as_code("build", Path("a b"), backend="tensorrt"),
            "hhdeploy build 'a b' --backend tensorrt",
        ),
        ("`build('b', options=BuildOptions(max_slots=3))`", "hhdeploy build b --max-slots 3"),
        ("`add_adapter('b', 'NAME', 'DIR')`", "hhdeploy adapter add b NAME=DIR"),
        (
            "a library's own `words`, `x = y`, `size=3`",
            "a library's own `words`, `x = y`, `size=3`",
        ),
    ],
)
def test_python_becomes_the_command_line(message, said):
    assert as_command_line(message) == said


def test_a_path_cannot_end_a_mark():
    assert MARK.findall(as_code("build", Path("a`b"))) == [r"build('a\x60b')"]
    assert as_command_line(as_code("build", Path("a`b"))) == "hhdeploy build 'a`b'"


def test_an_error_knows_the_parameters_that_its_message_names():
    error = OptionError("`max_rank` and `max_classes=3`: `max_rank` is no `number of pixels`.")
    assert (error.parameter, error.parameters) == ("max_rank", ("max_rank", "max_classes"))
    assert HhdeployError("the disk is full").parameter is None
