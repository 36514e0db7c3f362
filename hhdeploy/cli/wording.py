"""Python's words as the command line's: what a message marks as code becomes flags and commands.

The one place where they meet: messages of the library say `max_rank=4`, as
``hhdeploy.errors`` describes, and `as_command_line` makes ``--max-rank 4`` of it. A flag belongs
to the option of click that has the parameter's name; `SPOKEN` has the few that differ.
"""

from __future__ import annotations

import ast
import functools
import json
import shlex
from collections.abc import Iterator, Sequence

import click

from hhdeploy.errors import MARK, marked_code

# Python, as a message marks it -> the command line, where no option has the parameter's name.
SPOKEN = {
    "batch[0]": "--min-batch",
    "batch[2]": "--max-batch",
    "batch": "--min-batch, --opt-batch, --max-batch",
    "cache=None": "--no-cache",
    "password": "--password-file",
    "strength": "DIR@STRENGTH",
    "strengths": "--adapter NAME=DIR@STRENGTH",
    "optimization_level": "--builder-optimization-level",
}
# Public function -> its command.
COMMANDS = {
    "add_adapter": "adapter add",
    "build": "build",
    "calibrate": "calibrate",
    "export": "export",
    "extract_adapter": "adapter extract",
    "import_adapter": "adapter import",
    "merge_adapters": "adapter merge",
    "pull": "pull",
    "push": "push",
    "remove_adapter": "adapter remove",
    "sign": "sign",
    "train": "train",
    "verify": "verify",
    "verify_against_torch": "verify --against-torch",
    "write_ovms": "ovms",
    "write_triton": "triton",
    "write_web": "web",
}


def as_command_line(text: str, command: click.Command | None = None) -> str:
    """A message with flags and commands in place of the Python that it marks.

    Args:
        text: of the library. What is in backticks and no Python of ours stays as it is.
        command: whose options are meant first; then those of all commands.
    """
    if "`" not in text:
        return text
    return MARK.sub(lambda m: _spoken(m.group(1), command) or m.group(), text)


def _spoken(mark: str, command: click.Command | None) -> str | None:
    """A mark in the command line's words, None if it is none of ours."""
    code = marked_code(mark)
    if code is None:
        return None
    words = [_expression(argument, command) for argument in code.args]
    return _joined([*words, *(_assignment(k, command) for k in code.keywords)])


def _joined(words: Sequence[str | None]) -> str | None:
    """All the words, or None if one is not known."""
    known = [w for w in words if w is not None]
    return " ".join(w for w in known if w) if len(known) == len(words) else None


def _expression(node: ast.expr, command: click.Command | None) -> str | None:
    text = ast.unparse(node)
    if text in SPOKEN:
        return SPOKEN[text]
    if isinstance(node, ast.Call):
        return _command_line(node)
    return _flag(text, command)


def _command_line(call: ast.Call) -> str | None:
    name = ast.unparse(call.func)
    if name not in COMMANDS:
        return None
    words = [_value(argument) for argument in call.args]
    if name == "add_adapter":
        words = [*words[:1], "=".join(words[1:])]
    command = all_commands()[COMMANDS[name].partition(" --")[0]]
    options = [_assignment(k, command) for k in call.keywords]
    return _joined([f"hhdeploy {COMMANDS[name]}", *words, *options])


def _assignment(keyword: ast.keyword, command: click.Command | None) -> str | None:
    """``name=value`` as ``--name value``; an options object is what it holds."""
    value = keyword.value
    if isinstance(value, ast.Call):
        return _joined([_assignment(k, command) for k in value.keywords])
    text = f"{keyword.arg}={ast.unparse(value)}"
    if text in SPOKEN:
        return SPOKEN[text]
    if isinstance(value, ast.Constant) and isinstance(value.value, bool):
        return _flag(str(keyword.arg), command, on=value.value)
    flag = _flag(str(keyword.arg), command)
    if flag is None:
        return None
    values = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
    return " ".join(f"{flag} {_value(v)}" for v in values)


def _value(node: ast.expr) -> str:
    """A literal as a shell takes it; a placeholder (``DIR``) stays one."""
    if isinstance(node, ast.Dict) and node.keys:  # {} is the placeholder of a template
        return shlex.quote(json.dumps(ast.literal_eval(node)))
    if isinstance(node, ast.Constant):
        return shlex.quote(str(node.value))
    return ast.unparse(node)


def _flag(name: str, command: click.Command | None, *, on: bool = True) -> str | None:
    """The flag of a parameter; ``on=False``: the one that switches it off."""
    if name in SPOKEN:
        return SPOKEN[name]
    for candidate in (*([command] if command is not None else []), *all_commands().values()):
        for parameter in candidate.params:
            if parameter.name == name and (found := _name_of(parameter, on)) is not None:
                return found
    return None


def _name_of(parameter: click.Parameter, on: bool) -> str | None:
    if isinstance(parameter, click.Argument):
        return parameter.human_readable_name
    off = [*parameter.secondary_opts, *(o for o in parameter.opts if o[2:].startswith("no-"))]
    names = [o for o in parameter.opts if o not in off] if on else off
    return names[0] if names else None


@functools.cache
def all_commands() -> dict[str, click.Command]:
    """Every command by its words, e.g. ``adapter add``; imports their modules, nothing heavy."""
    from hhdeploy.cli import main

    return dict(_commands(main, click.Context(main), ""))


def _commands(
    group: click.Group, context: click.Context, prefix: str
) -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, context, f"{prefix}{name} ")
        yield f"{prefix}{name}", command
