"""The accuracy guard: as few sites in floating point as keep the accuracy.

Sites are ordered by how much noise each of them alone adds; the search is over prefixes of that
order. Doubling brackets the answer and bisection finds it, so n sites cost about 2 log2(n)
graphs instead of n. A prefix that passes is only known to be the shortest as far as longer
prefixes drop less, which accuracy does but for chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hhdeploy.calibration.judging.exam import Exam
from hhdeploy.choices import as_float
from hhdeploy.errors import ParityError, PlanError

# Sites to keep in floating point -> drop of mean top-1, in points.
DropOf = Callable[[tuple[str, ...]], float]


@dataclass(frozen=True)
class Trial:
    """One graph that was tried.

    Attributes:
        kept: how many sites stayed in floating point.
        drop: of mean top-1, in points.
        passed: within the bound.
    """

    kept: int
    drop: float
    passed: bool


@dataclass(frozen=True)
class Guarded:
    """What the guard decided.

    Attributes:
        max_drop: the bound, in points of mean top-1.
        kept: sites that stay in floating point, the most sensitive first.
        trials: the graphs that were tried, in order.
    """

    max_drop: float
    kept: tuple[str, ...]
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """The guard entry of a calibration's JSON."""
        return {
            "max_drop": self.max_drop,
            "kept": list(self.kept),
            "trials": [asdict(trial) for trial in self.trials],
        }


def check_bound(max_drop: float, exam: Exam) -> None:
    """The images to judge on can tell whether the bound is kept.

    Raises:
        PlanError: no bound, or images without true classes, or those that were calibrated on.
    """
    if not as_float(max_drop) >= 0:
        raise PlanError(f"`max_drop`: expected points of top-1, 0 or more, found {max_drop!r}.")
    if not exam.has_classes:
        raise PlanError(
            f"`max_drop={max_drop:g}` bounds top-1, and the adapters of {exam.source} answer with "
            "labels or values. Keep sites in floating point with `exclude`."
        )
    if exam.undecided:
        whose = _of(exam.undecided)
        raise PlanError(
            f"`max_drop={max_drop:g}` needs true classes{whose}, which has no class names, and the "
            f"numbers that the folders of {exam.source} have may be sorted as numbers or as text: "
            "float32 answers neither clearly better. Pass more images as `eval_data`, or write the "
            "names of the classes into its adapter_config.json and add the adapter anew."
        )
    if untold := tuple(dict.fromkeys((*exam.unjudged, *exam.untold))):
        whose = _of(untold)
        why = "".join(f"; {reason}" for reason in exam.reasons)
        raise PlanError(
            f"`max_drop={max_drop:g}` needs true classes{whose}, which {exam.source} does not "
            f"tell{why}. Pass `eval_data`: DIR/CLASS/image, of side branches "
            "DIR/ADAPTER/CLASS/image."
        )
    if not exam.held_out:
        raise PlanError(
            f"`max_drop={max_drop:g}` needs images that calibration does not use; of "
            f"{exam.source} none is left. Pass others as `eval_data`, or fewer `images`."
        )


def _of(names: Iterable[str | None]) -> str:
    """Whose, for a message; None, which has no name, is left out."""
    named = ", ".join(name for name in names if name)
    return f" of {named}" if named else ""


def most_sensitive_first(sqnr_db: Mapping[str, float]) -> tuple[str, ...]:
    """Sites by the noise that each alone adds; ties keep the order of execution."""
    return tuple(sorted(sqnr_db, key=lambda site: sqnr_db[site]))


def guard(rank: Callable[[], Sequence[str]], drop_of: DropOf, max_drop: float) -> Guarded:
    """Find the shortest prefix of the ranked sites to keep in floating point.

    Args:
        rank: gives the sites, most sensitive first; called only if some have to be kept.
        drop_of: writes the graph and measures it; called once for every prefix that is tried.
        max_drop: points of mean top-1 that may be lost.

    Raises:
        ParityError: with a single site quantised the drop is still larger.
    """
    trials: list[Trial] = []

    def passes(sites: Sequence[str]) -> bool:
        drop = drop_of(tuple(sites))
        trials.append(Trial(len(sites), drop, drop <= max_drop))
        return trials[-1].passed

    if passes(()):
        return Guarded(max_drop, (), tuple(trials))
    order = rank()
    most = len(order) - 1  # something has to be quantised
    failing, kept = 0, min(1, most)
    while not passes(order[:kept]):
        if kept == most:
            raise ParityError(
                f"`max_drop={max_drop:g}`: with all but one of the {len(order)} sites in floating "
                f"point the mean top-1 still drops by {trials[-1].drop:.2f} points. Allow a larger "
                "drop, pass more images as `eval_data` (one image may be more than the bound), "
                "or use float16."
            )
        failing, kept = kept, min(2 * kept, most)
    while kept - failing > 1:
        middle = (failing + kept) // 2
        if passes(order[:middle]):
            kept = middle
        else:
            failing = middle
    return Guarded(max_drop, tuple(order[:kept]), tuple(trials))
