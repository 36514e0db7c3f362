"""The rungs of the ladder: the same adapters through torch, folded graphs and side branches.

``training-time model (float64) = folded = side branch = bank row``, and mistakes that must be
seen. Nothing here knows a tolerance: comparisons are judged by the table in `hhdeploy.parity`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from hhdeploy.adapters.checks import BACKBONE, check
from hhdeploy.adapters.format import Adapter, SiteTensors
from hhdeploy.backbones.sites import sites_of
from hhdeploy.backbones.spec import Backbone
from hhdeploy.exporters.branches import branched_model
from hhdeploy.exporters.fold import folded_model
from hhdeploy.exporters.trace import EXTERNAL_THRESHOLD, BaseGraph
from hhdeploy.graph import GraphLinear
from hhdeploy.plan import Plan, Reserve, plan_branches
from hhdeploy.verifying.reference import Reference, VerifyData, training_time_reference
from tests.support import random_adapter

Floats = NDArray[np.float32]


def save(model: ir.Model, folder: Path) -> Path:
    """The graph as files, weights beside it."""
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data", size_threshold_bytes=EXTERNAL_THRESHOLD)
    return path


@contextmanager
def session(model: ir.Model, threads: int = 1) -> Iterator[ort.InferenceSession]:
    """An ONNX Runtime session with default options but for the number of threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder))
        yield ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(runner: ort.InferenceSession, images: Floats, **feeds: NDArray[Any]) -> Floats:
    """Logits of one call."""
    logits: Floats = runner.run(["logits"], {"images": images, **feeds})[0]
    return logits


def run_batches(
    runner: ort.InferenceSession, size: int, images: Floats, ids: NDArray[np.int64], bank: Floats
) -> Floats:
    """Logits in batches of ``size`` (the last may be smaller)."""
    return np.concatenate(
        [
            run(runner, images[i : i + size], adapter_ids=ids[i : i + size], adapter_bank=bank)
            for i in range(0, len(images), size)
        ]
    )


def without_householder(adapter: Adapter) -> Adapter:
    """The low-rank part alone: sites without u, v and d."""
    return replace(
        adapter, sites={n: replace(s, u=None, v=None, d=None) for n, s in adapter.sites.items()}
    )


def ladder_adapters(base: BaseGraph, scale: float = 0.5) -> dict[str, Adapter]:
    """Every form, both reflections, ranks 0, 1, 2 and 4, LoRA alone, heads of all sizes.

    Kinds that the model lacks are left out, and so are adapters of which nothing remains.
    ``scale``: of the values; where it makes ‖u‖² about 2, both reflections are nearly the same.
    """
    facts = base.facts
    kinds = {site.kind for site in sites_of(facts.linears).values()}
    headless = 13 if facts.classes == 0 else None
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "every": ("q k v proj fc1 fc2", {"r": 1, "classes": 7}),
        "thirds": ("q v fc1", {"r": 0, "classes": 3, "reflection": "orthogonal"}),
        "lora": ("k v proj", {"r": 4, "classes": 11}),
        "after": ("proj fc2", {"r": 2, "classes": 5, "form": "sequential"}),
        "turned": (
            "proj fc2",
            {"r": 4, "classes": headless, "form": "sequential", "reflection": "orthogonal"},
        ),
    }
    adapters = {}
    for seed, (name, (targets, options)) in enumerate(wanted.items()):
        present = [kind for kind in targets.split() if kind in kinds]
        if present:
            options["scale"] = scale
            adapters[name] = random_adapter(facts, targets=present, seed=seed, **options)
    if "lora" in adapters:
        adapters["lora"] = without_householder(adapters["lora"])
    for name, adapter in adapters.items():
        check(name, adapter, facts)
    return adapters


def without_matrix(adapter: Adapter, kinds: Mapping[str, str], **parts: str) -> Adapter:
    """s_in, s_out and db alone, as IA3 has them; ``kinds``: site -> kind, ``parts``: kind -> those
    kept there."""
    sites = {}
    for name, site in adapter.sites.items():
        kept = parts[kinds[name]].split()
        sites[name] = SiteTensors(**{p: t for p, t in site.parts.items() if p in kept})
    return replace(adapter, sites=sites)


def scaled_adapters(base: BaseGraph, scale: float = 0.5) -> dict[str, Adapter]:
    """Adapters with s_in, s_out and db: beside a matrix of either form, and alone."""
    facts = base.facts
    kinds = {name: site.kind for name, site in sites_of(facts.linears).items()}

    def present(targets: str) -> list[str]:
        return [kind for kind in targets.split() if kind in kinds.values()]

    headless = 13 if facts.classes == 0 else None
    common: dict[str, Any] = {"scale": scale, "parts": ("s_in", "s_out", "db")}
    few = random_adapter(facts, targets=present("k proj fc2"), seed=22, classes=headless, **common)
    adapters = {
        "scaled": random_adapter(facts, targets=present("q k v proj fc1 fc2"), seed=21, **common),
        "alone": without_matrix(few, kinds, k="s_out db", proj="s_out", fc2="s_in db"),
        "after": random_adapter(
            facts, targets=present("proj fc2"), form="sequential", seed=23, classes=3, **common
        ),
    }
    for name, adapter in adapters.items():
        check(name, adapter, facts)
    return adapters


