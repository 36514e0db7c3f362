"""Random adapters of PEFT, whole and damaged: does each come in exactly, or say why not?

A draw is a model, a method, targets, ranks, patterns, biases and saved modules; then perhaps a
harmless change of its files (a wrapper's prefix, half precision, the older file) or a damage (a
tensor lost, a configuration that says something else). A damaged file that comes in and answers
as the trained model is right too; one that answers otherwise is wrong in silence.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.peft_methods import (
    BOUND,
    PROMPTS,
    Names,
    answers,
    arguments_of,
    logits_of,
    merges,
    range_error,
    timm_vit,
    trained,
    transformers_vit,
)
from hhdeploy.adapters.importers import import_adapter
from hhdeploy.backbones.spec import Backbone
from hhdeploy.errors import HhdeployError

LEAST_SHARE = 0.95
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]
# Changes a directory; returns False where there is nothing for it to change.
Change = Callable[[Path, random.Random, Names], bool]


def run(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Draw and import ``count`` adapters; prints what is wrong, returns the counts."""
    backbones = [timm_vit(), transformers_vit(folder)]
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        backbone, names = draw.choice(backbones)
        found, said = one(draw, backbone, names, folder / "adapter")
        counts[found] += 1
        if found in ("wrong in silence", "traceback", "whole: refused"):
            print(f"{number:4} {found}: {said}", flush=True)
        if found in ("wrong in silence", "traceback"):
            wrong.append(f"{number} {found}")
    whole = counts["whole: came in"] + counts["whole: refused"]
    share = counts["whole: came in"] / whole if whole else 1.0
    if share < LEAST_SHARE:
        wrong.append(f"only {share:.1%} of what PEFT merges came in")
    return {
        "draws": count,
        "seed": seed,
        **dict(sorted(counts.items())),
        "share": share,
        "wrong": wrong,
    }


def one(draw: random.Random, backbone: Backbone, names: Names, target: Path) -> tuple[str, str]:
    """What became of one draw, and what it was."""
    method, arguments = _adapter(draw, names)
    change = draw.choice([None, None, *HARMLESS, *DAMAGES])
    described = f"{method} {arguments} {change.__name__ if change else 'whole'}"
    try:
        model = trained(backbone, method, arguments, draw.randrange(1000))
        if change is half_precision:
            _round(model)
        if not merges(model):
            return "PEFT does not merge it", described
        reference = logits_of(model)
        shutil.rmtree(target, ignore_errors=True)
        model.save_pretrained(str(target))
    except Exception as error:  # noqa: BLE001  (PEFT refuses the draw)
        return "PEFT does not make it", f"{described}: {error}"
    harmful = change in DAMAGES
    if change is not None and not change(target, draw, names):
        harmful = False
    try:
        adapter = import_adapter(target, backbone)
        found = answers(backbone, adapter)
    except HhdeployError as error:
        if harmful:
            return "damaged: refused", described
        return "whole: refused", f"{described}: {str(error)[:300]}"
    except Exception as error:  # noqa: BLE001  (a traceback is what is looked for)
        return "traceback", f"{described}: {type(error).__name__}: {error}"
    error = range_error(reference, found)
    if not error <= BOUND:
        return "wrong in silence", f"{described}: off by {error:.1e} of the range"
    return ("damaged: came in, equal" if harmful else "whole: came in"), described


