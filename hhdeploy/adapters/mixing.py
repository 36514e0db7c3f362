"""Adapters at another strength, and several as one: exact, by concatenating their products.

An additive site adds (diag(s_out) - I) W + W (diag(s_in) - I) + L R + D to its weight and db to
its bias; all of these are sums, so a weighted sum of them is one too. A sequential site multiplies
by M = I + (M - I), and M - I is the sum. A parameter W that an adapter replaces by V moves by
V - W, so what it becomes takes W, the backbone's own. The classifier is no change of the backbone
and is never scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.bases import check_one_base, same_model
from hhdeploy.adapters.checks import check
from hhdeploy.adapters.config import AdapterConfig, Compression
from hhdeploy.adapters.format import Adapter, Head, SiteTensors, checked_adapter
from hhdeploy.algebra import Array, SiteDelta
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.licences import together
from hhdeploy.backbones.sites import Form
from hhdeploy.choices import as_float, mapping
from hhdeploy.errors import AdapterError, OptionError

# What is left of 1 when weights that make it up are subtracted, such as 0.7 and 0.3.
_NOTHING = 1e-12
# Its square is about the largest number of float32.
_MOST = 1e19
# Suffixes of the parameters of a module whose q, k and v are one.
_PACKED = ("in_proj_weight", "in_proj_bias")


class Frozen(Protocol):
    """What a mixture needs of a `hhdeploy.backbones.spec.Backbone`, which takes torch to import."""

    @property
    def facts(self) -> BackboneFacts:
        """What is known of the model."""

    @property
    def model(self) -> Any:
        """The torch module."""


def at_strength(adapter: Adapter, strength: float) -> Adapter:
    """The adapter with all that it does to the backbone times ``strength``; the head as it is.

    Its tensors stay as they are; what `Adapter.change` says of them is scaled. A parameter that it
    replaces is folded between the backbone's own and the new one.

    Raises:
        AdapterError: a site that multiplies both input and output, or one of them before a matrix
            or after a replaced weight (their product is no sum).
        OptionError: a strength that is no finite number, or beyond float32 with this adapter.
    """
    if not math.isfinite(as_float(strength)):
        raise OptionError(f"`strength`: expected a finite number, found {strength!r}.")
    strength = float(strength)  # NumPy's cannot be written as JSON
    if strength == 1.0:
        return adapter
    _check_range(adapter, strength, "`strength`")
    _check_sum(adapter)
    _check_replaced([adapter])
    return replace(adapter, strength=strength)


def merge_adapters(
    adapters: Mapping[str, tuple[Adapter, float]],
    head: str | None = None,
    backbone: Frozen | None = None,
) -> Adapter:
    """One adapter whose change of the backbone is the weighted sum of several.

    Args:
        adapters: name -> adapter and its weight.
        head: name of the adapter whose classifier, class names and preprocessing the result has;
            None where all have the same.
        backbone: of all; needed where parameters are replaced (adapters that can only be folded),
            unless the weights of those that replace one are 1 together.

    Raises:
        AdapterError: adapters of different backbones or forms, classifiers, class names or
            preprocessing that differ without ``head``, sites whose multipliers are no sum,
            replaced parameters without the backbone.
    """
    if not mapping(adapters, "adapters", "names, and an adapter and its weight each"):
        raise OptionError("expected adapters to merge, found none.")
    adapters = {name: _weighted(name, given) for name, given in adapters.items()}
    named = {name: adapter for name, (adapter, _) in adapters.items()}
    _check_bases(named)
    if backbone is not None:
        if not isinstance(getattr(backbone, "facts", None), BackboneFacts):
            found = type(backbone).__name__
            raise OptionError(f"`backbone`: expected what load_backbone gives, found {found}.")
        _check_fit(named, backbone)
    chosen = named[_head_of(named, head)]
    config = replace(
        chosen.config.of_other_tensors(
            merged_from={name: weight for name, (_, weight) in adapters.items()}
        ),
        **_base_of(chosen.config, [adapter.config for adapter in named.values()]),
        compressed=_worst([adapter.config.compressed for adapter in named.values()]),
        license=together(*(adapter.config.license for adapter in named.values())),
    )
    return _mixed(adapters, chosen.head, config, backbone)


def _check_range(adapter: Adapter, strength: float, what: str) -> None:
    """Raise `OptionError` for a strength at which norms leave float32: they square what the Linears
    give, and answers are no numbers then."""
    whole = replace(adapter, strength=1.0)
    sequential = adapter.form == "sequential"
    changes = [whole.change(site).largest(around_identity=sequential) for site in adapter.sites]
    values = [float(np.max(np.abs(value), initial=0.0)) for value in adapter.values.values()]
    largest = max((*changes, *values), default=0.0)
    if abs(strength) * largest > _MOST:
        raise OptionError(
            f"{what}: expected at most {_MOST / largest:.3g} for {adapter.source}, which changes "
            f"the backbone by values of up to {largest:.3g} at 1, found {strength:g}: beyond that "
            "the answers leave the range of float32. Strengths are near 1."
        )


def _weighted(name: str, given: object) -> tuple[Adapter, float]:
    """An adapter and its weight, as `merge_adapters` is given them. Raises `OptionError`."""
    found = type(given).__name__
    if isinstance(given, Sequence) and len(given) == 2:
        adapter, weight = given
        if isinstance(adapter, Adapter) and math.isfinite(as_float(weight)):
            adapter = checked_adapter(adapter)
            _check_range(adapter, adapter.strength * float(weight), f"the weight of {name!r}")
            return adapter, float(weight)
        found = f"({type(adapter).__name__}, {weight!r})"
    raise OptionError(
        f"adapter {name!r}: expected (adapter, weight), a loaded one and a finite number, found "
        f"{found}."
    )


def _mixed(
    adapters: Mapping[str, tuple[Adapter, float]],
    head: Head | None,
    config: AdapterConfig,
    backbone: Frozen | None,
) -> Adapter:
    form = _form_of({name: adapter for name, (adapter, _) in adapters.items()})
    sites = dict.fromkeys(site for adapter, _ in adapters.values() for site in adapter.sites)
    tensors = {
        site: _site(site, form, [(a, w) for a, w in adapters.values() if site in a.sites])
        for site in sites
    }
    ranks = [t.lora_A.shape[0] for t in tensors.values() if t.lora_A is not None]
    described = replace(
        config,
        form=form,
        # Zero vectors reflect nothing, whatever the convention: what is left of u and v is d.
        reflection="unnormalized",
        r=max(ranks, default=0),
        target_modules=tuple(sites) or config.target_modules,
        fold_only=any(adapter.config.fold_only for adapter, _ in adapters.values()),
    )
    source = " + ".join(f"{weight:g} x {a.source}" for a, weight in adapters.values())
    values = dict.fromkeys(path for adapter, _ in adapters.values() for path in adapter.values)
    replaced = {path: _value(path, adapters, backbone) for path in values}
    return Adapter(described, tensors, head, source, replaced)


def _value(
    path: str, adapters: Mapping[str, tuple[Adapter, float]], backbone: Frozen | None
) -> NDArray[np.float32]:
    """W + the sum of weight (V - W), of those adapters that replace the parameter W by V."""
    parts = [
        (weight * a.strength, a.values[path].astype(np.float64), a)
        for a, weight in adapters.values()
        if path in a.values
    ]
    shapes = {value.shape for _, value, _ in parts}
    if len(shapes) > 1:
        raise AdapterError(
            f"{path}: expected values of one shape, found {' and '.join(map(str, shapes))}: the "
            "adapters belong to different backbones."
        )
    total: Array = np.sum([weight * value for weight, value, _ in parts], axis=0)
    left = 1.0 - sum(weight for weight, _, _ in parts)
    if abs(left) <= _NOTHING:
        return total.astype(np.float32)
    if backbone is None:
        raise AdapterError(
            f"{parts[0][2].source} can only be folded: it replaces parameters ({path}, …), and "
            "what they are at another strength takes the backbone's own. Give the `model`, or "
            "weights that are 1 together."
        )
    frozen = backbone.model.get_parameter(path).detach().double().cpu().numpy()
    mixed: Array = total + left * frozen
    return mixed.astype(np.float32)


def _site(name: str, form: Form, parts: Sequence[tuple[Adapter, float]]) -> SiteTensors:
    """The weighted sum of one site of several adapters."""
    deltas: list[SiteDelta] = []
    sums: dict[str, Array] = {}
    for adapter, weight in parts:
        change = adapter.change(name)
        scales = {"s_in": change.scales.s_in, "s_out": change.scales.s_out}
        for part, values in scales.items():
            if values is not None:
                sums[part] = sums.get(part, np.ones_like(values)) + weight * (values - 1.0)
        if change.db is not None:
            sums["db"] = sums.get("db", np.zeros_like(change.db)) + weight * change.db
        if change.delta is not None:
            delta = change.delta.minus_identity() if form == "sequential" else change.delta
            deltas.append(SiteDelta(weight * delta.diag, weight * delta.left, delta.right))
    if {"s_in", "s_out"} <= set(sums):
        raise AdapterError(
            f"{name}: one adapter multiplies the Linear's input, another its output: together that "
            "is a product, no sum. Use them apart."
        )
    if form == "sequential" and deltas and sums:
        raise AdapterError(
            f"{name}: one adapter's matrix would multiply another's {' and '.join(sums)}: that is "
            "a product, no sum. Use them apart."
        )
    found = {key: value.astype(np.float32) for key, value in sums.items()}
    return SiteTensors(**found, **_matrix(deltas, form))


def _matrix(deltas: Sequence[SiteDelta], form: Form) -> dict[str, np.ndarray]:
    """u = v = 0 with the sum of the diagonals, and the concatenated products."""
    if not deltas:
        return {}
    diag = np.sum([delta.diag for delta in deltas], axis=0)
    if form == "sequential":
        diag = diag + 1.0
    out, into = deltas[0].shape
    tensors = {
        "lora_A": np.concatenate([delta.right for delta in deltas]),
        "lora_B": np.concatenate([delta.left for delta in deltas], axis=1),
    }
    if diag.any():
        tensors |= {"u": np.zeros(out), "v": np.zeros(into), "d": diag}
    return {key: np.ascontiguousarray(value, np.float32) for key, value in tensors.items()}


def _check_sum(adapter: Adapter) -> None:
    """What the adapter does at its sites can be multiplied by a number, or added to another's."""
    for name, site in adapter.sites.items():
        factors: list[str] = [part for part in ("s_in", "s_out") if part in site.parts]
        if adapter.form == "sequential" and site.shape is not None:
            # It multiplies the shift of the bias, too.
            factors += ["a matrix", *(["db"] if "db" in site.parts else [])]
        if len(factors) > 1:
            raise AdapterError(
                f"{adapter.source}: {name} has {' and '.join(factors)}, of which one multiplies "
                "the other: at another strength, or beside another adapter, that product is no "
                "sum. Use it whole."
            )