@dataclass(frozen=True)
class Rungs:
    """One backbone with its adapters, their plan, bank and float64 reference."""

    base: BaseGraph
    adapters: Mapping[str, Adapter]
    plan: Plan
    bank: Floats
    reference: Reference

    def row(self, name: str) -> int:
        """The bank row of an adapter, or of the backbone."""
        return 0 if name == BACKBONE else self.plan.names.index(name) + 1

    def of(self, name: str) -> tuple[Floats, NDArray[np.float64]]:
        """Images and float64 logits of one adapter, without padding."""
        mine = self.reference.adapter_ids == self.row(name)
        return self.reference.images[mine], self.reference.logits[mine][:, : self.classes(name)]

    def classes(self, name: str) -> int:
        """How many classes an adapter has."""
        head = None if name == BACKBONE else self.adapters[name].head
        return self.base.facts.classes if head is None else len(head.bias)

    def branched(self) -> ir.Model:
        """The graph with all side branches."""
        return branched_model(self.base, self.plan)

    def run_mixed(self, runner: ort.InferenceSession, size: int) -> Floats:
        """The reference's images, neighbours of different adapters, in batches of ``size``."""
        return run_batches(
            runner, size, self.reference.images, self.reference.adapter_ids, self.bank
        )

    def run_row(self, runner: ort.InferenceSession, name: str, row: Floats) -> Floats:
        """One adapter's images with a row of the caller's, without padding."""
        images, _ = self.of(name)
        ids = np.ones(len(images), np.int64)
        bank = np.stack([np.zeros_like(row), row])
        logits = run(runner, images, adapter_ids=ids, adapter_bank=bank)
        return logits[:, : self.classes(name)]


def rungs(
    backbone: Backbone, base: BaseGraph, adapters: Mapping[str, Adapter], count: int
) -> Rungs:
    """Plan, pack, and run the training-time model in float64 on ``count`` images per adapter."""
    reserve = Reserve(keep_backbone_head=base.facts.classes > 0)
    plan = plan_branches(base.facts, adapters, reserve)
    bank = np.zeros((len(plan.names) + 1, plan.layout.size), np.float32)
    for row, name in enumerate(plan.names, start=1):
        bank[row] = plan.layout.pack(name, adapters[name])
    rows: dict[str, tuple[int, Adapter | None]] = {
        name: (row, adapters[name]) for row, name in enumerate(plan.names, start=1)
    }
    if base.facts.classes:
        rows[BACKBONE] = (0, None)
    data = VerifyData(images=count, seed=3)
    reference = training_time_reference(
        replace(backbone, facts=base.facts), rows, data, {"logits": (plan.classes,)}
    )
    return Rungs(base, adapters, plan, bank, reference)


# -- mistakes ----------------------------------------------------------------------------------


def _swapped(adapter: Adapter) -> Adapter | None:
    """u and v exchanged at the square sites."""
    sites = {
        name: replace(site, u=site.v, v=site.u)
        if site.u is not None and site.v is not None and site.u.size == site.v.size
        else site
        for name, site in adapter.sites.items()
    }
    changed = any(sites[name] is not site for name, site in adapter.sites.items())
    return replace(adapter, sites=sites) if changed else None


def _wrong_tau(adapter: Adapter) -> Adapter:
    other = "orthogonal" if adapter.config.reflection == "unnormalized" else "unnormalized"
    return replace(adapter, config=replace(adapter.config, reflection=other))


def mistaken_rows(rungs: Rungs, name: str) -> dict[str, Floats]:
    """Rows of one adapter with a planted mistake, those that its shapes and tensors allow."""
    adapter = rungs.adapters[name]
    other = next(a for n, a in rungs.adapters.items() if n != name)
    mistakes = {"wrong adapter": replace(other, head=adapter.head)}
    if (swapped := _swapped(adapter)) is not None:
        mistakes["swapped u and v"] = swapped
    if any(site.u is not None for site in adapter.sites.values()):
        mistakes["wrong tau"] = _wrong_tau(adapter)
    return {what: rungs.plan.layout.pack(name, wrong) for what, wrong in mistakes.items()}


def folded_without_bias(base: BaseGraph, adapter: Adapter) -> ir.Model | None:
    """W <- M W with M b forgotten; None where no adapted Linear has a bias in the graph."""
    forgotten = []

    def skip(linear: GraphLinear, graph: ir.Graph, name: str, bias: Floats) -> None:
        if linear.path == base.facts.classifier:
            set_bias(linear, graph, name, bias)
        else:
            forgotten.append(name)

    set_bias = GraphLinear.set_bias
    with mock.patch.object(GraphLinear, "set_bias", skip):
        model = folded_model(base, adapter)
    return model if forgotten else None
