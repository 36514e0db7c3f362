"""Bundles with random weights and random adapters of real size, made on demand."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import work_directory
from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter, Head, Part, SiteTensors, save_adapter
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.sites import select_sites
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import Manifest
from hhdeploy.calibration.data import CalibrationData
from hhdeploy.calibration.quantised import Float32Graph, find_scales, quantise
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.cli.starter import Starter
from hhdeploy.exporters.writer import save_graph
from hhdeploy.exporting.bundles import export
from hhdeploy.preprocess import open_image
from hhdeploy.verifying.graphs import add_graph

TARGETS = ("q", "k", "v", "proj")
STARTER = Path(__file__).resolve().parents[1] / "examples" / "starter"
_NO_ARGS: Mapping[str, Any] = MappingProxyType({})


def random_adapter(
    facts: BackboneFacts,
    seed: int,
    *,
    classes: int = 10,
    r: int = 1,
    parts: Sequence[Part] = (),
) -> Adapter:
    """An additive HTA adapter on q, k, v and proj with random values of trained size.

    ``parts``: what it has of s_out and db beside that.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int, std: float = 0.05) -> np.ndarray:
        return (rng.standard_normal(shape) * std).astype(np.float32)

    sites = {}
    for site in (s for found in select_sites(facts.linears, TARGETS).values() for s in found):
        sites[site.name] = SiteTensors(
            u=normal(site.out),
            v=normal(site.in_),
            d=normal(min(site.out, site.in_)),
            lora_A=normal(r, site.in_),
            lora_B=normal(site.out, r),
            **{part: normal(site.out) + np.float32(part == "s_out") for part in parts},
        )
    head = Head(facts.classifier, normal(classes, facts.dim), normal(classes))
    config = AdapterConfig(
        facts.model,
        r=r,
        target_modules=TARGETS,
        num_classes=classes,
        base_model_args=dict(facts.args),
        base_sha256=facts.sha256,
    )
    return Adapter(config, sites, head)


def adapter_directories(
    model: str,
    count: int,
    args: Mapping[str, Any] = _NO_ARGS,
    parts: Sequence[Part] = (),
) -> dict[str, Path]:
    """``count`` adapters of a model with random weights, name -> directory."""
    root = work_directory() / "adapters" / "-".join([_label(model, args), *parts])
    wanted = {f"task{i}": root / f"task{i}" for i in range(count)}
    missing = {name: path for name, path in wanted.items() if not path.is_dir()}
    if missing:
        facts = load_backbone(BackboneSpec(model, args, pretrained=False)).facts
        for index, (name, path) in enumerate(wanted.items()):
            if name in missing:
                save_adapter(random_adapter(facts, index, parts=parts), path)
    return wanted


def bundle(model: str, kind: str, adapters: int = 4, args: Mapping[str, Any] = _NO_ARGS) -> Path:
    """A bundle of a model with random weights: ``folded``, ``branches``, ``parts``, ``backbone``.

    ``parts`` is side branches whose adapters have s_out and db at every site. ``backbone`` is the
    folded bundle of an adapter whose deltas are all zero: the plain graph with the same head as
    the others.
    """
    path = work_directory() / f"{_label(model, args)}-{kind}-{adapters}"
    if (path / "hhdeploy.json").is_file():
        return path
    shutil.rmtree(path, ignore_errors=True)
    if kind == "backbone":
        facts = load_backbone(BackboneSpec(model, args, pretrained=False)).facts
        zero = random_adapter(facts, 0)
        sites = {
            name: SiteTensors(
                **{k: None if v is None else np.zeros_like(v) for k, v in vars(tensors).items()}
            )
            for name, tensors in zero.sites.items()
        }
        source = work_directory() / "adapters" / _label(model, args) / "zero"
        save_adapter(Adapter(zero.config, sites, zero.head), source, overwrite=True)
        directories = {"zero": source}
    else:
        count = 1 if kind == "folded" else adapters
        parts: tuple[Part, ...] = ("s_out", "db") if kind == "parts" else ()
        directories = adapter_directories(model, count, args, parts)
    export(
        model,
        directories,
        path,
        model_args=args,
        fold=kind not in ("branches", "parts"),
        pretrained=False,
        verify=False,
        cache=work_directory() / "cache",
    )
    return path


def calibrated(path: Path, precision: str) -> Path:
    """The same bundle with a graph from `CalibrationSettings`' precisions, made if it is missing.

    Calibrated on the starter models' images, unjudged: the weights are random.
    """
    found = Bundle.open(path)
    if precision in found.manifest.graphs:
        return path
    settings = CalibrationSettings(precision=precision, images=32)
    images = starter_images(found.manifest, settings.images)
    feeds: list[dict[str, NDArray[Any]]] = [{"images": image[None]} for image in images]
    if found.manifest.layout is not None:
        rows = [a.row for a in found.manifest.adapters]
        if found.manifest.backbone_classes:
            rows.append(0)  # its features are not the adapters', and its range is what it needs
        for index, feed in enumerate(feeds):
            feed["adapter_ids"] = np.asarray([rows[index % len(rows)]], np.int64)
    data = CalibrationData.open(found, feeds, images=settings.images, seed=settings.seed)
    graph = Float32Graph.open(found)
    scales = find_scales(graph, data, settings, cache=work_directory() / "calibrations")
    model = quantise(graph, scales, settings).model
    add_graph(found, precision, lambda target: save_graph(model, target), lambda candidate: [])
    return path


def _label(model: str, args: Mapping[str, Any]) -> str:
    return "-".join([model, *(f"{key}{value}" for key, value in sorted(args.items()))])


def starter_bundle(kind: str = "branches") -> Path:
    """The starter models as side branches, or one of them ``folded``, exported once."""
    path = work_directory() / f"starter-{kind}"
    if not (path / "hhdeploy.json").is_file():
        starter, fold = Starter.read(STARTER), kind == "folded"
        export(
            starter.model,
            {task: starter.adapter(task) for task in starter.tasks[: 1 if fold else None]},
            path,
            fold=fold,
            model_args=starter.args,
            checkpoint=starter.path / "backbone.safetensors",
            verify=False,
        )
    return path


def starter_images(manifest: Manifest, count: int) -> NDArray[np.float32]:
    """Real images for a model of any size: the starter's, spread over its tasks and classes.

    float32 [count, 3, H, W] as the backbone wants them.
    """
    files = sorted((STARTER / "images").rglob("*.png"))
    chosen = [files[i * len(files) // count] for i in range(count)]
    transform = manifest.backbone.preprocess
    return np.stack([transform(open_image(file)) for file in chosen])
