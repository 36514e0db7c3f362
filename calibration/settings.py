"""What a calibration was asked for: precision, data budget, sites to leave alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Final

from hhdeploy.choices import (
    QUANTISED,
    QuantisedPrecision,
    as_float,
    as_seed,
    listed,
    one_of,
    whole,
    yes_or_no,
)
from hhdeploy.errors import OptionError, PlanError, abbreviate


@dataclass(frozen=True)
class CalibrationSettings:
    """One calibration, as asked for; JSON-able, part of the cache key.

    Attributes:
        precision: ``int8`` (activations and weights), ``fp8`` (E4M3, both) or ``int8-weights``.
        exclude: sites to keep in floating point: names or shell patterns (``blocks.0.*``,
            ``*.mlp.fc2``).
        preset: a name of `PRESETS`; what it keeps is kept besides ``exclude``.
        images: at most this many calibration images, over all adapters.
        seed: of the choice and order of the images.
        smooth_quant: SmoothQuant's alpha in [0, 1]: how much of the spread between channels moves
            from the activations into the weights; None: nothing. 0.7 was best on the starter
            models (0.7 / 0.95 / None: 37.8 / 37.3 / 33.0 dB in int8, 29.7 / 28.2 / 29.1 in fp8).
        bias_correction: let NNCF shift the biases by the mean error that quantisation causes.
    """

    precision: QuantisedPrecision = "int8"
    exclude: tuple[str, ...] = ()
    preset: str = "none"
    images: int = 128
    seed: int = 0
    smooth_quant: float | None = 0.7
    bias_correction: bool = True

    def __post_init__(self) -> None:
        one_of(QUANTISED, self.precision, "precision")
        one_of(PRESETS, self.preset, "preset")
        object.__setattr__(self, "exclude", tuple(listed(self.exclude, "exclude", "patterns")))
        object.__setattr__(self, "images", whole(self.images, "images", 1))
        object.__setattr__(self, "seed", as_seed(self.seed))
        correct = yes_or_no(self.bias_correction, "bias_correction")
        object.__setattr__(self, "bias_correction", correct)
        if (alpha := self.smooth_quant) is not None:
            if not 0.0 <= as_float(alpha) <= 1.0:
                raise OptionError(
                    f"`smooth_quant`: expected a number from 0 to 1, or None, found {alpha!r}."
                )
            # NumPy's cannot be written as JSON.
            object.__setattr__(self, "smooth_quant", float(alpha))

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "exclude": list(self.exclude)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CalibrationSettings:
        """Read the JSON form. Raises KeyError or `PlanError`."""
        values = {field.name: content[field.name] for field in fields(cls)}
        return cls(**{**values, "exclude": tuple(values["exclude"])})


# What a preset keeps in floating point. `robust` took held-out images of the starter models from
# 37.8 to 42.9 dB (side branches) and from 35.7 to 41.5 dB (folded), for 1/6 of the arithmetic of
# a model of 12 blocks; keeping every attn.proj and mlp.fc2 instead, 5/12 of it, gave less.
PRESETS: Final[Mapping[str, str]] = {
    "none": "nothing",
    "robust": "the first and the last block",
}


def excluded_sites(settings: CalibrationSettings, sites: Sequence[str]) -> frozenset[str]:
    """The sites of a graph, in execution order, that the settings keep in floating point.

    Raises:
        PlanError: a pattern of ``exclude`` fits no site (a typing error would otherwise quantise
            what was meant to be kept), or nothing is left to quantise.
    """
    ends = {_block(sites[0]), _block(sites[-1])} if settings.preset == "robust" else set()
    kept = {site for site in sites if _block(site) in ends}
    for pattern in settings.exclude:
        fitting = {site for site in sites if fnmatchcase(site, pattern)}
        if not fitting:
            raise PlanError(
                f"`exclude=[{pattern!r}]` fits no site of the graph. Its sites are: "
                f"{abbreviate(sites, 12)}."
            )
        kept |= fitting
    if len(kept) == len(sites):
        fewer = "take `preset='none'`" if ends else "`exclude` fewer"
        raise PlanError(
            f"all {len(sites)} sites are kept in floating point: nothing is left to quantise. Use "
            f"the float32 graph, or {fewer}."
        )
    return frozenset(kept)


def _block(site: str) -> str:
    """``blocks.3`` of ``blocks.3.mlp.fc1``: up to the last number of the path."""
    parts = site.split("@")[0].split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else site
