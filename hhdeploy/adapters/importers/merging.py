"""Adapters of any method of PEFT, loaded and merged by PEFT itself. Needs the extra ``peft``.

What PEFT cannot merge depends on the input (prompts, X-LoRA, Lily, Shadow) and has no weights to
be folded into. PEFT's unmerged model is the judge of what it merged.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.applying import values_of
from hhdeploy.adapters.calls import module_by_module, never_called, noise, passed_by
from hhdeploy.adapters.importers.keys import PEFT_MODEL
from hhdeploy.adapters.importers.lora import check_float, initialisation
from hhdeploy.adapters.importers.template import Tensors
from hhdeploy.algebra import Array, logit_change, logit_range
from hhdeploy.backbones.spec import seeded
from hhdeploy.errors import AdapterError, abbreviate, first_line, require
from hhdeploy.parity import PEFT_MERGE_BOUND

if TYPE_CHECKING:
    from torch import nn

    from hhdeploy.backbones.spec import Backbone

# Not a question of the weights, or of a network, or a name of code to import.
_DROPPED = (
    *("auto_mapping", "base_model_name_or_path", "revision", "runtime_config", "peft_version"),
    *("inference_mode", "modules_to_save", "bias"),
)
# Initialisations that are exact when PEFT makes them again from the same weights.
_REPEATABLE = (True, False, None, "gaussian", "eva", "orthogonal", "pissa", "olora", "mica")
_IMAGES = 2
# What the configurations of these methods have since PEFT 0.14, and all since 0.18.
_SINCE_14, _SINCE_18 = "exclude_modules", "peft_version"


def merged_parameters(
    backbone: Backbone,
    config: Mapping[str, Any],
    tensors: Tensors,
    replaced: Mapping[str, Array],
    prefix: str,
    where: Path,
) -> dict[str, Array]:
    """All parameters of the backbone with a PEFT adapter merged in float64.

    Args:
        backbone: the model that the adapter belongs to.
        config: of PEFT.
        tensors: the method's own, by PEFT's keys.
        replaced: parameters that were trained whole, by path; the classifier's may have other rows.
        prefix: of the user's outer module, "" or ending in a dot, in the keys.
        where: the configuration, for messages.

    Raises:
        AdapterError: PEFT cannot load or merge it, tensors and configuration do not go together,
            or its merged model is not its unmerged one.
        MissingDependencyError: PEFT is not installed.
    """
    peft = require("peft", "peft", f"reading {config.get('peft_type')} adapters")
    _check_method(config, where)
    _check_age(config, tensors, where)
    import torch

    with _quiet(), seeded(0):
        model = _with_replaced(backbone, replaced)
        tuned = _loaded(peft, _nested(model, prefix), config, tensors, where)
        for dtype in (torch.float64, torch.float32):
            trial = copy.deepcopy(tuned) if dtype == torch.float64 else tuned
            try:
                return _merged(trial.to(dtype).eval(), backbone, prefix, where)
            except _UnfitError as error:
                reason = error
        raise AdapterError(
            f"{where}: PEFT {peft.__version__} cannot merge {config['peft_type']}: {reason}. An "
            "adapter whose change depends on the image has no weights that it could be folded "
            "into. Train the task with a method that merges (LoRA, DoRA, IA3, OFT and most others)."
        )


class _UnfitError(Exception):
    """PEFT refused in this precision."""


def _check_method(config: Mapping[str, Any], where: Path) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = config.get("peft_type")
    known = {str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING}
    if kind not in known:
        raise AdapterError(
            f"{where}: peft_type: expected a method of the PEFT that is installed, found {kind!r}. "
            "A newer one may have it (pip install -U peft). Or merge the "
            "adapter where it was trained (merge_and_unload) and bring the checkpoint: "
            "`extract_adapter()`."
        )
    fields = PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__
    for key, value in config.items():
        if key not in fields and key not in _DROPPED and value not in (None, False, {}, []):
            raise AdapterError(
                f"{where}: {key}: expected an option of {kind} in the PEFT that is installed, "
                f"found {value!r}. A newer PEFT wrote it: upgrade with pip install -U peft."
            )
    init = initialisation(config)
    if kind == "LORA" and init not in _REPEATABLE:
        raise AdapterError(
            f"{where}: init_lora_weights: expected one that leaves the backbone's weights as they "
            f"are, found {init!r}. Merge the adapter where it was trained and bring the "
            "checkpoint: `extract_adapter()`. Or save it with PEFT's "
            "path_initial_model_for_weight_conversion, and add what modules_to_save names (the "
            "head), which that leaves out."
        )
    if config.get("megatron_config"):
        raise AdapterError(
            f"{where}: megatron_config: expected none: it names code to import. Merge the adapter "
            "where it was trained and bring the checkpoint: `extract_adapter()`."
        )


def _check_age(config: Mapping[str, Any], tensors: Tensors, where: Path) -> None:
    """The PEFT that is installed makes of the numbers what the one that wrote them did. What some
    mean was changed; the files say it by what their configurations lack alone.

    Source: PEFT, ``tuners/oft/layer.py`` (Cayley-Neumann) and ``tuners/boft/layer.py`` (Conv2d).
    """
    kind = config.get("peft_type")
    scales = [tensor for key, tensor in tensors.items() if key.endswith(".boft_s")]
    # (1, out) of a convolution, (out, 1) of a Linear.
    convolutions = any(scale.shape[-1] > 1 for scale in scales)
    for changed, key, since in (
        (kind == "OFT" and config.get("use_cayley_neumann", True), _SINCE_18, "0.18"),
        (kind == "BOFT" and convolutions, _SINCE_14, "0.14"),
    ):
        if changed and key not in config:
            raise AdapterError(
                f"{where}: expected {kind} of PEFT {since} or newer, found none of its {key}: an "
                "older PEFT made another change of the same numbers. Merge the adapter with that "
                "one, where it was trained (merge_and_unload), and bring the checkpoint: "
                "`extract_adapter()`."
            )


def said_of_reading(config: Mapping[str, Any]) -> list[str]:
    """A line where a configuration is read otherwise than PEFT reads it, or does not say enough."""
    if _unscaled(config):
        return ["LoKr without its alpha / r: PEFT before 0.14, which wrote this, did not apply it"]
    init = config.get("init_lora_weights")
    if str(init).lower() in ("pissa", "olora"):  # the file does not tell
        return [f"{init} from the backbone's own weights: of the first adapter in its model"]
    return []


def _unscaled(config: Mapping[str, Any]) -> bool:
    return config.get("peft_type") == "LOKR" and _SINCE_14 not in config


def _with_replaced(backbone: Backbone, replaced: Mapping[str, Array]) -> nn.Module:
    """A copy of the model in which whole parameters are those of the file."""
    import torch
    from torch import nn

    model = copy.deepcopy(backbone.model)
    for name, value in replaced.items():
        owner, _, leaf = name.rpartition(".")
        data = torch.from_numpy(np.ascontiguousarray(value, np.float32))
        setattr(model.get_submodule(owner), leaf, nn.Parameter(data, requires_grad=False))
    return model


def _nested(model: nn.Module, prefix: str) -> nn.Module:
    """The model as a member of modules named as the file's prefix; all pass the call on."""
    from torch import nn

    class Outer(nn.Module):
        def __init__(self, name: str, inner: nn.Module) -> None:
            super().__init__()
            self.inner_name = name
            self.add_module(name, inner)

        def forward(self, images: Any) -> Any:
            return self.get_submodule(self.inner_name)(images)

    for name in reversed([part for part in prefix.split(".") if part]):
        model = Outer(name, model)
    return model


