"""An INT8 graph from the largest magnitudes of a bundle's reference images.

NNCF chooses better ranges and need not be where a GPU is; to compare what a GPU computes with
what the graph says, these do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hhdeploy.bundle import Bundle
from hhdeploy.calibration.data import CalibrationData
from hhdeploy.calibration.probe import Probe
from hhdeploy.calibration.quantised import Float32Graph, quantise
from hhdeploy.calibration.scales import Calibration, SiteScale
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.exporters.writer import save_graph
from hhdeploy.verifying.graphs import add_graph


def add_int8(path: Path) -> None:
    """Add the Q/DQ graph to a bundle that carries its reference."""
    bundle = Bundle.open(path)
    images, ids, _ = bundle.reference()
    arrays = {"images": images}
    if bundle.manifest.layout is not None:
        arrays["adapter_ids"] = ids
    settings = CalibrationSettings(images=len(images), smooth_quant=None, bias_correction=False)
    data = CalibrationData.open(bundle, [arrays], images=settings.images, seed=settings.seed)
    graph = Float32Graph.open(bundle)
    largest = dict.fromkeys(graph.sites, 0.0)
    for inputs in Probe(graph.path, graph.sites).inputs(data):
        for name, values in inputs.items():
            largest[name] = max(largest[name], float(np.abs(values).max()))
    scales = {name: SiteScale(absmax) for name, absmax in largest.items()}
    found = Calibration(scales, graph.sha256, settings, data.description)
    model = quantise(graph, found, settings).model
    add_graph(bundle, "int8", lambda target: save_graph(model, target), lambda candidate: [])
