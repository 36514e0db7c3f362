"""What hhdeploy.json may say: the types of its values, and what of it belongs together.

It is edited by hand, merged by version control and written by other tools, and whatever is wrong in
it would be an answer that is wrong, or an error far from its cause.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from hhdeploy.errors import BundleError
from hhdeploy.files.plain import can_be_named, read_plain

MANIFEST = "hhdeploy.json"
# Of all other files of a bundle; no manifest names it.
SIGNATURE = "model.sig"
# What requests call the bare model, and no adapter.
BACKBONE = "backbone"
# Of an adapter's directory, of this format or of PEFT, which is given for a bundle at times.
CONFIG_FILE = "adapter_config.json"
# A file that a change put there has eight digits of its content before its suffix.
_DIGITS = re.compile(r"\.[0-9a-f]{8}(?=\.(safetensors|json|onnx|onnx\.data|engine)$)")
_SUFFIX = re.compile(r"(?=\.(safetensors|json|onnx|onnx\.data|engine)$)")
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
_SHA256 = re.compile("[0-9a-f]{64}")
_LARGEST = 2**31 - 1


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


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=without_duplicates, parse_constant=_no_constant)


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


def read_bundle_json(path: Path, newest: int) -> dict[str, Any]:
    """A bundle's hhdeploy.json, as it is: see `check_bundle_json`.

    Args:
        path: the bundle.
        newest: version that is known.

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
    if type(version) is not int or not 0 < version <= newest:
        known = "1 or more" if type(version) is int and version < 1 else f"at most {newest}"
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


def check_bundle_json(content: Mapping[str, Any]) -> None:
    """Compare a manifest's content with what it can be.

    Raises:
        ValueError: naming the key, what was expected and what was found.
        KeyError: a key is not there.
    """
    classes = _value(content, "classes", _is_count, "a number of classes")
    adapters = _value(content, "adapters", _is_list, "a list")
    for number, entry in enumerate(adapters):
        _check_adapter(f"adapters[{number}]", entry, classes)
    for key in ("name", "row"):
        values = [entry[key] for entry in adapters if entry[key] is not None]
        if len(set(values)) < len(values):
            raise ValueError(f"adapters: expected every {key} once, found {values}")
    for key in ("backbone", "graphs", "files", "versions", "tensors"):
        _value(content, key, _is_object, "an object")
    _value(content, "engines", _is_list, "a list")
    backbone = content["backbone"]
    _value(backbone, "args", _is_object, "an object", "backbone.")
    _value(backbone, "classifier", _is_text, "a module's path", "backbone.")
    _value(backbone, "dim", _is_count, "a number", "backbone.")
    for key in ("model", "sha256", *({"signs_sha256", "buffers_sha256"} & backbone.keys())):
        _value(backbone, key, _is_text, "a text", "backbone.")
    own = _value(backbone, "classes", _is_count, "a number of classes", "backbone.")
    if "class_names" in backbone:
        _check_names("backbone", backbone, own)
    _value(content, "bank_as_constant", _is_bool, "true or false")
    _check_logits(content["tensors"], classes)
    _check_sizes(adapters, _size(backbone))
    _check_files(content["files"])
    for key in content["graphs"]:
        _value(content["graphs"], key, _is_text, "the name of a file", "graphs.")
        if content["graphs"][key] not in content["files"]:
            raise ValueError(f"graphs.{key}: {content['graphs'][key]} is not among the files")
    if content["row"] is not None:
        row = _value(content, "row", _is_object, "an object or null")
        for number, branch in enumerate(_value(row, "branches", _is_list, "a list", "row.")):
            _check_branch(f"row.branches[{number}]", branch)
        for key in ("classes", "dim"):
            _value(row, key, _is_count, "a number", "row.")
        _value(row, "backbone_head", _is_bool, "true or false", "row.")
    _check_classes(content, classes, own)