def _loaded(
    peft: Any, model: nn.Module, config: Mapping[str, Any], tensors: Tensors, where: Path
) -> Any:
    """PEFT's model with the file's tensors, which are compared with it both ways."""
    import torch
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    method = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    kept = _of_method(config, method.__dataclass_fields__)
    known = [name for name, _ in model.named_parameters()]  # PEFT renames them
    try:
        if kept.get("modules_to_save"):
            kept = _without_saved(peft, model, kept)
        described = peft.PeftConfig.from_peft_type(**kept)
        if described.is_prompt_learning or described.is_adaption_prompt:
            raise ValueError("prompts are inputs, not weights")
        tuned = peft.get_peft_model(model, described)
        own = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
    except Exception as error:
        raise AdapterError(
            f"{where}: PEFT {peft.__version__} cannot put this {config['peft_type']} adapter on "
            f"the model: {first_line(error)}. Does it belong to this model, with these names? A "
            "checkpoint that has it merged comes in too: `extract_adapter()`."
        ) from error
    _compare(own, tensors, config, where)
    for key in filter(lambda key: own[key].is_floating_point(), own):
        check_float(key, tensors[key], where)
    _check_target_parameters(known, config, where)
    state = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in tensors.items()}
    try:
        peft.set_peft_model_state_dict(tuned, state)
    except Exception as error:
        raise AdapterError(f"{where}: PEFT cannot load the tensors: {first_line(error)}") from error
    return tuned


