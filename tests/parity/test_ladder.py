"""The ladder on one small variant of each architecture, and on models of real size.

float64 training-time model = folded graph = mixed batch of side branches, row 0 = backbone to
the bit, A -> B -> A = A to the bit; and the mistakes that must be seen.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import pytest

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.errors import HhdeployError
from hhdeploy.exporters.fold import folded_model
from hhdeploy.exporters.trace import base_graph
from hhdeploy.parity import Comparison, bound, compare
from hhdeploy.plan import Reserve, plan_branches
from tests.parity.architectures import (
    FAST,
    OTHERS,
    OTHERS_SLOW,
    REAL,
    REFUSED,
    SHARED,
    SLOW,
    Architecture,
    small,
    traced,
)
from tests.parity.ladder import (
    Rungs,
    folded_without_bias,
    ladder_adapters,
    mistaken_rows,
    run,
    rungs,
    scaled_adapters,
    session,
)

SMALL = [name for name in SHARED if name != "zero bias"]
# ‖u‖² of 0.6 to 5 with 96 to 768 features.
REAL_SCALE = 0.08
# Where attention is nearly flat, u and v swapped at q and v show with larger values alone.
SCALES = {"twins pcpvt": 1.0, "mobilevit": 1.0}
REAL_ADAPTERS = ("every", "thirds", "after")


@dataclass
class Ladder:
    """The rungs of one architecture and the sessions that its tests share."""

    name: str
    rungs: Rungs
    scaled: Rungs
    bare: ort.InferenceSession
    branched: ort.InferenceSession
    measured: dict[str, float]

    def judge(self, stage: str, comparison: Comparison) -> None:
        """Within the table; the worst error goes into the report."""
        worst = self.measured.get(stage, 0.0)
        self.measured[stage] = max(worst, comparison.range_error)
        assert not comparison.failures(bound(stage, "float32")), (self.name, comparison)


def build(name: str) -> tuple[Rungs, Rungs, int]:
    """The rungs, those of adapters with s_in, s_out and db, and the threads of a session."""
    if name in REAL:
        backbone = small(REAL[name])
        base = base_graph(backbone, None)
        every, scaled = ladder_adapters(base, REAL_SCALE), scaled_adapters(base, REAL_SCALE)
        plain = rungs(backbone, base, {n: every[n] for n in REAL_ADAPTERS}, 4)
        return plain, rungs(backbone, base, scaled, 2), 2
    if name in SHARED:
        backbone, base = traced(name)
    else:
        backbone = small({**FAST, **OTHERS, **OTHERS_SLOW, **SLOW}[name])
        base = base_graph(backbone, None)
    plain = rungs(backbone, base, ladder_adapters(base, SCALES.get(name, 0.5)), 3)
    return plain, rungs(backbone, base, scaled_adapters(base), 3), 1


@pytest.fixture(
    scope="module",
    params=[
        *SMALL,
        *FAST,
        *OTHERS,
        *(pytest.param(name, marks=pytest.mark.families) for name in (*OTHERS_SLOW, *SLOW, *REAL)),
    ],
)
def ladder(request: pytest.FixtureRequest) -> Iterator[Ladder]:
    made, scaled, threads = build(request.param)
    measured: dict[str, float] = {}
    with ExitStack() as stack:
        bare = stack.enter_context(session(made.base.model, threads))
        branched = stack.enter_context(session(made.branched(), threads))
        yield Ladder(request.param, made, scaled, bare, branched, measured)
    del made, scaled, bare, branched
    gc.collect()  # a model of real size must be gone before the next is loaded
    figures = ", ".join(f"{stage} {error:.1e}" for stage, error in measured.items())
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f" {request.param}: max abs error over the logits' range: {figures}")


# -- what must agree ----------------------------------------------------------------------------


def test_folded(ladder):
    for name, adapter in ladder.rungs.adapters.items():
        images, expected = ladder.rungs.of(name)
        with session(folded_model(ladder.rungs.base, adapter)) as folded:
            ladder.judge("folded", compare(expected, run(folded, images)))


def test_mixed_batches(ladder):
    """Batches of 1, 5 and 7: neighbours use different adapters, the last batch is cut."""
    sizes = (4,) if ladder.name in REAL else (1, 5, 7)
    for size in sizes:
        found = ladder.rungs.run_mixed(ladder.branched, size)
        ladder.judge("branches", compare(ladder.rungs.reference.logits, found))


def test_row_zero_is_the_backbone_to_the_bit(ladder):
    images, expected = ladder.rungs.of(BACKBONE)
    bare = run(ladder.bare, images)
    ladder.judge("folded", compare(expected, bare))
    ids = np.zeros(len(images), np.int64)
    found = run(ladder.branched, images, adapter_ids=ids, adapter_bank=ladder.rungs.bank)
    assert found[:, : bare.shape[1]].tobytes() == bare.tobytes()


def test_a_then_b_then_a_gives_a_to_the_bit(ladder):
    images, _ = ladder.rungs.of(BACKBONE)
    bank = ladder.rungs.bank
    a, b = (np.full(len(images), row, np.int64) for row in (1, 2))
    first, other, again = (
        run(ladder.branched, images, adapter_ids=ids, adapter_bank=bank) for ids in (a, b, a)
    )
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_the_adapters_matter(ladder):
    """Each adapter's deltas alone move the logits by far more than the table allows."""
    for name in ladder.rungs.adapters:
        _, expected = ladder.rungs.of(name)
        row = ladder.rungs.bank[ladder.rungs.row(name)].copy()
        layout = ladder.rungs.plan.layout
        row[: layout.offsets["head.weight"]] = 0
        without = ladder.rungs.run_row(ladder.branched, name, row)
        assert compare(expected, without).failures(bound("branches", "float32")), name