def _check_branch(where: str, branch: Any) -> None:
    if not isinstance(branch, dict):
        raise ValueError(f"{where}: expected an object, found {branch!r}")
    for key in ("linear", "form"):
        _value(branch, key, _is_text, "a text", f"{where}.")
    _value(branch, "sites", _are_texts, "a list of names", f"{where}.")
    for key in ("out", "in", "rank"):
        _value(branch, key, _is_count, "a number", f"{where}.")


def _check_files(files: Mapping[str, Any]) -> None:
    """Every file has a digest and a role of its own: of two banks, say, that a merge left, readers
    would take one or the other."""
    roles: dict[str, str] = {}
    for name in files:
        _value(files, name, _is_digest, "64 hex digits", "files.")
        if (other := roles.setdefault(plain_name(name), name)) != name:
            raise ValueError(f"files: expected one {plain_name(name)}, found {other} and {name}")


def _check_classes(content: Mapping[str, Any], classes: int, backbone: int) -> None:
    """The columns of the graph's logits are those of the heads that answer: of the only one in a
    folded bundle, else of the widest. The softmax over a part of them would be wrong."""
    row = content["row"]
    if not classes:
        return
    if row is None:
        for number, entry in enumerate(content["adapters"]):
            if (found := entry["classes"]) != classes:
                raise ValueError(
                    f"adapters[{number}].classes: expected the graph's {classes}, found {found}"
                )
        return
    widest = max(row["classes"], backbone if row["backbone_head"] else 0)
    if classes != widest:
        raise ValueError(
            f"classes: expected {widest}, the most of row.classes ({row['classes']}) and of the "
            f"backbone's own classifier ({backbone if row['backbone_head'] else 'none'}), found "
            f"{classes}"
        )


def _check_logits(tensors: Mapping[str, Any], classes: int) -> None:
    """The columns of the graph's logits are told twice: by the shape of what it gives, too."""
    if (logits := tensors.get("logits")) is not None and logits != ["batch", classes]:
        raise ValueError(f"classes: expected those of tensors.logits, {logits}, found {classes}")


def _check_sizes(adapters: Sequence[Mapping[str, Any]], wanted: Any) -> None:
    """All images go into one graph; what a size may be is for `Preprocess` to say."""
    for number, entry in enumerate(adapters):
        if (found := _size(entry)) != wanted:
            raise ValueError(
                f"adapters[{number}].preprocess.input_size: expected the backbone's {wanted}, "
                f"found {found}"
            )


def _size(owner: Mapping[str, Any]) -> Any:
    transform = owner.get("preprocess")
    return transform.get("input_size") if isinstance(transform, dict) else None


def _check_adapter(where: str, entry: Any, most: int) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, found {entry!r}")
    prefix = f"{where}."
    _value(entry, "name", _is_text, "a name", prefix)
    _value(entry, "name", _is_no_backbone, "another name than the bare model's", prefix)
    _value(
        entry, "row", lambda x: x is None or (_is_count(x) and x > 0), "1 or more, or null", prefix
    )
    _value(entry, "verified", _is_bool, "true or false", prefix)
    if "strength" in entry:
        _value(entry, "strength", _is_finite, "a finite number", prefix)
    classes = _value(entry, "classes", _is_count, "a number of classes", prefix)
    if 0 < most < classes:
        raise ValueError(f"{where}.classes: expected at most the graph's {most}, found {classes}")
    _check_names(where, entry, classes)


def _check_names(where: str, entry: Any, classes: int) -> None:
    names = _value(entry, "class_names", _are_names, "a list of names, or null", f"{where}.")
    if names and len(names) != classes:
        raise ValueError(f"{where}.class_names: expected {classes} names, found {len(names)}")


def _value(
    content: Mapping[str, Any],
    key: str,
    fits: Callable[[Any], bool],
    expected: str,
    prefix: str = "",
) -> Any:
    if not fits(found := content[key]):
        shown = repr(found)
        raise ValueError(f"{prefix}{key}: expected {expected}, found {shown[:80]}")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_no_backbone(value: Any) -> bool:
    return bool(value != BACKBONE)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_names(value: Any) -> bool:
    return value is None or _are_texts(value)