def _adapter(draw: random.Random, names: Names) -> tuple[str, dict[str, Any]]:
    """A method and its arguments."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = [str(getattr(k, "value", k)) for k in PEFT_TYPE_TO_CONFIG_MAPPING]
    others = [k for k in kinds if k not in PROMPTS and k != "LORA"]
    method = "LORA" if draw.random() < 0.4 else draw.choice(others)
    arguments = arguments_of(method, names)
    linears = arguments["target_modules"]
    if method != "LN_TUNING":
        arguments["target_modules"] = draw.choice(
            [
                sorted(draw.sample(linears, draw.randint(1, len(linears)))),
                linears,
                rf".*\.({'|'.join(name.replace('.', '[.]') for name in linears)})",
                [*linears, names.head] if method == "LORA" else linears,
                "all-linear" if method == "LORA" else linears,
            ]
        )
    saved = [None, [names.head], [names.head], [names.head, names.norm]]
    arguments["modules_to_save"] = draw.choice(saved)
    if method == "LORA":
        arguments |= _lora(draw, names)
    if method in ("HRA", "LOHA", "LOKR", "MISS", "DELORA"):
        arguments["r"] = draw.choice([1, 2, 4])
    if method in ("LORA", "HRA", "BOFT", "OFT", "ADALORA") and draw.random() < 0.3:
        arguments["bias"] = draw.choice(["all", f"{method.lower()}_only"])
    return method, arguments


def _lora(draw: random.Random, names: Names) -> dict[str, Any]:
    found: dict[str, Any] = {"r": draw.randint(1, 9), "lora_alpha": draw.choice([1, 3, 16])}
    for key in ("use_rslora", "use_dora", "lora_bias"):
        if draw.random() < 0.25:
            found[key] = True
    if draw.random() < 0.3:
        found["rank_pattern"] = {draw.choice(names.linears): draw.randint(1, 6)}
    if draw.random() < 0.3:
        found["alpha_pattern"] = {draw.choice(names.linears): draw.randint(1, 20)}
    if draw.random() < 0.3:
        found["init_lora_weights"] = draw.choice(["gaussian", "pissa", "olora", "orthogonal"])
    return found


def _round(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                p.copy_(p.bfloat16())


def _rewrite(target: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(
        {k: v.contiguous() for k, v in change(load_file(target / TENSORS)).items()},
        target / TENSORS,
    )


def _say(target: Path, **values: Any) -> None:
    content = json.loads((target / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps({**content, **values}))


def _said(target: Path) -> Mapping[str, Any]:
    content: dict[str, Any] = json.loads((target / CONFIG).read_text())
    return content


# -- harmless ---------------------------------------------------------------------------------


def wrapped(target: Path, draw: random.Random, names: Names) -> bool:
    prefix = draw.choice(["_orig_mod.", "module.", "module._orig_mod."])
    _rewrite(target, lambda tensors: {prefix + key: value for key, value in tensors.items()})
    return True


def half_precision(target: Path, draw: random.Random, names: Names) -> bool:
    """What was trained, which `_round` has rounded; constants of a method stay as they are."""

    def halved(value: torch.Tensor) -> torch.Tensor:
        short = value.bfloat16() if value.is_floating_point() else value
        return short if torch.equal(short.to(value.dtype), value) else value

    _rewrite(target, lambda tensors: {key: halved(value) for key, value in tensors.items()})
    return True


def older_file(target: Path, draw: random.Random, names: Names) -> bool:
    torch.save(load_file(target / TENSORS), target / "adapter_model.bin")
    (target / TENSORS).unlink()
    return True


# -- damages ----------------------------------------------------------------------------------


def lost_tensor(target: Path, draw: random.Random, names: Names) -> bool:
    lost = draw.choice(sorted(load_file(target / TENSORS)))
    _rewrite(target, lambda tensors: {k: v for k, v in tensors.items() if k != lost})
    return True


def lost_module(target: Path, draw: random.Random, names: Names) -> bool:
    key = draw.choice(sorted(load_file(target / TENSORS)))
    block = ".".join(key.split(".")[:6])
    _rewrite(target, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(block)})
    return True


def lost_head(target: Path, draw: random.Random, names: Names) -> bool:
    keys = [k for k in load_file(target / TENSORS) if f".{names.head}." in k]
    _rewrite(target, lambda tensors: {k: v for k, v in tensors.items() if k not in keys})
    return bool(keys)


def other_shape(target: Path, draw: random.Random, names: Names) -> bool:
    key = draw.choice(sorted(load_file(target / TENSORS)))
    _rewrite(target, lambda tensors: {**tensors, key: tensors[key].reshape(-1)[:-1]})
    return True


def not_finite(target: Path, draw: random.Random, names: Names) -> bool:
    tensors = load_file(target / TENSORS)
    key = draw.choice(sorted(k for k, v in tensors.items() if v.is_floating_point()))
    tensors[key].reshape(-1)[0] = draw.choice([torch.nan, torch.inf])
    _rewrite(target, lambda _: tensors)
    return True


def foreign_tensor(target: Path, draw: random.Random, names: Names) -> bool:
    name = draw.choice(["blocks.9.attn.qkv.lora_A.weight", "vit.odd", "norm.weight"])
    _rewrite(target, lambda tensors: {**tensors, f"base_model.model.{name}": torch.ones(64)})
    return True


def other_names(target: Path, draw: random.Random, names: Names) -> bool:
    _rewrite(
        target, lambda tensors: {f"base_model.model.odd{k[16:]}": v for k, v in tensors.items()}
    )
    return True


def truncated_file(target: Path, draw: random.Random, names: Names) -> bool:
    data = (target / TENSORS).read_bytes()
    (target / TENSORS).write_bytes(data[: draw.randrange(len(data))])
    return True


def truncated_config(target: Path, draw: random.Random, names: Names) -> bool:
    text = (target / CONFIG).read_text()
    (target / CONFIG).write_text(text[: draw.randrange(len(text) - 2)])
    return True


def other_rank(target: Path, draw: random.Random, names: Names) -> bool:
    if not isinstance(_said(target).get("r"), int):
        return False
    if _said(target)["peft_type"] == "UNILORA":
        return False  # its file is one vector whatever the rank: an adapter of the other as well
    _say(target, r=_said(target)["r"] + 1)
    return True


def one_target_less(target: Path, draw: random.Random, names: Names) -> bool:
    targets = _said(target).get("target_modules")
    if not isinstance(targets, list) or len(targets) < 2:
        return False
    lost = sorted(targets)[0]
    if not any(lost in key for key in load_file(target / TENSORS)):
        return False  # UniLoRA's file names no module: it is an adapter of the others as well
    _say(target, target_modules=sorted(targets)[1:])
    return True


def one_target_more(target: Path, draw: random.Random, names: Names) -> bool:
    targets = _said(target).get("target_modules")
    more = [name for name in names.linears if name not in (targets or ())]
    if not isinstance(targets, list) or not more:
        return False
    _say(target, target_modules=[*targets, more[0]])
    return True


def says_no_head(target: Path, draw: random.Random, names: Names) -> bool:
    if not _said(target).get("modules_to_save"):
        return False
    _say(target, modules_to_save=None)
    return True


def says_another_module(target: Path, draw: random.Random, names: Names) -> bool:
    _say(target, modules_to_save=[*(_said(target).get("modules_to_save") or []), "pooler"])
    return True


def other_method(target: Path, draw: random.Random, names: Names) -> bool:
    _say(target, peft_type=draw.choice(["INVENTED", None, 7, "OFT", "LOHA", "PREFIX_TUNING"]))
    return True


def odd_value(target: Path, draw: random.Random, names: Names) -> bool:
    key = draw.choice(["target_modules", "modules_to_save", "bias", "r", "rank_pattern"])
    _say(target, **{key: draw.choice([{"a": 1}, "(", -1, [7], [["x"]], {"(": 2}])})
    return True


HARMLESS: tuple[Change, ...] = (wrapped, half_precision, older_file)
DAMAGES: tuple[Change, ...] = (
    lost_tensor,
    lost_module,
    lost_head,
    other_shape,
    not_finite,
    foreign_tensor,
    other_names,
    truncated_file,
    truncated_config,
    other_rank,
    one_target_less,
    one_target_more,
    says_no_head,
    says_another_module,
    other_method,
    odd_value,
)
