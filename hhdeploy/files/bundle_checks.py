"""What hhdeploy.json may say: the types of its values, and what of it belongs together.

It is edited by hand, merged by version control and written by other tools, and whatever is wrong in
it would be an answer that is wrong, or an error far from its cause.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hhdeploy.files.bundle_json import BACKBONE, MANIFEST, SIGNATURE, plain_name
from hhdeploy.files.plain import can_be_named

_SHA256 = re.compile("[0-9a-f]{64}")
_LARGEST = 2**31 - 1


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
    for number, engine in enumerate(_value(content, "engines", _is_list, "a list")):
        _check_engine(f"engines[{number}]", engine)
    backbone = content["backbone"]
    _value(backbone, "args", _is_object, "an object", "backbone.")
    _value(backbone, "classifier", _is_text, "a module's path", "backbone.")
    _value(backbone, "dim", _is_count, "a number", "backbone.")
    for key in ("model", "sha256", *({"signs_sha256", "buffers_sha256"} & backbone.keys())):
        _value(backbone, key, _is_text, "a text", "backbone.")
    own = _value(backbone, "classes", _is_count, "a number of classes", "backbone.")
    if "class_names" in backbone:
        _check_names("backbone", backbone, own)
    _check_licence("backbone.", backbone)
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


def _check_engine(where: str, engine: Any) -> None:
    _value({where: engine}, where, _is_object, "an object")
    for key, (fits, expected) in _OF_ENGINES.items():
        _value(engine, key, fits, expected, f"{where}.")
    if more := engine.keys() - _OF_ENGINES.keys():
        raise ValueError(f"{where}: expected keys of an engine, found {', '.join(sorted(more))}")


def _check_licence(prefix: str, owner: Mapping[str, Any]) -> None:
    if "license" in owner:
        _value(owner, "license", _is_licence, "a licence's name, a list of them, or null", prefix)


def _check_files(files: Mapping[str, Any]) -> None:
    """Every file is the bundle's, and has a digest and a role of its own: of two banks, say, that a
    merge left, readers would take one or the other."""
    roles: dict[str, str] = {}
    for name in files:
        if not _is_inside(name):
            raise ValueError(
                f"files: {name!r}: expected a path inside of the bundle: hhdeploy writes no other"
            )
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
    _value(entry, "name", _is_folder, "a name that a folder can have", prefix)
    _value(entry, "name", _is_no_backbone, "another name than the bare model's", prefix)
    _value(
        entry, "row", lambda x: x is None or (_is_count(x) and x > 0), "1 or more, or null", prefix
    )
    _value(entry, "verified", _is_bool, "true or false", prefix)
    if "strength" in entry:
        _value(entry, "strength", _is_finite, "a finite number", prefix)
    _check_licence(prefix, entry)
    if "compressed" in entry:
        _value(entry, "compressed", _is_loss, _LOSS, prefix)
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


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


_is_bool, _is_list, _is_object, _is_text = map(_is_a, (bool, list, dict, str))


def _is_no_backbone(value: Any) -> bool:
    return bool(value != BACKBONE)


def _is_inside(name: str) -> bool:
    """A file of a bundle: changes move and remove what a manifest names."""
    outside = "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/"))
    own = name.startswith(".") or name in (MANIFEST, SIGNATURE)
    return can_be_named(name) and not outside and not own


def _is_folder(name: str) -> bool:
    return "/" not in name and _is_inside(name)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_names(value: Any) -> bool:
    return value is None or _are_texts(value)


def _is_licence(value: Any) -> bool:
    return value is None or _is_text(value) or _are_texts(value)


def _is_loss(value: Any) -> bool:
    """What an adapter lost by its compression, or null."""
    if not isinstance(value, dict):
        return value is None
    rank, error, site = (value.get(key) for key in ("rank", "max_range_error", "worst_site"))
    return len(value) == 3 and _is_count(rank) and _is_finite(error) and _is_text(site)


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_count, value))


def _or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


_LOSS = "an object of rank, max_range_error and worst_site, or null"
_RANGE = "three numbers"
_OF_ENGINES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("file", "backend", "version", "precision"), (_is_text, "a text")),
    "architectures": (_are_texts, "a list of names"),
    "gpu": (_or_null(_is_text), "a text, or null"),
    "batch": (_is_range, _RANGE),
    "slots": (_or_null(_is_range), f"{_RANGE}, or null"),
    "bank_sha256": (_or_null(_is_digest), "64 hex digits, or null"),
    "graph_sha256": (_is_text, "a text"),
    "optimization_level": (_or_null(_is_count), "a number, or null"),
    **dict.fromkeys(("build_seconds", "bytes"), (_is_finite, "a finite number")),
}
