"""What quantising one site costs, so that a guard knows which to leave out first.

`site_sqnr` is cheap: one pass over a few images, every site by itself on the float inputs. It
tells how well a product survives, not how much the logits depend on it; `logits_sqnr` answers
that, with a graph and a pass for every site.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.calibration.feeds import Feed
from hhdeploy.calibration.probe import CpuSession, Probe
from hhdeploy.calibration.qdq import Format, low_values, quantised_model, quantised_weight
from hhdeploy.calibration.scales import SiteScale
from hhdeploy.graph import GraphLinear
from hhdeploy.parity import compare


def site_sqnr(
    graph_path: Path,
    sites: Mapping[str, GraphLinear],
    scales: Mapping[str, SiteScale],
    form: Format,
    feeds: Iterable[Feed],
) -> dict[str, float]:
    """Signal to quantisation noise of every site's product x W, in dB.

    Both the float and the quantised product read the float graph's x, so errors do not add up
    from site to site. Smoothing is part of it: the input is x ∘ smooth, the weight W / smooth.

    Args:
        graph_path: the float32 graph.
        sites: of that graph.
        scales: the calibration's.
        form: the low type.
        feeds: a few images (see `CalibrationData`).
    """
    sites = {name: sites[name] for name in scales}
    # Low weights once, as the float32 values that the runtime multiplies by.
    weights = {name: _dequantised_weight(site, scales[name], form) for name, site in sites.items()}
    signal, noise = dict.fromkeys(sites, 0.0), dict.fromkeys(sites, 0.0)
    for inputs in Probe(graph_path, sites).inputs(feeds):
        for name, x in inputs.items():
            product = x @ sites[name].weight.T
            error = _dequantised_input(x, scales[name], form) @ weights[name] - product
            signal[name] += float(np.sum(np.square(product, dtype=np.float64)))
            noise[name] += float(np.sum(np.square(error, dtype=np.float64)))
    return {name: _decibel(signal[name], noise[name]) for name in sites}


def logits_sqnr(
    graph_path: Path,
    classifier: str,
    scales: Mapping[str, SiteScale],
    form: Format,
    feeds: Sequence[Feed],
    only: Sequence[str],
) -> dict[str, float]:
    """Signal to noise of the logits when one site alone is quantised, in dB, site by site.

    Args:
        graph_path: the float32 graph.
        classifier: as for `find_sites`.
        scales: the calibration's.
        form: the low type.
        feeds: a few images.
        only: the sites to measure: each costs a session and a pass over the images.
    """
    model, everything = ir.load(graph_path), frozenset(scales)

    def logits(kept: frozenset[str]) -> NDArray[np.float32]:
        graph = quantised_model(model, scales, form, classifier, kept)
        session = CpuSession(ir.to_proto(graph).SerializeToString(), graph_path)
        return np.concatenate([session.run(["logits"], feed)[0] for feed in feeds])

    reference = logits(everything)
    return {site: compare(reference, logits(everything - {site})).sqnr_db for site in only}


def _dequantised_weight(site: GraphLinear, scale: SiteScale, form: Format) -> NDArray[np.float32]:
    low, scales = quantised_weight(site.weight.T, scale, form)
    weight: NDArray[np.float32] = low.astype(np.float32) * scales
    return weight


def _dequantised_input(
    x: NDArray[np.float32], scale: SiteScale, form: Format
) -> NDArray[np.float32]:
    if not form.activations:
        return x
    step = np.float32(scale.absmax / form.largest)
    smoothed = x if scale.smooth is None else x * scale.smooth
    values: NDArray[np.float32] = low_values(smoothed / step, form).astype(np.float32) * step
    return values


def _decibel(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
