"""Attach an adapter to a model, take it off again, and save it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import (
    PARTS,
    Adapter,
    Head,
    SiteTensors,
    checked_adapter,
    save_adapter,
)
from hhdeploy.adapters.made import checked_config
from hhdeploy.backbones.parameters import (
    original_of,
    original_parameter,
    put_values,
    restore_values,
)
from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.backbones.structure import bare_model, parameters_of
from hhdeploy.choices import SEEDS, whole
from hhdeploy.errors import AdapterError
from hhdeploy.training.beginning import (
    Beginning,
    begin_new,
    begin_trained,
    tensors_digest,
)
from hhdeploy.training.frozen import FrozenTensors, check_frozen, check_whole, frozen_tensors
from hhdeploy.training.heads import OldHead, put_head, restore_head, trained_head
from hhdeploy.training.householder import (
    AdditiveDelta,
    Between,
    BiasShift,
    HouseholderMatrix,
    Scaling,
    SequentialTransform,
    SharedTransform,
)
from hhdeploy.training.wrapping import (
    check_bare,
    check_places,
    facts_of,
    own_modules,
    without_values,
)

_STATE = "_hhdeploy_attached"


@dataclass
class _Attached:
    """What `detach` needs to give the backbone back, kept on the model.

    Attributes:
        config: of the adapter.
        classifier: module path of the classifier.
        old_head: the backbone's own, None if it is still there.
        old_values: parameter path -> the parameter before the adapter replaced it.
        parametrized: (module, name of its tensor) -> whether its state dict held it.
        new_biases: (module, name of its bias) of Linears that had none.
        strength: of the adapter as it was attached.
        sites: of the backbone, in the order of its Linears.
        places: module path -> what was changed there.
        frozen: what the adapter does not hold, see `hhdeploy.training.frozen`.
        began: sha256 of the tensors of an adapter that was trained before; None of a new one.
        valueless: what is wrong with a model that had no values; None of one that had all.
    """

    config: AdapterConfig
    classifier: str
    old_head: OldHead | None = None
    old_values: dict[str, nn.Parameter] = field(default_factory=dict)
    parametrized: dict[tuple[nn.Module, str], bool] = field(default_factory=dict)
    new_biases: list[tuple[nn.Module, str]] = field(default_factory=list)
    strength: float = 1.0
    sites: tuple[str, ...] = ()
    places: dict[str, nn.Module] = field(default_factory=dict)
    frozen: FrozenTensors = field(default_factory=FrozenTensors)
    began: str | None = None
    valueless: str | None = None


def attach(model: nn.Module, adapter: Adapter | AdapterConfig, *, seed: int = 0) -> nn.Module:
    """Turn a model, in place, into the training-time model of one adapter.

    The backbone is frozen; the adapter's tensors and its new classifier are the only parameters
    that require gradients. A new adapter is bound to the model: to the digest of its weights (in
    bfloat16 or float16: of their signs, which rounding keeps), to what it computes of one fixed
    image, for which it is called a few times as it answers in eval mode (where it runs here and
    the size of its images is known), and, where it is of timm and ``preprocess`` is None, to timm's
    preprocessing of it. Of another model give ``preprocess``: `hhdeploy.export` says what it
    assumes without one.

    Args:
        model: any module with Linears: of timm, transformers, torchvision, or your own.
        adapter: an `Adapter` (its trained tensors are loaded) or an `AdapterConfig` (a new,
            untrained adapter for ``config.target_modules``).
        seed: of the initial values of a new adapter.

    Returns:
        ``model``.

    Raises:
        AdapterError: the adapter does not belong to the model (see `check`), which computes
            otherwise than the one that it was trained on, or one is attached
            already, or the model or a part of it is wrapped (compiled, data parallel,
            checkpointed): attach first, then wrap;
            or a Linear to be changed has no weight of its own (weight norm, shared weights), or is
            the packed weight of an attention that pools;
            or a new adapter's configuration is one that could not be saved; or what is given is no
            model, adapter or seed, or a model of inference mode. The model is then as it was.
        BackboneError: the model has not got all of its values yet (on torch's meta device the
            parameters of a new adapter can be counted, and not saved); or the last Linear was taken
            for the classifier, and is none (of a new adapter, where the model runs here on images
            of its size); or the classifier computes more than a Linear.
    """
    check_bare(model)
    if hasattr(model, _STATE):
        raise AdapterError("an adapter is attached to this model already; call detach first.")
    if not isinstance(adapter, Adapter | AdapterConfig):
        raise AdapterError(
            f"expected an Adapter or an AdapterConfig to attach, found {type(adapter).__name__} "
            f"{reprlib.repr(adapter)}. load_adapter reads a directory."
        )
    seed = whole(seed, "seed", *SEEDS, AdapterError)
    if isinstance(adapter, Adapter):
        adapter = checked_adapter(adapter)
        facts = facts_of(model, adapter.config)
        begin = begin_trained(model, facts, adapter)
    else:
        adapter = checked_config(adapter)  # not after hours, by `save`
        facts = facts_of(model, adapter)
        begin = begin_new(model, facts, adapter, seed)
    state = _Attached(begin.config, facts.classifier, valueless=without_values(model))
    _put(model, facts.linears, begin, state)
    if isinstance(adapter, Adapter):
        state.began = tensors_digest(_tensors_of(model, state))
    object.__setattr__(model, _STATE, state)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take the adapter off, in place: the backbone's weights and classifier are as before."""
    bare = bare_model(model)
    state = _state(bare)
    for (module, name), stored in state.parametrized.items():
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        if not stored:  # torch puts every buffer back as one of the state dict
            module.register_buffer(name, module.get_buffer(name), persistent=False)
    for module, name in state.new_biases:
        module.register_parameter(name, None)
    restore_values(bare, state.old_values)
    if state.old_head is not None:
        restore_head(bare, state.classifier, state.old_head)
    object.__delattr__(bare, _STATE)
    return model


