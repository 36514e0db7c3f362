"""From a float32 bundle and images to a Q/DQ graph, in two steps.

    found = calibrate(bundle, "images/", CalibrationSettings(), cache=...)   # runs the images
    graph = quantise(bundle, found, settings).model                          # writes the graph

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
from hhdeploy.calibration import cache as stored
from hhdeploy.calibration.data import CalibrationData
from hhdeploy.calibration.int8 import calibrate_int8, nncf_version
from hhdeploy.calibration.qdq import FORMATS, quantised_model
from hhdeploy.calibration.scales import Calibration
from hhdeploy.calibration.settings import CalibrationSettings, excluded_sites
from hhdeploy.calibration.sites import find_sites, other_products
from hhdeploy.errors import PlanError
from hhdeploy.graph import GraphLinear


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
            measured (see `sensitivity`).
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
        precision: one of `settings.PRECISIONS`.
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
    precision: str
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


def calibrate(
    bundle: Bundle,
    data: CalibrationData,
    settings: CalibrationSettings,
    *,
    cache: Path | None = None,
) -> Calibration:
    """Find the scales of every site of a bundle's float32 graph.

    Args:
        bundle: every bundle has a float32 graph.
        data: see `CalibrationData.open`.
        settings: ``smooth_quant`` and ``bias_correction`` matter here.
        cache: directory of earlier calibrations; None neither reads nor writes one.

    Raises:
        BundleError: the graph is missing or was changed.
        PlanError: NNCF could not quantise it.
        MissingDependencyError: NNCF is not installed.
    """
    path, sites, digest = float32_graph(bundle)
    versions = {"nncf": nncf_version()}
    key = stored.cache_key(digest, data.digest, settings, versions)
    scales = stored.read(cache, key) if cache is not None else None
    if scales is None:
        scales = calibrate_int8(path, sites, data, settings)
        if cache is not None:
            stored.write(cache, key, scales)
    left = tuple(
        f"{name}: NNCF found no range for this Linear; it stays in floating point"
        for name in sites
        if name not in scales
    )
    return Calibration(
        scales, digest, settings, data.description, (*data.warnings, *left), versions
    )


def quantise(
    bundle: Bundle,
    calibration: Calibration,
    settings: CalibrationSettings,
    *,
    sqnr_db: Mapping[str, float] | None = None,
) -> Quantised:
    """Write the Q/DQ graph of a calibrated bundle.

    Args:
        bundle: the one that was calibrated.
        calibration: from `calibrate`.
        settings: ``precision``, ``exclude`` and ``preset`` matter here; they need not be those
            of the calibration.
        sqnr_db: per site, to be shown in the result.

    Raises:
        PlanError: another graph than the calibrated one, an exclude pattern that fits nothing,
            or nothing left to quantise.
    """
    path, sites, digest = float32_graph(bundle)
    if digest != calibration.graph_sha256:
        raise PlanError(
            f"{path} is not the graph that was calibrated (sha256 {digest[:12]}… instead of "
            f"{calibration.graph_sha256[:12]}…). Calibrate again."
        )
    form = FORMATS[settings.precision]
    excluded = excluded_sites(settings, tuple(calibration.sites))
    classifier = bundle.manifest.backbone.classifier
    model = ir.load(path)
    infos = {}
    for name, site in sites.items():
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
        model=quantised_model(model, calibration.sites, form, classifier, excluded),
        precision=settings.precision,
        sites=infos,
        kept=tuple(other_products(model.graph, sites.values())),
        ranges=calibration.ranges,
        warnings=calibration.warnings,
        settings=settings,
        data=calibration.data,
        versions=calibration.versions,
    )


def float32_graph(bundle: Bundle) -> tuple[Path, dict[str, GraphLinear], str]:
    """Path, sites and digest of a bundle's float32 graph."""
    path = bundle.graph("float32")
    files = bundle.manifest.files
    names = [name for name in (path.name, f"{path.name}.data") if name in files]
    digest = hashlib.sha256("".join(files[name] for name in names).encode()).hexdigest()
    return path, find_sites(ir.load(path).graph, bundle.manifest.backbone.classifier), digest
