"""Whether the weights that transformers read are those of the model: all of them, and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.weights import (
    AS_TRAINED,
    NO_WEIGHTS,
    advice_on_more,
    advice_on_parametrized,
    advice_on_peft,
    besides_classifier,
    derived,
    half_classifier,
    untrue_of,
)
from hhdeploy.errors import BackboneError, abbreviate

if TYPE_CHECKING:
    from torch import nn

_OTHER_CLASS = (
    " Parts of the model would stay random. It is loaded as another class of transformers with "
    "`model_args={'architectures': ['CLASS']}`: one ForImageClassification has no pooler, and a "
    "place for an adapter's classifier."
)
_OTHER_SIZES = (
    " Expected weights of the sizes that the model's config.json says. It belongs to those that "
    "lie beside it; what it says of others (num_labels, image_size and the like) can be given as "
    "`model_args`."
)


def check_unquantised(config: Any, where: str) -> None:
    """Raise `BackboneError` for a configuration that says that its weights are quantised."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return
    stated = said if isinstance(said, Mapping) else said.to_dict()
    raise BackboneError(
        f"transformers:{where}: expected weights as they were trained, found a "
        f"quantization_config, {stated.get('quant_method') or 'without a method'}. Save the model "
        "as it was before (model.dequantize(), then save_pretrained): the bundle can be quantised. "
        "If the weights are not quantised, take that entry out of config.json."
    )


def left_out(loading: Mapping[str, Any]) -> tuple[str, ...]:
    """A line about weights of the file that the model has no place for."""
    found = dict.fromkeys(key.partition(".")[0] for key in sorted(loading["unexpected_keys"]))
    if not found:
        return ()
    return (f"weights of the file that the model has no place for, left out: {', '.join(found)}",)


def check_loading(
    what: str | Path,
    loading: Mapping[str, Any],
    model: nn.Module,
    head: str,
    types: Mapping[str, str],
    *,
    whole: bool,
) -> None:
    """Nothing of the model may be missing but all of the classifier at ``head``; of a ``whole``
    model's file nothing is too much, of another nothing inside of the model's blocks: another task
    has weights beside them, and an adapter in them. Weights are floating-point numbers; ``types``
    are those of the file's other tensors, by name."""
    more = loading["unexpected_keys"]
    missing = besides_classifier(loading["missing_keys"], model.state_dict(), head)
    found = {
        "missing": missing,
        "of another shape": [
            f"{key} (expected {list(expected)}, found {list(found)})"
            for key, found, expected in loading["mismatched_keys"]
        ],
        "unexpected": list(more) if whole else _in_blocks(more, model),
        NO_WEIGHTS: untrue_of(model, types),
    }
    problems = [
        f"{title}: {abbreviate(sorted(map(str, keys)), 5)}" for title, keys in found.items() if keys
    ]
    if problems:
        if found[NO_WEIGHTS]:
            advice = AS_TRAINED
        elif found["missing"]:
            advice = _OTHER_CLASS
        else:
            advice = _OTHER_SIZES if found["of another shape"] else advice_on_more(head)
        told = advice_on_peft(more) or advice_on_parametrized(more)
        raise BackboneError(
            f"{what}: the weights do not fit the model's configuration; keys "
            f"{'; '.join(problems)}.{told or advice}"
            f"{half_classifier(missing, head)}"
        )


def _in_blocks(keys: Iterable[str], model: nn.Module) -> list[str]:
    """Those of some keys that are inside of a block that the model has; the keys may be those of
    the model as a part of another (``vit.``), or of that part of it."""
    own = [name for name, _ in model.named_modules()]
    part = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {*own, *(part + name for name in own), *(name.removeprefix(part) for name in own)}
    found = []
    for key in keys:
        parts = key.split(".")
        starts = (".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdecimal())
        if any(start in modules for start in starts) and not derived(key):
            found.append(key)
    return found
