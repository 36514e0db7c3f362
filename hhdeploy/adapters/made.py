"""Configurations and adapters that were made in Python, held to what their files can say."""

from __future__ import annotations

import json
import math
import operator
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from types import UnionType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hhdeploy.adapters.config import AdapterConfig, Compression, parse_config
from hhdeploy.backbones.facts import BaseAnswer
from hhdeploy.backbones.licences import licences_of
from hhdeploy.choices import PROBLEM_TYPES, as_float
from hhdeploy.errors import AdapterError
from hhdeploy.files.folders import alike
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    from hhdeploy.adapters.format import Adapter


def checked_config(config: AdapterConfig) -> AdapterConfig:
    """A configuration for a new adapter as it will be read once it is written.

    Raises:
        AdapterError: it could not be written, or not be read: see `parse_config`; or two classes
            have one name.
    """
    where = "the new adapter"
    checked = writable_config(config, where)
    # Files may have a name twice, as ImageNet's has two cranes; nobody tells their answers apart.
    if (same := alike(checked.class_names or ())) is not None:
        raise AdapterError(
            f"{where}: class_names: expected a name of its own for each class, found {same[0]!a} "
            f"and {same[1]!a}, which are one word. Name them differently."
        )
    return checked


def writable_config(config: AdapterConfig, where: str) -> AdapterConfig:
    """A configuration as it will be read once it is written.

    Raises:
        AdapterError: naming ``where`` and the attribute: it is none, an attribute is of another
            kind than its own, or see `parse_config`.
    """
    if not isinstance(config, AdapterConfig):
        raise AdapterError(
            f"{where}: config: expected AdapterConfig(...), found {type(config).__name__}."
        )
    plain = _of_plain_kinds(config, where)
    try:  # NumPy's integers are integers
        written = json.dumps(plain.to_json(), default=operator.index)
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{where}: it cannot be written as JSON: {error}.") from error
    return parse_config(json.loads(written), where)


def check_parts(adapter: Adapter, site: type, head: type, where: str) -> None:
    """Every part of an adapter is of its kind, the arrays of whatever type and shape.

    Args:
        adapter: whose.
        site: `hhdeploy.adapters.format.SiteTensors`.
        head: `hhdeploy.adapters.format.Head`.
        where: its source, for the message.

    Raises:
        AdapterError: naming the part.
    """

    def check(name: str, part: object, kind: type | UnionType, expected: str) -> None:
        if not isinstance(part, kind):
            raise AdapterError(
                f"{where}: {name}: expected {expected}, found {type(part).__name__} "
                f"{reprlib.repr(part)}."
            )

    arrays: dict[str, object] = {}
    for name, parts, kind, expected in (
        ("sites", adapter.sites, site, f"{site.__name__}(...)"),
        ("values", adapter.values, np.ndarray, "a NumPy array"),
    ):
        check(name, parts, Mapping, f"a dictionary of names, and {expected} each")
        for path, part in parts.items():
            check(f"{name}: a name", path, str, "a string")
            check(f"{name}[{path!r}]", part, kind, expected)
            if kind is site:
                arrays |= {f"{path}.{k}": v for k, v in vars(part).items() if v is not None}
    check("head", adapter.head, head | None, f"{head.__name__}(...) or None")
    if adapter.head is not None:
        check("head.path", adapter.head.path, str, "a string")
        arrays |= {"head.weight": adapter.head.weight, "head.bias": adapter.head.bias}
    for name, array in arrays.items():
        check(name, array, np.ndarray, "a NumPy array")
    if not math.isfinite(as_float(adapter.strength)):
        raise AdapterError(
            f"{where}: strength: expected a finite number, found {adapter.strength!r}."
        )


def _of_plain_kinds(config: AdapterConfig, where: str) -> AdapterConfig:
    """The same in Python's own lists and dictionaries. Raises `AdapterError`."""

    def unlike(key: str, expected: str) -> AdapterError:
        found = reprlib.repr(getattr(config, key))
        return AdapterError(f"{where}: {key}: expected {expected}, found {found}.")

    lists: dict[str, tuple[object, ...]] = {}
    for key in ("target_modules", "class_names"):
        value = getattr(config, key)
        if value is None and key == "class_names":
            continue
        try:  # neither the letters of a string nor what has no order
            refused = isinstance(value, str | bytes | set | frozenset | Mapping)
            lists[key] = tuple(() if refused else value)
        except TypeError:
            refused = True
        if refused:
            raise unlike(key, "a list of strings")
    for key in ("base_model_args", "extra"):
        if not isinstance(getattr(config, key), Mapping):
            raise unlike(key, "a dictionary")
    for key, kind in (
        ("preprocess", Preprocess),
        ("compressed", Compression),
        ("base_answer", BaseAnswer),
    ):
        if not isinstance(getattr(config, key), kind | None):
            raise unlike(key, f"{kind.__name__}(...)")
    for key in ("base_signs", "base_buffers"):
        if not isinstance(getattr(config, key), str | None):
            raise unlike(key, "64 hex digits or None")
    if not isinstance(config.problem_type, str | None):
        raise unlike("problem_type", f"one of {', '.join(PROBLEM_TYPES)}, or None")
    if not isinstance(config.fold_only, bool | np.bool_):  # "no" would be yes
        raise unlike("fold_only", "True or False")
    try:
        stated = licences_of(config.license)
    except ValueError as error:
        raise unlike("license", str(error)) from error
    plain = replace(config, license=stated, fold_only=bool(config.fold_only))
    if taken := set(plain.extra).intersection(replace(plain, extra={}).to_json()):
        raise unlike("extra", f"keys of its own, not {', '.join(sorted(taken))}")
    return replace(plain, **cast(dict[str, Any], lists))