def _check_replaced(adapters: Sequence[Adapter]) -> None:
    """No site multiplies what a replaced parameter holds."""
    replaced = {_linear_of(path): path for adapter in adapters for path in adapter.values}
    for adapter in adapters:
        for name, site in adapter.sites.items():
            matrix = adapter.form == "sequential" and site.shape is not None
            factors = {
                "weight": matrix or not {"s_in", "s_out"}.isdisjoint(site.parts),
                "bias": matrix,
            }
            for leaf in (leaf for leaf, multiplied in factors.items() if multiplied):
                owners = (name, name.rpartition(".")[0])  # a third's is the whole Linear's
                path = next((replaced[o, leaf] for o in owners if (o, leaf) in replaced), None)
                if path is not None:
                    raise AdapterError(
                        f"{adapter.source}: {name} multiplies {path}, which is replaced too: at "
                        "another strength, or beside another adapter, that product is no sum. Use "
                        "it whole."
                    )


def _linear_of(path: str) -> tuple[str, str]:
    """The Linear that a parameter would be of, and which of its two."""
    owner, _, leaf = path.rpartition(".")
    if leaf in _PACKED:
        return f"{owner}.in_proj", leaf.removeprefix("in_proj_")
    return owner, leaf


def _form_of(adapters: Mapping[str, Adapter]) -> Form:
    for adapter in adapters.values():
        _check_sum(adapter)
    _check_replaced(list(adapters.values()))
    forms = {adapter.form for adapter in adapters.values() if adapter.sites}
    if len(forms) > 1:
        raise AdapterError(
            f"{' and '.join(adapters)} have different forms ({', '.join(sorted(forms))}): an "
            "additive change and a product after it are no sum."
        )
    return forms.pop() if forms else "additive"