# -- s_in, s_out and db -------------------------------------------------------------------------


def test_scaled_sites_folded(ladder):
    for name, adapter in ladder.scaled.adapters.items():
        images, expected = ladder.scaled.of(name)
        with session(folded_model(ladder.scaled.base, adapter)) as folded:
            ladder.judge("folded", compare(expected, run(folded, images)))


def test_scaled_sites_beside_the_backbone(ladder):
    """Mixed batches; row 0 to the bit where there is room for more; each part must be there."""
    scaled = ladder.scaled
    with session(scaled.branched()) as branched:
        found = scaled.run_mixed(branched, 5)
        ladder.judge("branches", compare(scaled.reference.logits, found))
        images, _ = scaled.of(BACKBONE)
        ids = np.zeros(len(images), np.int64)
        zero = run(branched, images, adapter_ids=ids, adapter_bank=scaled.bank)
        assert zero.tobytes() == run(ladder.bare, images).tobytes()
        for name, adapter in scaled.adapters.items():
            _, expected = scaled.of(name)
            for part in sorted({p for site in adapter.sites.values() for p in site.parts}):
                row = scaled.bank[scaled.row(name)].copy()
                for key, view in scaled.plan.layout.views(row).items():
                    if key.endswith(f"/{part}"):
                        view[...] = 0
                mistaken = compare(expected, scaled.run_row(branched, name, row))
                assert mistaken.failures(bound("branches", "float32")), (name, part)


# -- what must not ------------------------------------------------------------------------------


def test_mistakes_are_caught(ladder):
    """The wrong adapter, swapped u and v, and a wrong tau, in a bank's row."""
    planted = set()
    for name in ladder.rungs.adapters:
        _, expected = ladder.rungs.of(name)
        right = ladder.rungs.bank[ladder.rungs.row(name)]
        found = ladder.rungs.run_row(ladder.branched, name, right)
        ladder.judge("branches", compare(expected, found))
        for mistake, row in mistaken_rows(ladder.rungs, name).items():
            planted.add(mistake)
            comparison = compare(expected, ladder.rungs.run_row(ladder.branched, name, row))
            assert comparison.failures(bound("branches", "float32")), (name, mistake)
            assert comparison.failures(bound("folded", "float32")), (name, mistake)
    assert planted == {"wrong adapter", "swapped u and v", "wrong tau"}


def test_a_forgotten_m_b_is_caught(ladder):
    sequential = {n: a for n, a in ladder.rungs.adapters.items() if a.form == "sequential"}
    if not sequential:
        pytest.skip(f"{ladder.name} has neither proj nor fc2: no sequential adapter")
    for name, adapter in sequential.items():
        mistaken = folded_without_bias(ladder.rungs.base, adapter)
        if mistaken is None:
            pytest.skip(f"{ladder.name}: proj and fc2 have no bias that could be forgotten")
        images, expected = ladder.rungs.of(name)
        with session(mistaken) as wrong:
            comparison = compare(expected, run(wrong, images))
        assert comparison.failures(bound("folded", "float32")), comparison


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", REFUSED)
def test_refused_with_a_reason(model):
    with pytest.raises(HhdeployError, match=REFUSED[model]):
        plan_branches(small(Architecture(model)).facts, {}, Reserve(sites=("proj",)))
