"""What a calibration found: one frozen value that the graph writers read.

It belongs to the float32 graph and the data alone: every precision and every set of excluded
sites is written from the same scales, without running the images again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.calibration.settings import CalibrationSettings


@dataclass(frozen=True)
class SiteScale:
    """What is known about one site.

    The quantised product is ``Q(x ∘ smooth) (W / smooth)`` with x [..., in] and W [in, out].

    Attributes:
        absmax: the calibrated range of ``x ∘ smooth`` is [-absmax, absmax].
        smooth: SmoothQuant's factors, [in]; None: all ones.
        bias: the corrected bias, [out]; None: the graph's own stays.
    """

    absmax: float
    smooth: NDArray[np.float32] | None = None
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Calibration:
    """The scales of all sites of one float32 graph, and what they were found with.

    Attributes:
        sites: site name -> scales, in execution order.
        graph_sha256: of the graph's files.
        settings: as given; ``precision``, ``exclude`` and ``preset`` have no part in the scales.
        data: description of the images.
        warnings: what may make the scales wrong, in words.
        versions: of what found them.
    """

    sites: Mapping[str, SiteScale]
    graph_sha256: str
    settings: CalibrationSettings
    data: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranges(self) -> dict[str, float]:
        """Site name -> largest magnitude, after smoothing, that the activations may have."""
        return {name: scale.absmax for name, scale in self.sites.items()}
