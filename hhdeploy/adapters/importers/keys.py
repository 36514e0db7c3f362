"""What tensor files call things: keys without the wrappers of a training, and the backbone's names.

A model that was compiled, distributed or checkpointed when it was saved has that in its keys; one
that was a member of the user's own module has the member's name before them all. Pure functions
of names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hhdeploy.errors import AdapterError

PEFT_ROOT = "base_model."
PEFT_MODEL = "base_model.model."
# Components that torch.compile, FSDP and activation checkpointing put anywhere into a path.
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What DistributedDataParallel puts first; further inside it would be a module of the user's.
_FIRST = "module"


def bare(key: str) -> str:
    """A key without the components of wrappers, before and after PEFT's own prefix."""
    parts = [part for part in key.split(".") if part not in _ANYWHERE]
    while len(parts) > 1 and parts[0] == _FIRST:
        parts = parts[1:]
    name = ".".join(parts)
    if name.startswith(f"{PEFT_MODEL}{_FIRST}."):
        return PEFT_MODEL + bare(name.removeprefix(PEFT_MODEL))
    return name


def bare_keys(
    tensors: Mapping[str, NDArray[Any]], prefix: str, file: Path
) -> dict[str, NDArray[Any]]:
    """Tensors by `bare` key, ``prefix`` cut where it comes first of all.

    Raises:
        AdapterError: two keys that differ by a wrapper alone.
    """
    found: dict[str, NDArray[Any]] = {}
    for key, tensor in tensors.items():
        name = bare(key.removeprefix(prefix))
        if name in found:
            raise AdapterError(
                f"{file}: {key}: expected one tensor for {name}, found two that differ by a "
                "wrapper's prefix. Save the model's tensors once."
            )
        found[name] = tensor
    return found


def owner_of(name: str, modules: Collection[str]) -> str | None:
    """The longest module path that a tensor's name starts with; None without one."""
    path = name
    while "." in path:
        path = path.rpartition(".")[0]
        if path in modules:
            return path
    return None


def outer_prefix(names: Collection[str], modules: Collection[str]) -> str | None:
    """What is before every name so that the rest belongs to a module; "" if nothing is.

    None if there is no such prefix: the names are not those of ``modules``.
    """
    first = next(iter(names), "")
    parts = first.split(".")
    for count in range(len(parts) - 1):
        prefix = "".join(f"{part}." for part in parts[:count])
        if all(
            name.startswith(prefix) and owner_of(name.removeprefix(prefix), modules) is not None
            for name in names
        ):
            return prefix
    return None


def numbers_in(path: str) -> tuple[int, ...]:
    """The numbered components of a path: which block of which stage."""
    return tuple(int(part) for part in path.split(".") if part.isdigit())


def numbers_open(path: str) -> str:
    """The path with its numbers left open: the same for all blocks of a stack."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