def extract(model: nn.Module) -> Adapter:
    """The attached adapter's tensors and head as they are now, float32 on the CPU.

    What its configuration says of the tensors that it began with (how they were trained, imported,
    merged or compressed) stands under ``started_from`` once they are others.

    Raises:
        AdapterError: none is attached; or modules that it changed were replaced, or put into a
            wrapper that is not torch's; or the backbone is no more what it was then, which no
            adapter holds: frozen weights, or statistics that BatchNorm took in training mode, or
            modules that were replaced or added to be trained; or the classifier was replaced by
            one that an adapter does not hold; or the model had no values when it was attached.
    """
    model = bare_model(model)
    state = _state(model)
    if state.valueless is not None:
        raise AdapterError(f"as attach was called: {state.valueless}")
    check_whole(model)
    adapter = _tensors_of(model, state)
    answer = None if state.old_values else state.config.base_answer  # computed with those
    check_frozen(model, state.frozen, state.classifier, answer, own=state.old_head is not None)
    origin = state.config.origin
    if not origin or state.began == tensors_digest(adapter):
        return adapter
    return replace(adapter, config=state.config.of_other_tensors(started_from=origin))


def base_answer_of(model: nn.Module) -> dict[str, Any] | None:
    """``base_answer`` of the attached adapter, as JSON has it; None where it has none.

    Raises:
        AdapterError: none is attached.
    """
    answer = _state(bare_model(model)).config.base_answer
    return answer.to_json() if answer else None


def _tensors_of(model: nn.Module, state: _Attached) -> Adapter:
    modules = own_modules(model)
    check_places(state.places, modules)
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    for module, name in state.parametrized:
        chain: Any = module.parametrizations[name]  # type: ignore[index]
        for parametrization in chain:
            for site, tensors in parametrization.site_tensors():
                found.setdefault(site, {}).update({k: _numpy(t) for k, t in tensors.items()})
    sites = {name: SiteTensors(**found[name]) for name in state.sites if name in found}
    values = {}
    for path in state.old_values:
        owner, _, name = path.rpartition(".")
        values[path] = _numpy(original_of(modules[owner], name))
    head = None
    if state.old_head is not None:
        weight, bias = trained_head(modules, state.classifier, state.config.num_classes)
        head = Head(state.classifier, _numpy(weight), _numpy(bias))
    return Adapter(state.config, sites, head, values=values, strength=state.strength)


