"""PEFT's adapter_config.json: how it is read, and which values its keys may have."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE, config_object
from hhdeploy.errors import AdapterError
from hhdeploy.files.weights import advice_on_directory


def _expression(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _expressions(value: object) -> bool:
    return isinstance(value, list) and all(map(_expression, value))


def _patterns(value: object) -> bool:
    return isinstance(value, dict) and all(map(_expression, value))


def _layers(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)


_NAMES = ("a list of names, or an expression", lambda v: _expressions(v) or _expression(v))
# Key -> what it has to be, in words and as a test; null is always right.
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "modules_to_save": ("a list of names", _expressions),
    "target_parameters": ("a list of names", _expressions),
    "bias": ("a word", lambda v: isinstance(v, str)),
    "license": (
        "a licence's name or a list of them",
        lambda v: isinstance(v, str) or _expressions(v),
    ),
    "rank_pattern": ("expressions with a rank each", _patterns),
    "alpha_pattern": ("expressions with an alpha each", _patterns),
    "layers_to_transform": ("numbers of layers", _layers),
}


def read_peft_config(path: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a PEFT directory. Raises `AdapterError` naming the file."""
    file = path / CONFIG_FILE
    expected = f"Expected a PEFT directory ({CONFIG_FILE} and {TENSOR_FILE})."
    content = config_object(file, f"{expected}{_adapters_below(path) or advice_on_directory(path)}")
    if "peft_type" not in content and isinstance(content.get("config"), dict):
        raise AdapterError(
            f"{file}: expected PEFT's peft_type, found an adapter of AdapterHub (the library "
            f"adapters). {_way_of(content['config'])}"
        )
    return content


_AS_BEFORE = (
    "Save right then of the model's state dict what has the names from before, and bring that "
    "checkpoint: `extract_adapter()`."
)


def _way_of(config: Mapping[str, Any]) -> str:
    """What to do with an adapter of AdapterHub: LoRA and VeRA it merges, unless they have gates,
    and IA3 but for the biases. Of DoRA it makes another model than the one that was trained (its
    version 1.3: other biases, and with alpha / r another product), and what is beside the weights
    it leaves alone; both without a word."""
    if config.get("architecture") != "lora" or config.get("use_gating"):
        return (
            "It computes beside the weights (bottlenecks, prefixes, ReFT, gates), and "
            "merge_adapter there merges none of it. Train the task with LoRA, or give the "
            "whole as a model of your own, python:MODULE:FUNCTION."
        )
    if config.get("use_dora"):
        return (
            "What merge_adapter there makes of DoRA answers otherwise than the model that was "
            "trained. Train the task with LoRA, or with DoRA in PEFT, or give the whole as a model "
            "of your own, python:MODULE:FUNCTION."
        )
    if config.get("composition_mode") == "scale":
        return (
            "Merge it there (merge_adapter), which leaves the biases as they were: multiply that "
            "of each module M with loras by M.loras[NAME].lora_B.view(-1) * "
            f"M.loras[NAME].scaling. {_AS_BEFORE}"
        )
    return f"Merge it there (merge_adapter). {_AS_BEFORE}"


def _adapters_below(path: Path) -> str:
    """PEFT saves every adapter but ``default`` in a folder of its name."""
    found = sorted(file.parent.name for file in path.glob(f"*/{CONFIG_FILE}"))
    if not found:
        return ""
    return f" {path} holds the adapters {', '.join(found)}: give one, {path / found[0]}."


def check_values(config: Mapping[str, Any], where: Path) -> None:
    """The keys that are read have values of their types, and expressions that are some; the method
    is one that changes weights.

    Raises:
        AdapterError: naming ``where``, the key, and what was expected.
    """
    for key, (expected, is_one) in _VALUES.items():
        value = config.get(key)
        if value is not None and not is_one(value):
            raise AdapterError(f"{where}: {key}: expected {expected}, found {value!r}.")
    if config.get("peft_type") == "XLORA":
        raise AdapterError(
            f"{where}: peft_type: expected a method that changes weights, found 'XLORA', which "
            "mixes several LoRAs anew for every image. Import one of them (it names their "
            "folders), or mix them with weights that stay: `merge_adapters()`."
        )
    if tokens := config.get("alora_invocation_tokens"):
        raise AdapterError(
            f"{where}: alora_invocation_tokens: expected none, found {tokens!r}: aLoRA acts from "
            "these tokens of a text on, and an image has none. Train the task with LoRA itself."
        )
