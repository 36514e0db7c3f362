"""hhdeploy.json as JSON: how it is found and parsed, and the keys and names of files that it has.

What it may say is for `hhdeploy.files.bundle_checks`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from hhdeploy.errors import BundleError, HhdeployError
from hhdeploy.files.plain import can_be_named, read_plain

MANIFEST = "hhdeploy.json"
# 2 has rows with s_in, s_out or db, or no logits; written only for a bundle that has them.
SCHEMA_VERSION = 2
# Of all other files of a bundle; no manifest names it.
SIGNATURE = "model.sig"
# What requests call the bare model, and no adapter.
BACKBONE = "backbone"
# Of an adapter's directory, of this format or of PEFT, which is given for a bundle at times.
CONFIG_FILE = "adapter_config.json"
# A file that a change put there has eight digits of its content before its suffix.
_DIGITS = re.compile(r"\.[0-9a-f]{8}(?=\.(safetensors|json|onnx|onnx\.data|engine)$)")
_SUFFIX = re.compile(r"(?=\.(safetensors|json|onnx|onnx\.data|engine)$)")
# Levels of JSON. Parsers end at others each, in an error or in a crash.
_DEEPEST = 100
# Of what is written again key by key; what else is there is kept.
_KEYS = {
    "manifest": {
        "schema_version",
        "kind",
        "backbone",
        "classes",
        "adapters",
        "row",
        "tensors",
        "bank_as_constant",
        "graphs",
        "engines",
        "files",
        "versions",
    },
    "adapter": {
        "name",
        "row",
        "classes",
        "class_names",
        "preprocess",
        "preprocess_graph",
        "verified",
        "license",
        "problem_type",
        "strength",
        "compressed",
    },
    "row": {"size", "classes", "dim", "backbone_head", "branches", "parts"},
    "branch": {"linear", "form", "sites", "out", "in", "rank", "parts"},
    "tensors": {"images", "adapter_ids", "adapter_bank", "logits", "features", "tokens"},
}


def plain_name(name: str) -> str:
    """The name that a file has in a fresh export: its role in the bundle."""
    return _DIGITS.sub("", name)


def name_with_digits(name: str, digest: str) -> str:
    """``bank.safetensors`` as ``bank.3fa9c1d2.safetensors``."""
    return _SUFFIX.sub(f".{digest[:8]}", name, count=1)


def unknown_keys(
    content: Mapping[str, Any],
    of: Literal["manifest", "adapter", "row", "branch", "tensors"] = "manifest",
) -> dict[str, Any]:
    """What of a manifest, or of an object in it, this version does not know: its owner's, or a
    later version's."""
    return {key: value for key, value in content.items() if key not in _KEYS[of]}


class DuplicateError(ValueError):
    """An object of JSON has a key twice."""


def without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``object_pairs_hook``. Raises DuplicateError: a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise DuplicateError(f"{twice!r} is there twice")
    return found


def _no_constant(word: str) -> NoReturn:
    """Of NaN and Infinity, which Python alone reads."""
    raise ValueError(f"{word} is no number of JSON, which other readers refuse: write null")


def _number(text: str) -> float | int:
    """A number that every reader has: of one beyond, Python makes infinity, or a large integer."""
    number = int(text) if text.lstrip("-").isdecimal() else float(text)
    if not abs(number) <= sys.float_info.max:
        raise ValueError(f"a number of {len(text)} signs is beyond the range that readers have")
    return number


def _within(values: Iterable[Any]) -> list[Any]:
    """Of JSON's values the lists, and what objects hold."""
    plain = (value.values() if isinstance(value, dict) else value for value in values)
    return [value for value in plain if not isinstance(value, str | float | int | None)]


def check_levels(content: Any) -> None:
    """Raise `ValueError` for JSON that is nested deeper than every reader takes it."""
    level = _within([content])
    for _ in range(_DEEPEST):
        level = _within(value for each in level for value in each)
    if level:
        raise ValueError(f"more than {_DEEPEST} levels of lists and objects")


