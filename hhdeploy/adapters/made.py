"""Configurations that were made in Python, held to what their files can say."""

from __future__ import annotations

import json
import operator
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np

from hhdeploy.adapters.config import AdapterConfig, Compression, parse_config
from hhdeploy.backbones.licences import licences_of
from hhdeploy.choices import PROBLEM_TYPES
from hhdeploy.errors import AdapterError
from hhdeploy.files.folders import alike
from hhdeploy.preprocess import Preprocess


def checked_config(config: AdapterConfig, where: str) -> AdapterConfig:
    """A configuration for a new adapter as it will be read once it is written.

    Raises:
        AdapterError: it could not be written, or not be read: see `parse_config`; or two classes
            have one name.
    """
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
    for key, kind in (("preprocess", Preprocess), ("compressed", Compression)):
        if not isinstance(getattr(config, key), kind | None):
            raise unlike(key, f"{kind.__name__}(...)")
    if not isinstance(config.base_signs, str | None):
        raise unlike("base_signs", "64 hex digits or None")
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