def _check_target_parameters(known: list[str], config: Mapping[str, Any], where: Path) -> None:
    """PEFT passes over parameters that the model does not have."""
    for target in config.get("target_parameters") or ():
        if not any(name == target or name.endswith(f".{target}") for name in known):
            raise AdapterError(
                f"{where}: target_parameters names {target!r}, which the model does not have."
            )


def _of_method(config: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The configuration of the method, whose options in the PEFT that is installed are ``known``,
    with what was saved whole excluded, if it can be, also where the PEFT that wrote it had no key
    for that."""
    kept = {key: value for key, value in config.items() if key not in _DROPPED}
    saved = config.get("modules_to_save") or ()
    if saved and "exclude_modules" not in known:
        kept["modules_to_save"] = saved
    elif saved:
        excluded = config.get("exclude_modules") or ()
        names = [rf"(.*\.)?({'|'.join(saved)})(\..*)?"]
        names += (
            [excluded]
            if isinstance(excluded, str)
            else [rf"(.*\.)?{re.escape(name)}" for name in excluded]
        )
        kept["exclude_modules"] = "|".join(f"(?:{name})" for name in names)
    if _unscaled(config):
        kept |= {"alpha": config.get("r", 8), "alpha_pattern": config.get("rank_pattern") or {}}
    return kept


def _without_saved(peft: Any, model: nn.Module, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a method that excludes no modules with the targets that PEFT finds
    beside the saved ones, which it passes over."""
    trial = peft.get_peft_model(copy.deepcopy(model), peft.PeftConfig.from_peft_type(**kept))
    targets = "|".join(map(re.escape, trial.base_model.targeted_module_names))
    said = ("modules_to_save", "layers_to_transform", "layers_pattern")
    return {**{k: v for k, v in kept.items() if k not in said}, "target_modules": targets}


def _compare(
    own: Mapping[str, Any], tensors: Tensors, config: Mapping[str, Any], where: Path
) -> None:
    missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    wrong = [
        f"{key} (expected {list(own[key].shape)}, found {list(tensors[key].shape)})"
        for key in own
        if key in tensors and tuple(own[key].shape) != tensors[key].shape
    ]
    problems = [
        f"{title}: {abbreviate(names, 5)}"
        for title, names in (
            ("the configuration names, the tensors lack", missing),
            ("the tensors have, the configuration does not name", extra),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        names = {name for key in extra for name in _named_within(key, own)}
        several = f", with what may be names of adapters in them ({', '.join(sorted(names))})"
        raise AdapterError(
            f"{where}: configuration and tensors of this {config['peft_type']} adapter disagree; "
            f"{'; '.join(problems)}{several if names else ''}. Save the adapter whole, with the "
            "model that it belongs to, by PEFT's save_pretrained(DIR); one of several by "
            "save_pretrained(DIR, selected_adapters=['NAME'])."
        )


def _named_within(key: str, own: Collection[str]) -> list[str]:
    """The components of a key without which it would be one of PEFT's own."""
    parts = key.split(".")
    return [p for i, p in enumerate(parts) if ".".join([*parts[:i], *parts[i + 1 :]]) in own]


def _merged(tuned: Any, backbone: Backbone, prefix: str, where: Path) -> dict[str, Array]:
    import torch

    images = noise(_IMAGES, backbone).to(next(tuned.parameters()).dtype)
    adapted = _adapted(tuned)
    turning = _turning(adapted)
    with torch.no_grad(), module_by_module():
        with never_called(adapted) as idle:
            unmerged = _attempt(lambda: tuned(images))
        whole = _attempt(lambda: tuned.merge_and_unload(safe_merge=True))
        inner = whole.get_submodule(prefix.rstrip(".")) if prefix else whole
        merged = _attempt(lambda: inner(images))
    found = values_of(inner)
    expected = {name for name, _ in backbone.model.named_parameters()}
    if set(found) != expected:
        changed = sorted(set(found) ^ expected)
        raise AdapterError(
            f"{where}: merging changes the structure of the model ({abbreviate(changed, 4)}); "
            "only weights can be folded. Bring the merged model as a model of its own."
        )
    _judge(unmerged.double().numpy(), merged.double().numpy(), idle, turning, where)
    return found


def _adapted(tuned: Any) -> dict[str, Any]:
    """The modules that PEFT put something around, by path; what is within another one is that
    one's to call."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {n: m for n, m in tuned.named_modules() if isinstance(m, BaseTunerLayer)}
    return {
        name.removeprefix(PEFT_MODEL): module
        for name, module in adapted.items()
        if not any(name.startswith(f"{other}.") for other in adapted)
    }


def _turning(adapted: Mapping[str, Any]) -> list[str]:
    """The convolutions of larger kernels that OFT adapts: PEFT turns the image in front of them,
    window by window of those that overlap, and merges a kernel that is turned.

    Source: PEFT, ``tuners/oft/layer.py`` (OFTRotationModule).
    """
    from peft.tuners.oft.layer import Conv2d

    found = [name for name, module in adapted.items() if isinstance(module, Conv2d)]
    return [name for name in found if max(adapted[name].get_base_layer().kernel_size) > 1]


def _judge(
    unmerged: NDArray[Any],
    merged: NDArray[Any],
    idle: Sequence[str],
    turning: Sequence[str],
    where: Path,
) -> None:
    span = logit_range(unmerged) or 1.0
    error = float(np.abs(logit_change(merged, unmerged)).max()) / span
    if not error <= PEFT_MERGE_BOUND:
        if idle:
            effect = f"move the logits by {error:.1e} of their range"
            way = "Train it again with such modules in exclude_modules."
            raise passed_by(idle, where, effect, way)
        if turning:
            raise AdapterError(
                f"{where}: OFT of the convolution {abbreviate(turning, 3)}: PEFT turns the image "
                "in front of it, window by window, as no kernel does; merged it would move the "
                f"logits by {error:.1e} of their range. Train it again with such modules in "
                "exclude_modules, or by BOFT or HRA, which turn the kernel."
            )
        raise AdapterError(
            f"{where}: PEFT's merged model differs from its unmerged one by {error:.1e} of the "
            f"logits' range (at most {PEFT_MERGE_BOUND:.0e}): its change depends on the image, or "
            "its numbers are out of range. It cannot be folded into weights."
        )


def _attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        raise _UnfitError(first_line(error)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PEFT's warnings and progress bars are about training."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
