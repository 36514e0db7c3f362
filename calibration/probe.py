"""What the inputs of a graph's sites show while it runs in float32: noise, and ranges left.

The noise of a site tells a guard which to leave out first. `site_sqnr` is cheap: one pass over a
few images, every site by itself on the float inputs. It tells how well a product survives, not
how much the logits depend on it; `logits_sqnr` answers that, with a graph and a pass for every
site.

One calibration serves all adapters of a bank, and adapters that are added later change
the activations a little: what leaves the range of a quantiser is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.calibration.feeds import Feed
from hhdeploy.calibration.qdq import Format, low_values, quantised_model, quantised_weight
from hhdeploy.calibration.scales import SiteScale
from hhdeploy.errors import BundleError, DeviceError, require
from hhdeploy.graph import GraphLinear, call_weights, open_graph
from hhdeploy.parity import compare

if TYPE_CHECKING:
    import onnx


class Probe:
    """The float32 graph with the input of every site as a further output, in memory.

    Runs on the CPU in ONNX Runtime, one feed after the other.
    """

    def __init__(self, graph_path: Path, sites: Mapping[str, GraphLinear]) -> None:
        library = require("onnx", "calibrate", "looking into a graph")
        self._inputs = {name: str(site.input.name) for name, site in sites.items()}
        proto = library.load(str(graph_path), load_external_data=False)
        # q, k and v read one value; a type is all that ONNX Runtime asks for.
        self._values = list(dict.fromkeys(self._inputs.values()))
        proto.graph.output.extend(library.ValueInfoProto(name=value) for value in self._values)
        self._session = CpuSession(proto, graph_path)

    def inputs(self, feeds: Iterable[Feed]) -> Iterator[dict[str, NDArray[np.float32]]]:
        """For every feed: site name -> its input as [rows, in] (sites may share an array)."""
        for feed in feeds:
            found = dict(zip(self._values, self._session.run(self._values, feed), strict=True))
            yield {
                name: found[value].reshape(-1, found[value].shape[-1])
                for name, value in self._inputs.items()
            }


class CpuSession:
    """A graph in ONNX Runtime on the CPU."""

    def __init__(self, graph: onnx.ModelProto, graph_path: Path) -> None:
        """Load a graph.

        Args:
            graph: that of ``graph_path``, changed or not; it is told where its weights are.
            graph_path: its large weights lie beside it, or a link there leads to them.

        Raises:
            BundleError: ONNX Runtime cannot load it.
        """
        ort = require("onnxruntime", "calibrate", "running a graph while calibrating")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # ONNX Runtime follows no link, and takes a name in a folder.
        weights = graph_path.with_name(f"{graph_path.name}.data").resolve()
        call_weights(graph, weights.name)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights.parent)
        )
        self._path = graph_path
        try:
            self._session = ort.InferenceSession(
                graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise BundleError(f"ONNX Runtime cannot load {graph_path}: {error}") from error

    def run(self, outputs: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        """The values named. Raises `DeviceError` if ONNX Runtime fails, e.g. out of memory."""
        try:
            found: list[NDArray[Any]] = self._session.run(list(outputs), feed)
        except Exception as error:
            raise DeviceError(f"ONNX Runtime failed in {self._path}: {error}") from error
        return found


@dataclass(frozen=True)
class RangeExcess:
    """A site whose activations left the calibrated range.

    Attributes:
        site: its name.
        calibrated: the range's largest magnitude (after smoothing).
        found: the largest magnitude met.
        ratio: found / calibrated.
        clipped: share of the values that are clipped.
        lost: share of the energy (the sum of squares) that clipping takes away.
    """

    site: str
    calibrated: float
    found: float
    ratio: float
    clipped: float
    lost: float

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def range_excess(
    graph_path: Path,
    sites: Mapping[str, GraphLinear],
    scales: Mapping[str, SiteScale],
    feeds: Iterable[Feed],
    form: Format,
    *,
    tolerance: float | None = None,
) -> list[RangeExcess]:
    """Run the float32 graph and list the sites whose inputs leave their range, worst first.

    Args:
        graph_path: the float32 graph that was calibrated.
        sites: of that graph.
        scales: the calibration's.
        feeds: images of the adapter in question (see `CalibrationData`).
        form: what the inputs are rounded to, one of `FORMATS`.
        tolerance: list a site only if found / calibrated is more than this; None: what `form`
            still rounds to its largest magnitude.
    """
    tolerance = form.reach if tolerance is None else tolerance
    sites = {name: sites[name] for name in scales}
    largest = dict.fromkeys(sites, 0.0)
    outside = dict.fromkeys(sites, 0)
    energy, lost = dict.fromkeys(sites, 0.0), dict.fromkeys(sites, 0.0)
    seen = dict.fromkeys(sites, 0)
    for inputs in Probe(graph_path, sites).inputs(feeds):
        for name, x in inputs.items():
            scale = scales[name]
            magnitude = np.abs(x if scale.smooth is None else x * scale.smooth)
            largest[name] = max(largest[name], float(magnitude.max()))
            clipped = magnitude[magnitude > scale.absmax * form.reach]
            outside[name] += clipped.size
            lost[name] += float(np.sum(np.square(clipped - scale.absmax, dtype=np.float64)))
            energy[name] += float(np.sum(np.square(magnitude, dtype=np.float64)))
            seen[name] += magnitude.size
    found = [
        RangeExcess(
            name,
            s.absmax,
            largest[name],
            largest[name] / s.absmax,
            outside[name] / seen[name],
            lost[name] / energy[name],
        )
        for name, s in scales.items()
        if seen[name] and largest[name] > tolerance * s.absmax
    ]
    return sorted(found, key=lambda excess: -excess.ratio)


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
    model, everything = open_graph(graph_path), frozenset(scales)

    def logits(kept: frozenset[str]) -> NDArray[np.float32]:
        graph = quantised_model(model, scales, form, classifier, kept)
        session = CpuSession(ir.to_proto(graph), graph_path)
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
