"""Shared by the tests: seeded tiny models and adapters, and comparison by the parity table.

Importing this module imports no torch; the functions that need it do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter, Head, SiteTensors
from hhdeploy.algebra import Reflection
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.sites import Form, select_sites
from hhdeploy.parity import bound, compare

if TYPE_CHECKING:
    from torch import nn

    from hhdeploy.backbones.spec import Backbone, BackboneSpec

TINY_MODEL = "vit_tiny_patch16_224"
TINY_ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
}

# A deliberate mistake must move the result by at least this share of the reference's range.
# The mistakes that these tests plant move it by 1e-2 and more; rounding by 1e-6 at most.
MISTAKE = 1e-3


def assert_parity(reference: NDArray[Any], found: NDArray[Any], stage: str, precision: str) -> None:
    """``found`` is ``reference`` within the parity table; vectors count as one row."""
    comparison = compare(_rows(reference), _rows(found))
    assert not comparison.failures(bound(stage, precision)), comparison


def assert_caught(
    reference: NDArray[Any], mistaken: NDArray[Any], stage: str, precision: str
) -> None:
    """A planted mistake is outside the parity table, and clearly so."""
    comparison = compare(_rows(reference), _rows(mistaken))
    assert comparison.failures(bound(stage, precision)), comparison
    assert comparison.range_error > MISTAKE, comparison


def _rows(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(1, -1) if values.ndim == 1 else values


def tiny_spec(model: str = TINY_MODEL, **args: Any) -> BackboneSpec:
    """The spec of a random tiny backbone; ``args`` replace or extend `TINY_ARGS`."""
    from hhdeploy.backbones.spec import BackboneSpec

    chosen = {**TINY_ARGS, **args} if model == TINY_MODEL else args
    own = model.startswith("python:")
    return BackboneSpec(
        model, chosen, pretrained=False, seed=5, input_size=(3, 32, 32) if own else None
    )


def tiny_backbone(model: str = TINY_MODEL, **args: Any) -> Backbone:
    """A tiny random backbone, perturbed, with the digests of what it is now."""
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.backbones.structure import base_sha256, buffers_sha256, signs_sha256

    read_operators_once()
    backbone = load_backbone(tiny_spec(model, **args))
    perturb(backbone.model, classifier=backbone.facts.classifier)
    digest, signs, buffers = (
        made(backbone.model, backbone.facts.classifier)
        for made in (base_sha256, signs_sha256, buffers_sha256)
    )
    facts = replace(backbone.facts, sha256=digest, signs=signs, buffers=buffers)
    return replace(backbone, facts=facts)


@functools.cache
def read_operators_once() -> None:
    """From now on this process reads torch's tables of operators once, not for every export.

    They are the same each time, and a third of what tracing a tiny model takes.
    """
    from torch.export import decomp_utils, exported_program
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)
    ONNXRegistry.from_torchlib = staticmethod(read)
    collected = functools.cache(decomp_utils._collect_all_valid_cia_ops)
    decomp_utils._collect_all_valid_cia_ops = collected
    exported_program._collect_all_valid_cia_ops = collected


def perturb(model: nn.Module, seed: int = 11, *, classifier: str = "head") -> None:
    """Give biases, norms, LayerScale and the head values that matter, in place.

    Untrained timm models hide mistakes: zero biases, LayerScale 1e-5, a head of 2e-5, a class
    token of 1e-6.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            last = name.rpartition(".")[2]
            if name.startswith(f"{classifier}.") and parameter.ndim == 2:
                parameter.copy_(noise * 0.2)
            elif last.startswith("gamma") or name.endswith((".ls1.gamma", ".ls2.gamma")):
                parameter.copy_(0.5 + 0.2 * noise)
            elif "norm" in name and last == "weight":
                parameter.copy_(1.0 + 0.2 * noise)
            elif parameter.ndim == 1 or last.endswith("_token"):
                parameter.copy_(0.3 * noise)


def random_adapter(
    facts: BackboneFacts,
    *,
    form: Form = "additive",
    reflection: Reflection = "unnormalized",
    targets: Sequence[str] = ("q", "k", "v", "proj"),
    r: int = 1,
    classes: int | None = 7,
    seed: int = 0,
    scale: float = 0.3,
    parts: Sequence[str] = (),
) -> Adapter:
    """A seeded adapter of ``facts`` with values large enough that a mistake shows.

    ``parts``: of s_in, s_out (between 0.2 and 3) and db, at every target; one s_in for the thirds
    of a fused qkv, and none where not all of them are targets.
    """
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    sites = {}
    for chosen in select_sites(facts.linears, targets).values():
        for site in chosen:
            out, in_ = site.out, site.out if form == "sequential" else site.in_
            d = normal(min(out, in_)) + np.float32(1.0 if form == "sequential" else 0.0)
            sites[site.name] = SiteTensors(
                normal(out), normal(in_), d, normal(r, in_), normal(out, r)
            )
    for linear in facts.linears:
        own = [site for site in linear.sites if site.name in sites]
        s_in = random.uniform(0.2, 3.0, linear.in_).astype(np.float32) if parts else None
        for site in own:
            drawn = {
                "s_in": s_in if len(own) == len(linear.sites) else None,
                "s_out": random.uniform(0.2, 3.0, site.out).astype(np.float32),
                "db": normal(site.out),
            }
            sites[site.name] = replace(sites[site.name], **{part: drawn[part] for part in parts})
    head = None
    if classes is not None:
        head = Head(facts.classifier, normal(classes, facts.dim), normal(classes))
    config = AdapterConfig(
        base_model=facts.model,
        form=form,
        reflection=reflection,
        r=r,
        target_modules=tuple(targets),
        base_model_args=dict(facts.args),
        base_sha256=facts.sha256,
        base_buffers=facts.buffers or None,
        num_classes=classes,
        class_names=None if classes is None else tuple(f"class {i}" for i in range(classes)),
        preprocess=facts.preprocess,
    )
    return Adapter(config, sites, head)


def images(count: int, size: int = 32, seed: int = 17) -> NDArray[np.float32]:
    """Seeded noise, float32 [count, 3, size, size]."""
    random = np.random.default_rng(seed)
    return random.standard_normal((count, 3, size, size)).astype(np.float32)


def logits_of(model: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logits of a torch model, computed in float64; the model is float64 afterwards."""
    import torch

    with torch.no_grad():
        found: NDArray[np.float64] = model.double()(torch.from_numpy(inputs).double()).numpy()
    return found
