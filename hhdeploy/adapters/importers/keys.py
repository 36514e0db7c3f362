"""What tensor files call things: keys without the wrappers of a training, and the backbone's names.

A model that was compiled, distributed or checkpointed when it was saved has that in its keys; one
that was a member of the user's own module has the member's name before them all; and PEFT's has the
names of its adapters in them. Pure functions of names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hhdeploy.errors import AdapterError
from hhdeploy.files.checkpoints import DISTRIBUTED, without_wrappers

PEFT_ROOT = "base_model."
PEFT_MODEL = "base_model.model."
# What PEFT puts an adapter's name behind: the copies of a module that was saved, and its methods'
# tensors. Those of AdaMSS, GLoRA, MonteCLoRA, OSF, PSOFT and TinyLoRA have parts of their own
# there, which nobody could tell from a name.
_METHODS = (
    r"(?:lora(?!_monteclora)|hada|lokr|ia3|hra|oft|boft|p?vera|randlora|fourierft|vblora|unilora"
    r"|c3a|hira|shira|waveft|delora|gralora|ln_tuning)_\w+|miss_block|road_(?:alpha|theta)|beft_bias"
)
_OF_ADAPTER = re.compile(
    rf"(?P<start>.+\.(?:modules_to_save(?=\.[^.]+\.)|(?:{_METHODS})(?=\.[^.]+(\.weight|\.bias)?$)))"
    r"\.(?!(?:weight|bias)$)(?P<adapter>[^.]+)(?P<rest>.*)"
)
# PEFT saves DoRA's vector as it was when it was no module.
_DORA = "lora_magnitude_vector"


def bare(key: str) -> str:
    """A key without the components of wrappers, before and after PEFT's own prefix."""
    name = without_wrappers(key)
    while name.startswith(f"{DISTRIBUTED}."):
        name = name.removeprefix(f"{DISTRIBUTED}.")
    if name.startswith(f"{PEFT_MODEL}{DISTRIBUTED}."):
        return PEFT_MODEL + bare(name.removeprefix(PEFT_MODEL))
    return name


def bare_keys(
    tensors: Mapping[str, NDArray[Any]], prefix: str, file: Path
) -> dict[str, NDArray[Any]]:
    """Tensors by `bare` key, ``prefix`` cut where it comes first of all.

    Raises:
        AdapterError: two keys that differ by a wrapper alone, or a tensor without values.
    """
    found: dict[str, NDArray[Any]] = {}
    for key, tensor in tensors.items():
        if tensor.shape == (0,):  # AdaLoRA leaves matrices of no rank
            raise AdapterError(
                f"{file}: {key}: expected values, found an empty tensor, as a save under "
                "DeepSpeed's ZeRO-3 leaves it. Save the values of all processes: "
                "save_pretrained(DIR, state_dict=accelerator.get_state_dict(MODEL)) of accelerate."
            )
        name = bare(key.removeprefix(prefix))
        if name in found:
            raise AdapterError(
                f"{file}: {key}: expected one tensor for {name}, found two that differ by a "
                "wrapper's prefix. Save the model's tensors once."
            )
        found[name] = tensor
    return found


def of_one_adapter(
    tensors: Mapping[str, NDArray[Any]], wanted: str | None, file: Path
) -> dict[str, NDArray[Any]]:
    """The tensors of one adapter of PEFT, by their keys without its name. What has no name in its
    key, as PEFT saves it, is of that adapter too.

    Args:
        tensors: by `bare` key.
        wanted: which adapter; None: the only one.
        file: for messages.

    Raises:
        AdapterError: there are several, or not this one, or a tensor is there with and without the
            name.
    """
    found = {key: _OF_ADAPTER.fullmatch(key) for key in tensors}
    names = sorted({match["adapter"] for match in found.values() if match})
    if len(names) > 1 and wanted is None:
        raise AdapterError(
            f"{file}: holds the adapters {', '.join(names)}: say which one with `adapter_name`."
        )
    if wanted is not None and wanted not in names:
        there = (
            f"the adapters {', '.join(names)}" if names else "one adapter, which it does not name"
        )
        raise AdapterError(
            f"{file}: `adapter_name`: expected an adapter of the file, found {wanted!r}. It holds "
            f"{there}: {'give one of them' if names else 'leave `adapter_name` out'}."
        )
    result: dict[str, NDArray[Any]] = {}
    for key, match in found.items():
        if match and match["adapter"] != (wanted or match["adapter"]):
            continue
        name = match["start"] + match["rest"] if match else key
        name = name.removesuffix(".weight") if name.endswith(f".{_DORA}.weight") else name
        if name in result:
            raise AdapterError(
                f"{file}: {key}: expected one tensor for {name}, found two, with and without an "
                "adapter's name. Leave out of the file what is not of the adapter."
            )
        result[name] = tensors[key]
    return result


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


def numbers_filled(pattern: str, numbers: Iterable[int]) -> str:
    """A path whose numbers were left open, with these."""
    for number in numbers:
        pattern = pattern.replace("*", str(number), 1)
    return pattern


def numbers_open(path: str) -> str:
    """The path with its numbers left open: the same for all blocks of a stack."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
