"""Do the activations of an adapter stay inside the calibrated ranges?

One calibration serves all adapters of a bank, and adapters that are added later change the
activations a little. What leaves the range of a quantiser is clipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hhdeploy.calibration.feeds import Feed
from hhdeploy.calibration.probe import Probe
from hhdeploy.calibration.qdq import Format
from hhdeploy.calibration.scales import SiteScale
from hhdeploy.graph import GraphLinear


@dataclass(frozen=True)
class RangeExcess:
    """A site whose activations left the calibrated range.

    Attributes:
        site: its name.
        calibrated: the range's largest magnitude (after smoothing).
        found: the largest magnitude met.
        ratio: found / calibrated.
        clipped: share of the values that are clipped.
    """

    site: str
    calibrated: float
    found: float
    ratio: float
    clipped: float

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
    seen = dict.fromkeys(sites, 0)
    for inputs in Probe(graph_path, sites).inputs(feeds):
        for name, x in inputs.items():
            scale = scales[name]
            magnitude = np.abs(x if scale.smooth is None else x * scale.smooth)
            largest[name] = max(largest[name], float(magnitude.max()))
            outside[name] += int(np.count_nonzero(magnitude > scale.absmax * form.reach))
            seen[name] += magnitude.size
    found = [
        RangeExcess(
            name, s.absmax, largest[name], largest[name] / s.absmax, outside[name] / seen[name]
        )
        for name, s in scales.items()
        if seen[name] and largest[name] > tolerance * s.absmax
    ]
    return sorted(found, key=lambda excess: -excess.ratio)
