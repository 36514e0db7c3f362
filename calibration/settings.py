"""What a calibration was asked for: precision, data budget, sites to leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Final

from hhdeploy.errors import PlanError

PRECISIONS: Final = ("int8", "fp8", "int8-weights")


@dataclass(frozen=True)
class CalibrationSettings:
    """One calibration, as asked for; JSON-able, part of the cache key.

    Attributes:
        precision: ``int8`` (activations and weights), ``fp8`` (E4M3, both) or ``int8-weights``.
        exclude: sites to keep in floating point: names or shell patterns (``blocks.0.*``,
            ``*.mlp.fc2``).
        preset: a name of `PRESETS`, whose patterns are added to ``exclude``.
        images: at most this many calibration images, over all adapters.
        seed: of the choice and order of the images.
        smooth_quant: SmoothQuant's alpha in [0, 1]; None leaves the weights as they are.
        bias_correction: let NNCF shift the biases by the mean error that quantisation causes.
    """

    precision: str = "int8"
    exclude: tuple[str, ...] = ()
    preset: str = "none"
    images: int = 128
    seed: int = 0
    smooth_quant: float | None = 0.95
    bias_correction: bool = True

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise PlanError(
                f"precision {self.precision!r}: expected one of {', '.join(PRECISIONS)}."
            )
        if self.preset not in PRESETS:
            raise PlanError(f"preset {self.preset!r}: expected one of {', '.join(PRESETS)}.")
        if self.images < 1:
            raise PlanError(f"images: expected 1 or more, found {self.images}.")
        if self.smooth_quant is not None and not 0.0 <= self.smooth_quant <= 1.0:
            raise PlanError(
                f"smooth_quant: expected a number from 0 to 1, or None, found {self.smooth_quant}."
            )

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "exclude": list(self.exclude)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CalibrationSettings:
        """Read the JSON form. Raises KeyError or `PlanError`."""
        values = {field.name: content[field.name] for field in fields(cls)}
        return cls(**{**values, "exclude": tuple(values["exclude"])})


# Sites that a preset keeps in floating point.
PRESETS: Final[Mapping[str, tuple[str, ...]]] = {"none": ()}


def excluded_sites(settings: CalibrationSettings, sites: tuple[str, ...]) -> frozenset[str]:
    """The sites of a graph that the settings keep in floating point.

    Raises:
        PlanError: a pattern of ``exclude`` fits no site (a typing error would otherwise quantise
            what was meant to be kept), or nothing is left to quantise.
    """
    for pattern in settings.exclude:
        if not any(fnmatchcase(site, pattern) for site in sites):
            raise PlanError(
                f"exclude {pattern!r} fits no site of the graph. Its sites are: {', '.join(sites)}."
            )
    patterns = (*settings.exclude, *PRESETS[settings.preset])
    kept = frozenset(s for s in sites if any(fnmatchcase(s, p) for p in patterns))
    if len(kept) == len(sites):
        raise PlanError(
            f"all {len(sites)} sites are excluded: nothing is left to quantise. Use the float32 "
            "graph, or exclude fewer."
        )
    return kept
