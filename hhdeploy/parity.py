"""Parity: how outputs are compared, and the one table of what is allowed.

The ladder: training-time model (float64) = folded weights = side branch = bank row = graph in a
runtime = engine. Every rung compares logits; top-1 alone sees no wrong reflection or swapped sides.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hhdeploy.choices import CLASSES as CLASSES
from hhdeploy.choices import LABELS as LABELS
from hhdeploy.choices import VALUES as VALUES
from hhdeploy.choices import Precision, Runner
from hhdeploy.choices import ProblemType as ProblemType


@dataclass(frozen=True)
class Bound:
    """What a stage may differ from the training-time model, at most.

    Attributes:
        range_error: max abs error over the range (max - min) of the reference logits.
        cosine: least cosine of an image's logits with the reference's; not asked of values.
        top1: of classes: least share of images with the same top-1, near ties not counted: where
            the reference's own answer is ahead of the one found by at most ``range_error`` of the
            range, an error that the bound allows in one logit alone decides. With the few images
            of a verification one such image would be a share far below any bound. A clear answer
            that is lost counts however few the images are.
        measured: the largest range_error seen, on what.
        reason: why the bound is where it is.
    """

    range_error: float
    cosine: float
    top1: float
    measured: str
    reason: str


# PEFT's merged model against its unmerged one in float64: DEFT 4e-8, the rest below 1e-9.
PEFT_MERGE_BOUND = 1e-6
# What a compressed adapter may lose before somebody has to accept it: less than 8 bits do.
COMPRESSION_BOUND = 1e-2
NO_EFFECT = 1e-8  # of the logits' range: what float32 rounds away is none
ROW_BOUND = 1e-5  # of a row's largest value: float64 sums of another order, in float32
# Of a frozen tensor's norm: averaging (EMA) rounds 3e-6 at a decay of 0.999, 4e-5 at 0.9999.
AVERAGING_BOUND = 1e-4

# Shares of images that add up to 1 in float64.
_ROUNDING = 1e-12
# Of the largest value of a regression, where its values do not differ more.
_LEAST_RANGE = 0.01
_FLOAT32 = (
    "float32 rounding through 12 to 48 layers, summation order differs between runtimes; real "
    "backbones with outlier activations round more than random ones"
)
_QUANTISED = (
    "rounding to 8 bits at every site; catches a graph that is broken or far out of its ranges on "
    "a few real images, while accuracy is judged on many (see hhdeploy.calibration.judging)"
)
_NO_GPU = "not measured yet: no GPU has run it"
_KERNELS = "as the twin; kernels may accumulate in less than float32"
_CALIBRATED = "as the quantised graph; accuracy is judged when calibrating"
_H100 = "with ONNX Runtime on an H100, ViT-S/16, random adapters; no engine has run"

# Of 255, what a graph that resizes a picture may be off from Pillow; earlier versions' need it.
LEVELS: Mapping[str, int] = {"shrinks": 1, "grows": 2}

# (stage, precision) -> bound. Stages: `algebra` (float64 algebra against dense products),
# `folded` (one adapter in the weights), `branches` (mixed batch of side branches), `openvino`
# (either graph in OpenVINO), `pictures` (a graph made its images), `twin` (rounding twin of a typed
# graph), `quantised` (Q/DQ graph), `engine` (a graph on a GPU, or a TensorRT engine).
PARITY: Mapping[tuple[str, str], Bound] = {
    ("algebra", "float64"): Bound(
        1e-12, 1 - 1e-12, 1.0, "4e-15, ranks 0 to 4, 7 x 13 to 768 x 768", "float64 rounding"
    ),
    ("algebra", "float32"): Bound(
        1e-6, 1 - 1e-10, 1.0, "6e-8: one cast", "computed in float64 and cast once to float32"
    ),
    ("folded", "float32"): Bound(
        1e-4, 1 - 1e-6, 1.0, "2.4e-6: 32 architectures, random adapters", _FLOAT32
    ),
    ("branches", "float32"): Bound(
        1e-4, 1 - 1e-6, 1.0, "4.1e-6: 32 architectures, random adapters", _FLOAT32
    ),
    ("openvino", "float32"): Bound(1e-4, 1 - 1e-6, 1.0, "1e-6", _FLOAT32),
    ("openvino", "bfloat16"): Bound(
        1e-1,
        0.999,
        0.97,
        "9e-3 on the starter models (1.3e-2 over all their 366 images)",
        "the float32 graph computed in bfloat16: as the twin, but OpenVINO chooses where it rounds",
    ),
    ("pictures", "float32"): Bound(1e-3, 1 - 1e-5, 1.0, "0; before 1.5e-4", "values a level off"),
    ("twin", "float16"): Bound(
        2e-2,
        0.9999,
        0.995,
        "7e-4 on the starter models",
        "10 bits of mantissa after every operation outside the float32 islands",
    ),
    ("twin", "bfloat16"): Bound(
        1e-1,
        0.999,
        0.97,
        "1e-2 on ViT-Ti, random adapters",
        "7 bits of mantissa after every operation outside the float32 islands",
    ),
    ("quantised", "int8"): Bound(
        0.15, 0.95, 0.5, "2.1e-2 (cosine 0.9985) on the starter models", _QUANTISED
    ),
    ("quantised", "fp8"): Bound(
        0.15, 0.95, 0.5, "3.6e-2 (cosine 0.993) on the starter models", _QUANTISED
    ),
    ("quantised", "int8-weights"): Bound(
        0.1, 0.97, 0.5, "1.1e-2 (cosine 0.9996) on the starter models", _QUANTISED
    ),
    ("engine", "float32"): Bound(
        1e-3,
        1 - 1e-5,
        1.0,
        f"7.7e-7 {_H100}",
        "float32 without TF32; fused kernels sum in another order and use fast exponentials",
    ),
    ("engine", "float16"): Bound(2e-2, 0.9999, 0.995, f"2.0e-3 {_H100}", _KERNELS),
    ("engine", "bfloat16"): Bound(1e-1, 0.999, 0.97, f"2.1e-2 {_H100}", _KERNELS),
    ("engine", "int8"): Bound(0.15, 0.95, 0.5, f"2.7e-2 {_H100}", _CALIBRATED),
    ("engine", "fp8"): Bound(0.15, 0.95, 0.5, _NO_GPU, _CALIBRATED),
    ("engine", "int8-weights"): Bound(0.1, 0.97, 0.5, _NO_GPU, _CALIBRATED),
}


@dataclass(frozen=True)
class Comparison:
    """Figures of one comparison over N images; -inf padding is left out of all of them.

    Attributes:
        images: N.
        max_abs: largest absolute error.
        range_error: max_abs over the range of the reference logits.
        max_rel: largest error relative to the image's own largest logit.
        cosine: least cosine of an image; None of values: of one number it is its sign alone.
        sqnr_db: signal-to-quantisation-noise ratio over all logits, in dB.
        top1: share of images whose arg max agrees; None where it is no answer (labels, values).
        worst_image: index of the image with the largest error.
        lost_margins: of every image whose arg max differs: how far the reference's answer is
            ahead of the one found in the reference's logits, over their range.
    """

    images: int
    max_abs: float
    range_error: float
    max_rel: float
    cosine: float | None
    sqnr_db: float
    top1: float | None
    worst_image: int
    lost_margins: tuple[float, ...] = ()

    def near_ties(self, bound: Bound) -> int:
        """Images whose arg max differs by no more than ``bound`` allows one logit."""
        return sum(margin <= bound.range_error for margin in self.lost_margins)

    def failures(self, bound: Bound) -> list[str]:
        """Which figures are outside ``bound``, in words; empty if all are inside."""
        found = []
        # Written so that NaN fails.
        if not self.range_error <= bound.range_error:
            found.append(
                f"max abs error {self.max_abs:.3g} is {self.range_error:.3g} of the logits' range "
                f"(at most {bound.range_error:.3g})"
            )
        if self.cosine is not None and not self.cosine >= bound.cosine:
            found.append(f"cosine {self.cosine:.6f} (at least {bound.cosine:.6f})")
        if self.top1 is not None:
            agreement = self.top1 + self.near_ties(bound) / self.images
            if not agreement >= bound.top1 - _ROUNDING:
                found.append(
                    f"top-1 agreement {agreement:.2%} (at least {bound.top1:.2%}; near ties count "
                    "as agreement)"
                )
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON without infinities or NaN: those become strings."""
        figures = asdict(self)
        margins = list(figures.pop("lost_margins"))
        finite = {
            k: v if v is None or isinstance(v, int) or math.isfinite(v) else str(v)
            for k, v in figures.items()
        }
        return {**finite, "lost_margins": margins}