def _check_bases(adapters: Mapping[str, Adapter]) -> None:
    for (first, one), (second, other) in combinations(adapters.items(), 2):
        check_one_base(first, one.config, second, other.config)


def _check_fit(adapters: Mapping[str, Adapter], backbone: Frozen) -> None:
    """All belong to the backbone, which has the parameters that they replace."""
    shapes = {path: tuple(p.shape) for path, p in backbone.model.named_parameters()}
    for name, adapter in adapters.items():
        check(name, adapter, backbone.facts)
        for path, value in adapter.values.items():
            if value.shape != shapes.get(path):
                raise AdapterError(
                    f"{adapter.source}: {path}.value: expected shape {shapes.get(path)} of the "
                    f"backbone's parameter, found {value.shape}."
                )


def _base_of(chosen: AdapterConfig, configs: Sequence[AdapterConfig]) -> dict[str, Any]:
    """What any of them says of the backbone binds the sum: timm's tag, and a digest."""
    names = [c.base_model for c in configs if same_model(c.base_model, chosen.base_model)]
    digest = next((c.base_sha256 for c in configs if c.base_sha256 is not None), None)
    signs = next((c.base_signs for c in configs if c.base_signs is not None), None)
    return {
        "base_model": max((chosen.base_model, *names), key=len),
        "base_sha256": digest,
        "base_signs": signs if digest is None else None,
        "base_buffers": next((c.base_buffers for c in configs if c.base_buffers), None),
        "base_answer": next((c.base_answer for c in configs if c.base_answer), None),
    }


