"""How two adapters of one backbone differ, site by site."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hhdeploy.adapters.bases import other_answer
from hhdeploy.adapters.format import Adapter
from hhdeploy.algebra import Array
from hhdeploy.errors import AdapterError

# Of the configuration: what decides the numbers or the answers.
_KEYS = (
    *("base_model_name_or_path", "base_model_args", "base_sha256", "base_signs_sha256"),
    *("base_buffers_sha256", "form", "reflection", "r", "num_classes", "class_names"),
    *("preprocess", "problem_type"),
)


@dataclass(frozen=True)
class SiteDifference:
    """One site of two adapters; what one of them lacks counts as zero.

    Attributes:
        site: its name, ``head``, or the path of a whole parameter.
        norm_a, norm_b: Frobenius norm of all that each does there.
        cosine: of both changes; None where one of them is zero.
        distance: norm of the difference over the larger norm: 0 for equal ones.
    """

    site: str
    norm_a: float
    norm_b: float
    cosine: float | None
    distance: float


@dataclass(frozen=True)
class AdapterDifference:
    """Two adapters compared.

    Attributes:
        settings: key of the configuration -> both values, of those that differ.
        sites: in the order of the first adapter, then what only the second one has.
    """

    settings: dict[str, tuple[Any, Any]]
    sites: tuple[SiteDifference, ...]

    @property
    def equal(self) -> bool:
        """No setting and no number differs."""
        return not self.settings and not any(site.distance for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        """All of it, as `hhdeploy adapter diff --json` prints it."""
        return {
            "equal": self.equal,
            "settings": {key: list(values) for key, values in self.settings.items()},
            "sites": [asdict(site) for site in self.sites],
        }


def difference(one: Adapter, other: Adapter) -> AdapterDifference:
    """Compare what two adapters do: the change of every site, multipliers, biases and the head.

    Raises:
        AdapterError: a site of another size, so that they belong to different backbones.
    """
    mine, theirs = one.config.to_json(), other.config.to_json()
    both = {key: (mine.get(key), theirs.get(key)) for key in _KEYS}
    settings = {key: values for key, values in both.items() if values[0] != values[1]}
    if other_answer(one.config.base_answer, other.config.base_answer):  # never the same to the bit
        settings["base_answer"] = (mine["base_answer"], theirs["base_answer"])
    first, second = _changes(one), _changes(other)
    sites = [
        _compared(name, first.get(name, {}), second.get(name, {}))
        for name in dict.fromkeys((*first, *second))
    ]
    return AdapterDifference(settings, tuple(sites))


def _changes(adapter: Adapter) -> dict[str, dict[str, Array]]:
    """Site -> what is added there, by part; the identity counts as zero."""
    found: dict[str, dict[str, Array]] = {}
    for name in adapter.sites:
        change = adapter.change(name)
        parts: dict[str, Array] = {}
        if change.delta is not None:
            sequential = adapter.form == "sequential"
            delta = change.delta.minus_identity() if sequential else change.delta
            parts["product" if sequential else "sum"] = delta.dense()
        if change.scales.s_in is not None:
            parts["s_in"] = change.scales.s_in - 1.0
        if change.scales.s_out is not None:
            parts["s_out"] = change.scales.s_out - 1.0
        if change.db is not None:
            parts["db"] = change.db
        found[name] = parts
    found |= {path: {"value": v.astype(np.float64)} for path, v in adapter.values.items()}
    if adapter.head is not None:
        found["head"] = {
            "weight": adapter.head.weight.astype(np.float64),
            "bias": adapter.head.bias.astype(np.float64),
        }
    return found


def _compared(name: str, mine: dict[str, Array], theirs: dict[str, Array]) -> SiteDifference:
    square_a = square_b = product = square = 0.0
    for part in dict.fromkeys((*mine, *theirs)):
        shapes = {values[part].shape for values in (mine, theirs) if part in values}
        if len(shapes) > 1:
            if name == "head":
                return SiteDifference(name, _norm(mine), _norm(theirs), None, 1.0)
            raise AdapterError(
                f"{name}: expected sites of one size, found {' and '.join(map(str, shapes))}: the "
                "adapters belong to different backbones."
            )
        a = mine.get(part, np.zeros(next(iter(shapes))))
        b = theirs.get(part, np.zeros(next(iter(shapes))))
        square_a += float((a * a).sum())
        square_b += float((b * b).sum())
        product += float((a * b).sum())
        square += float(((a - b) ** 2).sum())
    norms = square_a**0.5, square_b**0.5
    larger = max(norms)
    cosine = product / (norms[0] * norms[1]) if min(norms) > 0 else None
    return SiteDifference(name, *norms, cosine, square**0.5 / larger if larger else 0.0)


def _norm(parts: dict[str, Array]) -> float:
    return float(sum((values * values).sum() for values in parts.values()) ** 0.5)