def stage_of(kind: str, device: Runner, precision: Precision) -> str:
    """Which stage of the table judges a graph that a device computed.

    What a GPU computes is compared as it is; a CPU computes typed graphs in float32, so it shows
    their rounding twin. OpenVINO's bfloat16 is its own.

    Args:
        kind: of the bundle, ``folded`` or ``branches``.
        device, precision: what really ran, and of which graph.
    """
    if device not in ("cpu", "openvino"):
        return "engine"
    if device == "openvino" and precision in ("float32", "bfloat16"):
        return "openvino"
    if precision == "float32":
        return kind
    return "twin" if ("twin", precision) in PARITY else "quantised"


def bound(stage: str, precision: Precision | Literal["float64"]) -> Bound:
    """The bound of a stage. Raises KeyError for a pair that the table does not hold."""
    return PARITY[stage, precision]


def compare(
    reference: NDArray[Any], found: NDArray[Any], problem_type: ProblemType = CLASSES
) -> Comparison:
    """Compare logits [N, classes] with the reference's, in float64.

    Of classes the answers are compared too, of classes and labels an image's direction; values
    (a regression, or a head of one output) only by their error over the range of all images. Where
    they hardly differ (an age of 40 on any noise) that range is at least 1 % of the largest: their
    own rounding would be all of it. Of a single number it is the number.

    Columns that are -inf in the reference (padding past an adapter's classes) must be -inf in
    ``found`` too; any other pattern, or NaN, gives infinite error.
    """
    if reference.shape != found.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, found {found.shape}")
    real = reference.astype(np.float64)
    ours = found.astype(np.float64)
    kept = ~np.isneginf(real)
    single = not (kept.sum(axis=1) > 1).any()
    classes = problem_type == CLASSES and not single
    directed = problem_type != VALUES and not single
    if not np.array_equal(np.isneginf(ours), ~kept) or not np.isfinite(ours[kept]).all():
        bad = np.any(np.isneginf(ours) == kept, axis=1) | np.any(kept & ~np.isfinite(ours), axis=1)
        worst = int(np.argmax(bad))
        lost_all = (-1.0 if directed else None, -math.inf, 0.0 if classes else None)
        return Comparison(len(real), math.inf, math.inf, math.inf, *lost_all, worst)
    signal, values = np.where(kept, real, 0.0), np.where(kept, ours, 0.0)
    error = np.abs(signal - values)
    spread = float(np.ptp(real[kept])) if kept.any() else 0.0
    if not directed:
        share = 1.0 if kept.sum() == 1 else _LEAST_RANGE
        spread = max(spread, share * float(np.abs(real[kept]).max(initial=0.0)))
    largest = np.max(np.abs(signal), axis=1)
    max_abs = float(error.max(initial=0.0))
    noise = float(np.sum(error**2))
    answers, others = np.argmax(real, axis=1), np.argmax(ours, axis=1)
    lost = np.flatnonzero(answers != others) if classes else np.zeros(0, np.int64)
    margins = real[lost, answers[lost]] - real[lost, others[lost]]
    return Comparison(
        images=len(real),
        max_abs=max_abs,
        range_error=_ratio(max_abs, spread),
        max_rel=float(
            np.max([_ratio(e, m) for e, m in zip(error.max(axis=1), largest, strict=True)])
        ),
        cosine=float(np.min(_cosines(signal, values))) if directed else None,
        sqnr_db=10 * math.log10(float(np.sum(signal**2)) / noise)
        if noise and signal.any()
        else math.inf,
        top1=1 - len(lost) / len(real) if classes else None,
        worst_image=int(np.argmax(error.max(axis=1))),
        lost_margins=tuple(_ratio(float(margin), spread) for margin in margins),
    )


