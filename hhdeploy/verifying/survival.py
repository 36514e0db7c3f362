"""Whether an adapter survives a precision: in a folded weight, and in the logits.

A change smaller than half a step of a rounded weight is gone where the weights lie on the type's
own grid (those of a checkpoint in 16 bits do), and a side branch's where it is added to a rounded
product. Nothing else would tell: the logits are as close to the reference as those of the bare
backbone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.adapters.format import Adapter
from hhdeploy.algebra import Array, SiteChange, logit_change
from hhdeploy.backbones.sites import linear_spec
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import BANK_FILE
from hhdeploy.bundle.rounding import LEAST_LEFT, share_left
from hhdeploy.bundle.store import Progress
from hhdeploy.choices import QUANTISED, Precision, member
from hhdeploy.errors import PlanError, abbreviate
from hhdeploy.files.tensors import tensor_bytes
from hhdeploy.parity import NO_EFFECT
from hhdeploy.verifying.answers import logits_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from hhdeploy.calibration.judging.exam import Exam
    from hhdeploy.calibration.quantised import Quantised
    from hhdeploy.verifying.reference import Reference

# What helps where a precision is too coarse.
_FINER = "Use a finer precision, or train it further."


def check_folded(
    name: str,
    adapter: Adapter,
    model: ir.Model,
    precisions: Sequence[Precision],
    *,
    originals: Mapping[str, NDArray[np.floating]] = MappingProxyType({}),
    only: Collection[str] | None = None,
    refuse: bool = True,
) -> list[str]:
    """Lines about the weights whose change a precision rounds away, one a precision.

    Args:
        name: of the adapter, for messages.
        adapter: that is in the graph's weights.
        model: its float32 graph.
        precisions: of graphs of it; float32 itself too.
        originals: of the parameters that the adapter replaces, the backbone's values, by path.
            Where they are not known any more, nothing is said of them.
        only: sites, as quantised graphs name them, that are low in that graph; None: all.
        refuse: False: an adapter that is rounded away is said too.

    Raises:
        PlanError: a precision rounds away all that the adapter does to the backbone.
    """
    lost: dict[Precision, list[str]] = {precision: [] for precision in precisions}
    count = 0
    # One weight after the other: in float64 all of them are twice the model. And every one once
    # for all precisions: a weight of a new graph is folded whenever it is read.
    for place, before, after in chain(_folded(adapter, model, only), _replaced(adapter, originals)):
        change = after - before
        count += bool(change.any())
        for precision, places in lost.items():
            left = _rounded(after, precision, after) - _rounded(before, precision, after)
            if share_left(change, left) < LEAST_LEFT:
                places.append(place)
    for precision, places in lost.items():
        if refuse and places and len(places) == count:
            raise PlanError(
                f"adapter {name!r}: {precision} rounds all of its change of the weights away: "
                f"{abbreviate(places)}. {_FINER}"
            )
    return [
        f"adapter {name!r}: {precision} rounds away its change of {abbreviate(places)}"
        for precision, places in lost.items()
        if places
    ]


def _folded(
    adapter: Adapter, model: ir.Model, only: Collection[str] | None
) -> Iterator[tuple[str, Array, Array]]:
    """Every site with what its weight was before the adapter, and is, float64 (out, in)."""
    from hhdeploy.graph import linears_by_path  # onnx: not for those who only import the package

    for path, uses in linears_by_path(model.graph).items():
        linear, start = uses[0], 0
        if only is not None and linear.name not in only:
            continue
        weight = linear.weight
        for site in linear_spec(path, *weight.shape).sites:
            rows = slice(start, start + site.out)
            start += site.out
            if site.name not in adapter.sites:
                continue
            after = weight[rows].astype(np.float64)
            before = _undone(adapter, adapter.change(site.name), after)
            if before is not None:
                yield site.name, before, after


def _undone(adapter: Adapter, change: SiteChange, after: Array) -> Array | None:
    """The weight before an adapter; None where it cannot be told (it was multiplied by zero)."""
    before: Array = after
    if change.delta is not None:
        matrix = change.delta.dense()
        if adapter.form == "sequential":
            try:
                before = np.linalg.solve(matrix, after).astype(np.float64)
            except np.linalg.LinAlgError:
                return None
        else:
            before = after - matrix
    scales = change.scales
    for factor in (scales.s_in, None if scales.s_out is None else scales.s_out[:, None]):
        if factor is not None:
            if not factor.all():
                return None
            before = before / factor
    return before


def _replaced(
    adapter: Adapter, originals: Mapping[str, NDArray[np.floating]]
) -> Iterator[tuple[str, Array, Array]]:
    for path, before in originals.items():
        frozen = before.astype(np.float64)
        yield path, frozen, adapter.replaced(path, frozen)


def _rounded(values: Array, precision: Precision, scaled_by: Array) -> Array:
    """Values as a precision holds them; a quantised one by the largest of each row."""
    narrow = values.astype(np.float32)
    if precision == "float32":
        return narrow.astype(np.float64)
    quantised = member(QUANTISED, precision)
    if quantised is None:
        import ml_dtypes

        dtype = np.float16 if precision == "float16" else ml_dtypes.bfloat16
        return narrow.astype(dtype).astype(np.float64)
    from hhdeploy.calibration.qdq import FORMATS, low_values

    form = FORMATS[quantised]
    if values.ndim < 2:
        return narrow.astype(np.float64)
    axes = tuple(range(1, values.ndim))
    step = np.abs(scaled_by).max(axis=axes, keepdims=True) / form.largest
    step[step == 0] = 1.0
    units: Array = low_values((values / step).astype(np.float32), form).astype(np.float64)
    units *= step
    return units


class Effects:
    """What every adapter does to the logits, in float32 and as each other precision shows it.

    Only of side branches whose bank is an input: their change can be left out of a row.
    """

    def __init__(self, bundle: Bundle, images: NDArray[np.float32], names: Sequence[str]) -> None:
        """Measure nothing yet.

        Args:
            bundle: with the float32 graph.
            images: float32 [n, 3, H, W].
            names: n adapters.
        """
        self._bundle, self._images, self._names = bundle, images, names
        self._entries = {a.name: a for a in bundle.manifest.adapters if a.name in names}
        self._found: dict[Precision, NDArray[np.float64]] = {}

    @classmethod
    def of_reference(cls, bundle: Bundle, reference: Reference | None = None) -> Effects:
        """On an image each of the adapters in a reference (None: the bundle's); of others than
        bundles with side branches it has no adapter, and nothing to say."""
        manifest = bundle.manifest
        if reference is None:
            images, ids, _ = bundle.reference()
        else:
            images, ids = reference.images, reference.adapter_ids
        if manifest.layout is None or manifest.bank_as_constant:
            return cls(bundle, images[:0], ())
        first = {a.name: np.flatnonzero(ids == a.row) for a in manifest.adapters}
        chosen = {name: int(found[0]) for name, found in first.items() if len(found)}
        return cls(bundle, images[list(chosen.values())], list(chosen))

    def measure(self, shown: Bundle, run: Precision, precision: Precision) -> None:
        """Run the adapters in a graph: for `verify_graphs`, which has rounding twins at hand.

        Args:
            shown: the bundle whose graph is run.
            run: that graph's precision: of a twin, float32.
            precision: that it shows.
        """
        if self._names and precision != "float32":
            self._found[precision] = self._moved(shown, run)

    def lines(self, precisions: Sequence[Precision], *, refuse: bool = True) -> list[str]:
        """Lines about adapters that move the logits no more than rounding does.

        Args:
            precisions: of what was measured; of float32 there is nothing to say.
            refuse: False: an adapter that is rounded away is said too.

        Raises:
            PlanError: an adapter moves no logit in a precision, and does in float32.
        """
        wanted = [precision for precision in precisions if precision != "float32"]
        if not wanted or not self._names:
            return []
        exact = self._moved(self._bundle, "float32")
        lines = []
        for precision in wanted:
            for name, entry in self._entries.items():
                own = [i for i, other in enumerate(self._names) if other == name]
                columns = slice(entry.classes or None)  # without logits: all features
                right, found = exact[own, columns], self._found[precision][own, columns]
                lines.append(_judged(name, precision, right, found, refuse))
        return [line for line in lines if line]

    def _moved(self, bundle: Bundle, precision: Precision) -> NDArray[np.float64]:
        """What the adapters move the logits by, their classifiers left as they are."""
        rows = {name: entry.row or 0 for name, entry in self._entries.items()}
        ids = np.asarray([rows[name] for name in self._names], np.int64)
        both = [
            logits_of(one, "cpu", precision, self._images, ids, rows)[0]
            for one in (bundle, _without_changes(bundle))
        ]
        return logit_change(*both)


def check_quantised(bundle: Bundle, quantised: Quantised, exam: Exam) -> list[str]:
    """What `check_folded` or `Effects`, on an image of each adapter, says of a calibration.

    Args:
        bundle: with the graph, on trial.
        quantised: how it came about.
        exam: images that it is judged on.

    Raises:
        PlanError: nothing is left of an adapter.
    """
    from hhdeploy.graph import open_graph

    manifest, precision = bundle.manifest, quantised.precision
    if manifest.whole or manifest.bank_as_constant:
        return []
    if manifest.layout is None:
        (entry,) = manifest.adapters
        adapter, model = bundle.load_adapter(entry.name), open_graph(bundle.graph("float32"))
        low = {name for name, site in quantised.sites.items() if site.quantised}
        return check_folded(entry.name, adapter, model, [precision], only=low)
    first = {q.adapter: q for q in reversed(exam.questions) if q.adapter not in (None, BACKBONE)}
    if not first:
        return []
    images = np.stack([question.load() for question in first.values()])
    effects = Effects(bundle, images, [str(name) for name in first])
    effects.measure(bundle, precision, precision)
    return effects.lines([precision])


def say(progress: Progress, lines: Iterable[str | None]) -> None:
    """Every line that there is, as a step."""
    for line in lines:
        if line:
            progress(line)


def _without_changes(bundle: Bundle) -> Bundle:
    """A bundle whose rows hold the adapters' classifiers alone: to be read, never committed."""
    layout, name = bundle.manifest.layout, bundle.manifest.named(BANK_FILE)
    assert layout is not None
    bank = bundle.bank().copy()
    for row in bank:
        for part, view in layout.views(row).items():
            if not part.startswith("head."):
                view[:] = 0.0
    return replace(bundle, held={**bundle.held, name: tensor_bytes({"adapter_bank": bank})})


def _judged(
    name: str,
    precision: Precision,
    exact: NDArray[np.float64],
    found: NDArray[np.float64],
    refuse: bool,
) -> str | None:
    largest = float(np.abs(exact).max(initial=0.0))
    if largest == 0.0:
        return None  # a classifier alone
    if float(np.abs(found).max()) <= NO_EFFECT * largest:
        line = (
            f"adapter {name!r}: {precision} rounds all of it away: it moves no logit there (up to "
            f"{largest:.1e} in float32)"
        )
        if refuse:
            raise PlanError(f"{line}. {_FINER}")
        return line
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    if error < 1.0:
        return None
    return (
        f"adapter {name!r}: rounding in {precision} moves the logits as much as the adapter does "
        f"({error:.1f} times its {largest:.1e})"
    )
