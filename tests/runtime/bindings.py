"""Names and calls that source files make on compiled bindings, checked against the bindings."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass

from tests.workshop import ROOT


@dataclass(frozen=True)
class Use:
    """``owner.name``; ``arguments`` of a call, None for a plain attribute; ``stored``: assigned."""

    owner: str
    name: str
    arguments: int | None
    stored: bool = False


def source(module: str) -> str:
    return (ROOT / "runtime" / f"{module}.py").read_text()


def uses(text: str) -> set[Use]:
    """Every attribute access of a source; owners as they are written, ``self._trt`` etc."""
    tree = ast.parse(text)
    calls = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        call = calls.get(id(node))
        if call is not None and any(isinstance(a, ast.Starred) for a in call.args):
            raise AssertionError(f"cannot count the arguments of {ast.unparse(call)}")
        arguments = None if call is None else len(call.args) + len(call.keywords)
        stored = isinstance(node.ctx, ast.Store)
        found.add(Use(ast.unparse(node.value), node.attr, arguments, stored))
    return found


def arities(function) -> list[tuple[int, int]]:
    """(fewest, most) arguments of every overload, from Python's or pybind11's signature."""
    text = function.__doc__ or ""
    name = function.__name__
    signatures = re.findall(rf"^(?:\d+\. )?{name}\(self: [^,)]+(?:, )?(.*)\) ->", text, re.M)
    if signatures:
        counted = []
        for signature in signatures:
            named = re.findall(r"(?:^|, )\w+: [^,]*?(= .*?)?(?=, \w+: |$)", signature)
            counted.append((sum(not default for default in named), len(named)))
        return counted
    parameters = inspect.signature(function).parameters.values()
    required = [p for p in parameters if p.default is inspect.Parameter.empty]
    return [(len(required), len(parameters))]


def problems(found: set[Use], owners: dict[str, object]) -> list[str]:
    """What the bindings would refuse, of the uses whose owner is known."""
    wrong = []
    for use in sorted(found, key=str):
        if use.owner not in owners:
            continue
        there = inspect.getattr_static(owners[use.owner], use.name, None)
        if there is None:
            wrong.append(f"{use.owner}.{use.name} does not exist")
            continue
        if use.stored and getattr(there, "fset", None) is None:
            wrong.append(f"{use.owner}.{use.name} cannot be assigned")
        value = getattr(owners[use.owner], use.name)
        if use.arguments is None:
            continue
        if isinstance(value, type):
            value = value.__init__
        if not any(low <= use.arguments <= high for low, high in arities(value)):
            wrong.append(f"{use.owner}.{use.name} takes {arities(value)}, not {use.arguments}")
    return wrong