def _ratio(part: float, whole: float) -> float:
    if part == 0.0:
        return 0.0
    return float(part / whole) if whole else math.inf


def _cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = np.sum(a * b, axis=1)
    same = np.all(a == b, axis=1)
    return np.where(same, 1.0, dots / np.where(norms == 0.0, 1.0, norms))


@dataclass(frozen=True)
class StageResult:
    """One line of a parity report.

    Attributes:
        stage: key of `PARITY`, first part.
        precision: key of `PARITY`, second part.
        runtime: what computed it, e.g. ``onnxruntime cpu``.
        adapter: whose images.
        comparison: the figures.
        failures: what is outside the bound.
        overflow: where a typed graph's values left the range of its type, and what to do; empty
            if they did not.
        output: of the graph, ``logits``, ``features`` or ``tokens``.
    """

    stage: str
    precision: Precision
    runtime: str
    adapter: str
    comparison: Comparison
    failures: tuple[str, ...]
    overflow: str = ""
    output: str = "logits"

    @classmethod
    def of(
        cls,
        stage: str,
        precision: Precision,
        runtime: str,
        adapter: str,
        comparison: Comparison,
        overflow: str = "",
    ) -> StageResult:
        """Judge a comparison by the table."""
        failures = tuple(comparison.failures(bound(stage, precision)))
        return cls(stage, precision, runtime, adapter, comparison, failures, overflow)

    def to_json(self) -> dict[str, Any]:
        """The line in parity.json."""
        limits = bound(self.stage, self.precision)
        return {
            "stage": self.stage,
            "precision": self.precision,
            "runtime": self.runtime,
            "adapter": self.adapter,
            **({"output": self.output} if self.output != "logits" else {}),
            **self.comparison.to_json(),
            "bound": {key: getattr(limits, key) for key in ("range_error", "cosine", "top1")},
            "passed": not self.failures,
            **({"overflow": self.overflow} if self.overflow else {}),
        }