def _worst(found: Sequence[Compression | None]) -> Compression | None:
    """What the part lost that lost most; of the sum itself nobody measured it."""
    return max(filter(None, found), key=lambda one: one.max_range_error, default=None)


def _head_of(adapters: Mapping[str, Adapter], head: str | None) -> str:
    if head is not None:
        if not isinstance(head, str) or head not in adapters:
            raise OptionError(f"`head`: expected one of {', '.join(adapters)}, found {head!r}.")
        return head
    for first, second in combinations(adapters, 2):
        if differing := _differing(adapters[first], adapters[second]):
            raise AdapterError(
                f"{first} and {second} have different {differing}, and a mixture has one: say "
                "whose with `head`."
            )
    return next(iter(adapters))


def _differing(one: Adapter, other: Adapter) -> str:
    """What ``head`` has to choose between, in words; what one of them leaves open is no choice."""
    if not _same_head(one, other):
        return "classifiers"
    for key, words in (("class_names", "class names"), ("preprocess", "preprocessing")):
        mine, theirs = getattr(one.config, key), getattr(other.config, key)
        if None not in (mine, theirs) and mine != theirs:
            return words
    return ""


def _same_head(one: Adapter, other: Adapter) -> bool:
    if one.head is None or other.head is None:
        return one.head is other.head
    return (
        one.head.path == other.head.path
        and np.array_equal(one.head.weight, other.head.weight)
        and np.array_equal(one.head.bias, other.head.bias)
    )
