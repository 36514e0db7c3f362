"""``key_map``: what the keys of somebody's own file mean, said once in JSON.

    {"row_vectors": true,
     "rules": [{"key": "enc[.]([0-9]+)[.]out[.]left", "to": "blocks.\\1.attn.proj.u"},
               {"key": "enc[.]([0-9]+)[.]out[.]down", "to": "blocks.\\1.attn.proj.lora_A"},
               {"key": "optimizer[.].*", "drop": true}]}

Every key of the file has to match one rule whole, the first one counts; ``"transpose": true`` turns
a tensor. With ``row_vectors`` the file's matrices act on rows, x (H_u D H_v + A B), as the paper
writes them: u is the vector of the first factor, lora_A is (in, r) and lora_B (r, out).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hhdeploy.adapters.importers.template import Tensors
from hhdeploy.errors import AdapterError
from hhdeploy.files.bundle_json import json_problem
from hhdeploy.files.plain import read_few

_MOST_BYTES = 1 << 24
_RULE_KEYS = {"key", "to", "transpose", "drop"}
# With row vectors: the name in the file's convention -> here, and whether it is transposed.
_AS_ROWS = {
    "u": ("v", False),
    "v": ("u", False),
    "d": ("d", False),
    "lora_A": ("lora_A", True),
    "lora_B": ("lora_B", True),
}


@dataclass(frozen=True)
class _Rule:
    key: re.Pattern[str]
    to: str | None
    transpose: bool


def mapped(tensors: Tensors, file: Path, source: Path) -> Tensors:
    """The tensors of ``source`` under the keys that the map in ``file`` gives them.

    Raises:
        AdapterError: a map that cannot be read, a key without a rule, two keys with one meaning.
    """
    rules, rows = _read(file)
    found: Tensors = {}
    for key, tensor in tensors.items():
        match, rule = _match(key, rules, file, source)
        if rule.to is None:
            continue
        try:
            name = match.expand(rule.to)
        except (re.error, IndexError) as error:
            raise AdapterError(f"{file}: {rule.to!r} does not fit its key: {error}.") from error
        transpose = rule.transpose
        owner, _, leaf = name.rpartition(".")
        if rows and leaf in _AS_ROWS:
            leaf, turned = _AS_ROWS[leaf]
            name, transpose = f"{owner}.{leaf}", transpose != turned
        if name in found:
            raise AdapterError(f"{file}: {key} and another key of {source.name} both mean {name}.")
        found[name] = np.ascontiguousarray(tensor.T) if transpose else tensor
    return found


def _match(key: str, rules: list[_Rule], file: Path, source: Path) -> tuple[re.Match[str], _Rule]:
    for rule in rules:
        match = rule.key.fullmatch(key)
        if match is not None:
            return match, rule
    raise AdapterError(
        f"{source}: {key}: no rule of {file} matches it. Expected one for every key; "
        '"drop": true passes over what is not the adapter\'s.'
    )


def _read(file: Path) -> tuple[list[_Rule], bool]:
    try:
        # Written by hand: editors of Windows put a mark before it.
        content = json.loads(read_few(file, _MOST_BYTES).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read: {json_problem(error)}") from error
    if not isinstance(content, dict) or set(content) - {"rules", "row_vectors"}:
        raise AdapterError(f"{file}: expected an object with rules and, if need be, row_vectors.")
    rules, rows = content.get("rules"), content.get("row_vectors", False)
    if not isinstance(rules, list) or not rules or not isinstance(rows, bool):
        raise AdapterError(f"{file}: expected a list of rules, and row_vectors true or false.")
    return [_rule(rule, file) for rule in rules], rows


def _rule(content: Any, file: Path) -> _Rule:
    if not isinstance(content, Mapping) or set(content) - _RULE_KEYS or "key" not in content:
        raise AdapterError(
            f"{file}: expected rules with key, and to (perhaps transpose) or drop, found {content}."
        )
    drop = content.get("drop") is True
    to = content.get("to")
    if drop == isinstance(to, str):
        raise AdapterError(f"{file}: expected either to or drop in {dict(content)}.")
    try:
        return _Rule(re.compile(content["key"]), to, content.get("transpose") is True)
    except (re.error, TypeError) as error:
        raise AdapterError(f"{file}: {content['key']!r} is no expression: {error}.") from error