@dataclass(frozen=True)
class ParityReport:
    """All stages of one verification.

    Attributes:
        data: what the images were: ``{"kind": "noise", "seed": ...}`` or a folder.
        stages: the results.
        pictures: see `hhdeploy.verifying.pictures.check_pictures`.
    """

    data: Mapping[str, Any]
    stages: Sequence[StageResult]
    pictures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def overflowed(self) -> tuple[Precision, ...]:
        """Precisions that cannot hold the model's values: what failed in them has no other
        cause."""
        failed = [s for s in self.stages if s.failures]
        other = {s.precision for s in failed if not s.overflow}
        return tuple(dict.fromkeys(s.precision for s in failed if s.precision not in other))

    def without(self, precisions: Collection[Precision]) -> ParityReport:
        """The report of the other graphs."""
        stages = [s for s in self.stages if s.precision not in precisions]
        return ParityReport(self.data, stages, self.pictures)

    @property
    def passed(self) -> bool:
        """True if every stage is within its bound (and there is at least one)."""
        return bool(self.stages) and all(not s.failures for s in self.stages)

    def to_json(self) -> dict[str, Any]:
        """parity.json."""
        return {
            "schema_version": 1,
            "passed": self.passed,
            "reference": "PyTorch training-time model, float64",
            "data": dict(self.data),
            "stages": [s.to_json() for s in self.stages],
            **({"pictures": self.pictures} if self.pictures else {}),
        }

    def explain_failures(self) -> str:
        """One line a failed stage, for an error message."""
        return "\n".join(
            f"  {s.stage} {s.precision} ({s.runtime}), adapter {s.adapter}"
            f"{'' if s.output == 'logits' else f', {s.output}'}: "
            f"{s.overflow or '; '.join(s.failures)}"
            for s in self.stages
            if s.failures
        )