def _parsed(text: str) -> Any:
    content = json.loads(
        text,
        object_pairs_hook=without_duplicates,
        parse_constant=_no_constant,
        parse_float=_number,
        parse_int=_number,
    )
    check_levels(content)
    json.dumps(content, ensure_ascii=False).encode()  # half of a character is no text
    return content


def as_read(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's content as a reader finds it once it is written.

    Raises:
        BundleError: it holds what no reader takes, NaN or Infinity.
    """
    try:
        found: dict[str, Any] = _parsed(json.dumps(content))
    except ValueError as error:
        raise BundleError(f"{MANIFEST} cannot be written: {error}. Nothing was changed.") from error
    return found


def json_problem(error: Exception) -> str:
    """What is wrong with JSON, by the error of what reads it. Of a number of thousands of digits
    Python's own gives advice to its programmers."""
    text = str(error)
    return "a number has thousands of digits" if "sys.set_int_max_str_digits" in text else text


def bundle_path(given: object) -> Path:
    """Where a user says that a bundle is. Raises `BundleError` for what is no path, or empty."""
    if not isinstance(given, str | os.PathLike) or given == "" or not can_be_named(str(given)):
        raise BundleError(f"expected the path of a bundle, found {given!r}.")
    return Path(given)


def read_bundle_json(path: Path) -> dict[str, Any]:
    """A bundle's hhdeploy.json, as it is: see `check_bundle_json`.

    Raises:
        BundleError: it is missing, cannot be read, or is of a newer version.
    """
    file = path / MANIFEST
    try:
        text = read_plain(file).decode()
        content = _parsed(text)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(_no_bundle(path)) from None
    except OSError as error:
        raise BundleError(
            f"{file} cannot be read: {error.strerror}. Give it its permissions, or copy or export "
            "the bundle again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{file} cannot be read: {json_problem(error)}. Export the bundle again."
        ) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or not 0 < version <= SCHEMA_VERSION:
        least = type(version) is int and version < 1
        known = "1 or more" if least else f"at most {SCHEMA_VERSION}"
        raise BundleError(
            f"{file}: schema_version: expected {known}, found {version!r}. "
            "Upgrade with pip install -U hhdeploy, or export the bundle again."
        )
    assert isinstance(content, dict)
    return content


def _no_bundle(path: Path) -> str:
    """Why there is no manifest where a bundle was expected, and what is there instead."""
    if path.is_file():
        found = f"{path} is a file, and a bundle is a directory with {MANIFEST} in it."
        around = next((p for p in path.parents if (p / MANIFEST).is_file()), None)
        return found + (f" Name that: {around}" if around else " Make one with `export()`.")
    missing = f"{path} is not a bundle: {MANIFEST} was expected in it."
    if not path.exists():
        return f"{missing} Nothing of this name is there: make one with `export()`."
    if inside := sorted(str(found.parent) for found in path.glob(f"*/{MANIFEST}"))[:3]:
        return f"{missing} Name one of those that it holds: {', '.join(inside)}"
    if (path / CONFIG_FILE).is_file():
        return f"{missing} It is an adapter's directory: export a bundle with it, by `export()`."
    return f"{missing} Make one with `export()`."


def object_in(
    path: Path,
    error: type[HhdeployError],
    pairs: Callable[[Sequence[tuple[str, Any]]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """What a JSON file beside a model or in an adapter holds.

    Args:
        path: the file.
        error: to raise.
        pairs: makes an object of its members: `without_duplicates`, say.

    Raises:
        FileNotFoundError: there is none.
        error: it cannot be read, is no JSON, or no object.
    """
    try:
        found = json.loads(read_plain(path).decode(), object_pairs_hook=pairs)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}.") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not valid JSON: {json_problem(problem)}") from problem
    if not isinstance(found, dict):
        raise error(f"{path}: expected a JSON object, found {type(found).__name__}.")
    return found


def json_object(content: bytes, file: Path) -> dict[str, Any]:
    """What another JSON file of a bundle holds. Raises `BundleError` where that is no object."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{file} is not valid JSON: {json_problem(error)}. Export the bundle again."
        ) from error
    if not isinstance(found, dict):
        raise BundleError(
            f"{file}: expected a JSON object, found {type(found).__name__}. Export the bundle "
            "again."
        )
    return found