def save(model: nn.Module, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write the attached adapter as an adapter directory, atomically."""
    save_adapter(extract(model), directory, overwrite=overwrite)


def _state(model: nn.Module) -> _Attached:
    state = getattr(model, _STATE, None)
    if state is None:
        # timm's ModelEma is no module.
        own = getattr(model, "__dict__", {})
        inside = model.named_modules() if isinstance(model, nn.Module) else own.items()
        inner = next((name for name, module in inside if hasattr(module, _STATE)), None)
        if inner is not None:
            raise AdapterError(
                f"the adapter is attached to a module inside of this {type(model).__name__}, at "
                f"{inner!r}: pass that one."
            )
        raise AdapterError("no adapter is attached to this model; call attach first.")
    assert isinstance(state, _Attached)
    return state


def _put(
    model: nn.Module, linears: Sequence[LinearSpec], begin: Beginning, state: _Attached
) -> None:
    """Freeze the model and change it, and note in ``state`` what was changed."""
    state.old_values = put_values(model, begin.values, begin.source)
    model.requires_grad_(False)
    for name in state.old_values:
        model.get_parameter(name).requires_grad_(True)
    for linear in linears:
        _parametrize(model, linear, begin.matrices, begin.parts, state)
    if begin.strength != 1.0:
        _weaken(model, state, begin.strength)
    if begin.head is not None:
        state.old_head = put_head(model, state.classifier, *begin.head, begin.config)
    state.sites = tuple(site.name for linear in linears for site in linear.sites)
    held = {module for module, _ in state.parametrized}
    owners = {path.rpartition(".")[0] for path in state.old_values}
    named = model.named_modules()
    state.places = {path: m for path, m in named if m in held or path in owners}
    state.frozen = frozen_tensors(model)


def _parametrize(
    model: nn.Module,
    linear: LinearSpec,
    matrices: Mapping[str, HouseholderMatrix],
    parts: Mapping[str, Mapping[str, Tensor]],
    state: _Attached,
) -> None:
    """Scale, then add or multiply: the order in which parametrizations of one tensor act."""
    rows = {s.name: slice(i * s.out, (i + 1) * s.out) for i, s in enumerate(linear.sites)}
    module, weight, bias = parameters_of(model, linear.path)
    for name in rows:
        tensors = parts.get(name, {})
        s_in, s_out, db = (tensors.get(part) for part in PARTS)
        if s_in is not None or s_out is not None:
            _register(module, weight, Scaling(name, rows[name], s_in, s_out), state)
        if db is not None:
            _shift_bias(model, linear, name, rows[name], db, state)
    own = {name: matrices[name] for name in rows if name in matrices}
    if not own:
        return
    if state.config.form == "additive":
        starts = {name: (rows[name].start, matrix) for name, matrix in own.items()}
        _register(module, weight, AdditiveDelta(starts), state)
        return
    ((name, matrix),) = own.items()
    transform = SequentialTransform(name, matrix)
    _register(module, weight, transform, state)
    if getattr(module, bias) is not None:
        _register(module, bias, SharedTransform(matrix), state)


def _shift_bias(
    model: nn.Module, linear: LinearSpec, name: str, rows: slice, db: Tensor, state: _Attached
) -> None:
    """db on the site's part of the bias; timm keeps the biases of some fused qkv beside it."""
    module, weight, bias = parameters_of(model, linear.path)
    parent = model.get_submodule(linear.path.rpartition(".")[0])
    if len(linear.sites) > 1 and isinstance(getattr(parent, "q_bias", None), Tensor):
        own = f"{name.rpartition('.')[2]}_bias"
        _register(parent, own, BiasShift(name, slice(0, db.numel()), db), state)
        return
    if getattr(module, bias) is None:
        zeros = getattr(module, weight).detach().new_zeros(linear.out)
        setattr(module, bias, nn.Parameter(zeros, requires_grad=False))
        state.new_biases.append((module, bias))
    _register(module, bias, BiasShift(name, rows, db), state)


def _weaken(model: nn.Module, state: _Attached, strength: float) -> None:
    """Every changed tensor between the backbone's and the adapter's, whatever was done to it."""
    state.strength = strength
    replaced = {id(original_parameter(model, path)): old for path, old in state.old_values.items()}
    places = [
        (module, name)
        for module in model.modules()
        if not isinstance(module, parametrize.ParametrizationList)
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in replaced
    ]
    for module, name in [*state.parametrized, *places]:
        value = original_of(module, name)
        frozen = replaced.get(id(value), value).detach().clone()
        _register(module, name, Between(frozen, strength), state)


def _register(module: nn.Module, name: str, added: nn.Module, state: _Attached) -> None:
    tensor: Tensor = getattr(module, name)
    added.to(tensor.device, tensor.dtype)
    if (module, name) not in state.parametrized:
        state.parametrized[module, name] = name in module.state_dict()
    parametrize.register_parametrization(module, name, added)


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    copied: NDArray[np.float32] = tensor.detach().float().cpu().numpy().copy()
    return copied
