"""From a float32 bundle and images to a Q/DQ graph, in two steps.

    graph = Float32Graph.open(bundle)
    found = find_scales(graph, data, CalibrationSettings(), cache=...)   # runs the images
    low = quantise(graph, found, settings).model                         # writes the graph

The first step is the slow one and does not depend on precision or excluded sites; the second
is cheap and may be repeated with other settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hhdeploy.bundle import Bundle
from hhdeploy.calibration.data import CalibrationData
from hhdeploy.calibration.int8 import calibrate_int8, nncf_version
from hhdeploy.calibration.qdq import FORMATS, find_sites, other_products, quantised_model
from hhdeploy.calibration.scales import (
    Calibration,
    cache_key,
    read_cached,
    write_cached,
)
from hhdeploy.calibration.settings import CalibrationSettings, excluded_sites
from hhdeploy.choices import QuantisedPrecision
from hhdeploy.errors import PlanError
from hhdeploy.graph import GraphLinear, open_graph

_FP8_OPSET = 19


@dataclass(frozen=True)
class Float32Graph:
    """A bundle's float32 graph, checked and read once for all that calibrates it.

    Attributes:
        path: of the file; its weights lie beside it.
        model: never changed.
        sites: of the model, see `find_sites`.
        classifier: module path of the backbone's classifier.
        sha256: over the hashes of the graph's files.
    """

    path: Path
    model: ir.Model
    sites: Mapping[str, GraphLinear]
    classifier: str
    sha256: str

    @classmethod
    def open(cls, bundle: Bundle) -> Float32Graph:
        """Raises `BundleError`: the graph is missing, was changed, or has nothing to quantise."""
        path, files = bundle.graph("float32"), bundle.manifest.files
        names = [name for name in (path.name, f"{path.name}.data") if name in files]
        digest = hashlib.sha256("".join(files[name] for name in names).encode()).hexdigest()
        model, classifier = open_graph(path), bundle.manifest.backbone.classifier
        return cls(path, model, find_sites(model.graph, classifier), classifier, digest)


@dataclass(frozen=True)
class SiteInfo:
    """What became of one site.

    Attributes:
        quantised: False: its float weight and input were kept.
        weight_shape: (in, out).
        weight_scales: how many (one an output column); 0 if kept.
        activation_scale: step of the input's quantiser; None if kept or weights only.
        smoothed: SmoothQuant's factors were applied.
        bias_corrected: the bias was shifted.
        sqnr_db: signal to noise of the product's output when this site alone is quantised, if
            measured (see `site_sqnr`).
    """

    quantised: bool
    weight_shape: tuple[int, int]
    weight_scales: int
    activation_scale: float | None
    smoothed: bool
    bias_corrected: bool
    sqnr_db: float | None


@dataclass(frozen=True)
class Quantised:
    """A Q/DQ graph and how it came about.

    Attributes:
        model: the graph; inputs and outputs as the float32 graph's.
        precision: of the graph.
        sites: every Linear that could be quantised, by name.
        kept: products with a constant weight that are never quantised (patch embedding,
            classifier).
        ranges: site -> calibrated largest magnitude (after smoothing); see `ranges`.
        warnings: what the user should know.
        settings: as asked for.
        data: description of the calibration images.
        versions: of what computed the scales.
    """

    model: ir.Model
    precision: QuantisedPrecision
    sites: Mapping[str, SiteInfo]
    kept: tuple[str, ...]
    ranges: Mapping[str, float]
    warnings: tuple[str, ...]
    settings: CalibrationSettings
    data: Mapping[str, Any]
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Everything but the graph."""
        return {
            "precision": self.precision,
            "sites": {name: asdict(info) for name, info in self.sites.items()},
            "kept": list(self.kept),
            "ranges": dict(self.ranges),
            "warnings": list(self.warnings),
            "settings": self.settings.to_json(),
            "data": dict(self.data),
            "versions": dict(self.versions),
        }


def find_scales(
    graph: Float32Graph,
    data: CalibrationData,
    settings: CalibrationSettings,
    *,
    cache: Path | None = None,
) -> Calibration:
    """Find the scales of every site.

    Args:
        graph: of the bundle that the data feeds.
        data: see `CalibrationData.open`.
        settings: ``smooth_quant`` and ``bias_correction`` matter here.
        cache: directory of earlier calibrations; None neither reads nor writes one.

    Raises:
        PlanError: NNCF could not quantise it, or its opset has no type of this precision.
        MissingDependencyError: NNCF is not installed.
    """
    opset = graph.model.opset_imports[""]
    if settings.precision == "fp8" and opset < _FP8_OPSET:
        raise PlanError(
            f"fp8: expected a graph of opset {_FP8_OPSET} or newer, which has its type; found "
            f"{opset}. Export the bundle again with `opset=20`."
        )
    versions = {"nncf": nncf_version()}
    key = cache_key(graph.sha256, data.digest, settings, versions)
    scales = read_cached(cache, key) if cache is not None else None
    if scales is None:
        scales = calibrate_int8(graph.path, graph.sites, data, settings)
        if cache is not None:
            write_cached(cache, key, scales)
    left = tuple(
        f"{name}: NNCF found no range for this Linear; it stays in floating point"
        for name in graph.sites
        if name not in scales
    )
    return Calibration(
        scales, graph.sha256, settings, data.description, (*data.warnings, *left), versions
    )


def quantise(
    graph: Float32Graph,
    calibration: Calibration,
    settings: CalibrationSettings,
    *,
    sqnr_db: Mapping[str, float] | None = None,
) -> Quantised:
    """Write the Q/DQ graph of a calibrated graph.

    Args:
        graph: the one that was calibrated.
        calibration: from `find_scales`.
        settings: ``precision``, ``exclude`` and ``preset`` matter here; they need not be those
            of the calibration.
        sqnr_db: per site, to be shown in the result.

    Raises:
        PlanError: another graph than the calibrated one, an exclude pattern that fits nothing,
            or nothing left to quantise.
    """
    if graph.sha256 != calibration.graph_sha256:
        raise PlanError(
            f"{graph.path} is not the graph that was calibrated (sha256 "
            f"{graph.sha256[:12]}… instead of {calibration.graph_sha256[:12]}…). Calibrate again."
        )
    form = FORMATS[settings.precision]
    excluded = excluded_sites(settings, tuple(calibration.sites))
    infos = {}
    for name, site in graph.sites.items():
        scale = calibration.sites.get(name)
        low = scale is not None and name not in excluded
        active = scale if low and form.activations else None
        out, in_ = site.weight.shape
        infos[name] = SiteInfo(
            quantised=low,
            weight_shape=(in_, out),
            weight_scales=out if low else 0,
            activation_scale=active.absmax / form.largest if active else None,
            smoothed=active is not None and active.smooth is not None,
            bias_corrected=active is not None and active.bias is not None,
            sqnr_db=(sqnr_db or {}).get(name),
        )
    return Quantised(
        model=quantised_model(graph.model, calibration.sites, form, graph.classifier, excluded),
        precision=settings.precision,
        sites=infos,
        kept=tuple(other_products(graph.model.graph, graph.sites.values())),
        ranges=calibration.ranges,
        warnings=calibration.warnings,
        settings=settings,
        data=calibration.data,
        versions=calibration.versions,
    )
