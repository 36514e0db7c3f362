"""The row of the bank: offsets, contents, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.adapters.format import PARTS, SiteTensors
from hhdeploy.adapters.mixing import at_strength
from hhdeploy.algebra import SiteDelta
from hhdeploy.bundle.layout import FLOAT16_MAX, Branch, RowLayout, check_row_range
from hhdeploy.errors import CapacityError
from hhdeploy.plan import Reserve, plan_branches
from tests.hhdeploy.test_plan import DIM, FACTS, HIDDEN
from tests.support import assert_caught, assert_parity, random_adapter

LAYOUT = RowLayout(
    (
        Branch("b.qkv", "additive", ("b.qkv.q", "b.qkv.k", "b.qkv.v"), 7, 5, 3),
        Branch("b.proj", "additive", ("b.proj",), 5, 7, 2),
        Branch("b.proj", "sequential", ("b.proj",), 5, 5, 4),
    ),
    classes=11,
    dim=13,
    backbone_head=False,
)


def read(layout, row, site, form):
    """The dense matrix that a row holds for a site, and its place: written out again here."""
    views = layout.views(row)
    (branch,) = [b for b in layout.branches if site in b.sites and b.form == form]
    i = branch.sites.index(site)
    diag, right = views[f"{branch.name}/diag"][i], views[f"{branch.name}/right"][i]
    left_t = views[f"{branch.name}/left_t"][i]
    matrix = left_t.astype(np.float64).T @ right.astype(np.float64)
    np.fill_diagonal(matrix, matrix.diagonal() + diag)
    return matrix


def test_parts_stand_one_after_another():
    expected = {
        "b.qkv/additive/diag": (3, 5),
        "b.qkv/additive/right": (3, 3, 5),
        "b.qkv/additive/left_t": (3, 3, 7),
        "b.proj/additive/diag": (1, 5),
        "b.proj/additive/right": (1, 2, 7),
        "b.proj/additive/left_t": (1, 2, 5),
        "b.proj/sequential/diag": (1, 5),
        "b.proj/sequential/right": (1, 4, 5),
        "b.proj/sequential/left_t": (1, 4, 5),
        "head.weight": (11, 13),
        "head.bias": (11,),
        "head.own": (1,),
    }
    assert list(LAYOUT.parts.items()) == list(expected.items())
    position = 0
    for name, shape in expected.items():
        assert LAYOUT.offsets[name] == position
        position += math.prod(shape)
    assert LAYOUT.size == position


def test_extras_stand_after_left_t_of_their_branch():
    qkv, proj, after = LAYOUT.branches
    layout = replace(
        LAYOUT,
        branches=(
            replace(qkv, extras=("s_in", "s_out", "db")),
            replace(proj, extras=("s_out",)),
            after,
        ),
    )
    added = {
        "b.qkv/additive/s_in": (1, 5),
        "b.qkv/additive/s_out": (3, 7),
        "b.qkv/additive/db": (3, 7),
        "b.proj/additive/s_out": (1, 5),
    }
    assert {n: s for n, s in layout.parts.items() if n not in LAYOUT.parts} == added
    names = list(layout.parts)
    assert names[2:7] == ["b.qkv/additive/left_t", *list(added)[:3], "b.proj/additive/diag"]
    assert names[8:10] == ["b.proj/additive/left_t", "b.proj/additive/s_out"]
    assert layout.size == LAYOUT.size + 5 + 21 + 21 + 5
    content = json.loads(json.dumps(layout.to_json()))
    listed = [branch.get("parts") for branch in content["branches"]]
    assert listed == [["s_in", "s_out", "db"], ["s_out"], None]
    assert RowLayout.from_json(content) == layout
    content["branches"][0]["parts"] = ["db", "gate"]
    with pytest.raises(ValueError, match="found gate"):
        RowLayout.from_json(content)


def test_no_room_for_classes_means_no_head_parts():
    layout = replace(LAYOUT, classes=0)
    assert not [name for name in layout.parts if name.startswith("head")]
    assert layout.size == LAYOUT.size - 11 * 13 - 11 - 1


def test_views_share_the_row():
    row = np.arange(LAYOUT.size, dtype=np.float32)
    views = LAYOUT.views(row)
    assert np.concatenate([v.ravel() for v in views.values()]).tolist() == row.tolist()
    views["head.own"][:] = -1.0
    assert row[-1] == -1.0


def test_json_round_trip():
    content = json.loads(json.dumps(LAYOUT.to_json()))
    assert RowLayout.from_json(content) == LAYOUT
    assert content["size"] == LAYOUT.size
    assert content["parts"][1] == {
        "part": "b.qkv/additive/right",
        "offset": 15,
        "shape": [3, 3, 5],
    }


@pytest.mark.parametrize("reflection", ["unnormalized", "orthogonal"])
@pytest.mark.parametrize("r", [0, 1, 4])
def test_a_row_holds_the_deltas(reflection, r):
    targets = ("q", "v", "proj", "fc1", "fc2")
    adapter = random_adapter(FACTS, reflection=reflection, r=r, targets=targets)
    plan = plan_branches(FACTS, {"a": adapter}, Reserve(max_rank=7))
    row = plan.layout.pack("a", adapter)
    assert row.dtype == np.float32
    assert row.shape == (plan.layout.size,)
    for site in adapter.sites:
        expected = adapter.delta(site).dense()
        assert_parity(expected, read(plan.layout, row, site, "additive"), "algebra", "float32")
    assert not read(plan.layout, row, "blocks.0.attn.qkv.k", "additive").any()


@pytest.mark.parametrize("reflection", ["unnormalized", "orthogonal"])
def test_a_sequential_row_holds_m_minus_identity(reflection):
    adapter = random_adapter(
        FACTS, form="sequential", reflection=reflection, targets=("proj", "fc2"), r=2
    )
    plan = plan_branches(FACTS, {"a": adapter}, Reserve())
    row = plan.layout.pack("a", adapter)
    for site in adapter.sites:
        found = read(plan.layout, row, site, "sequential")
        matrix = adapter.delta(site).dense()
        assert_parity(matrix - np.eye(DIM), found, "algebra", "float32")
        assert_caught(matrix, found, "algebra", "float32")


def test_the_head_and_its_padding():
    adapter = random_adapter(FACTS, classes=3)
    plan = plan_branches(FACTS, {"a": adapter}, Reserve(max_classes=5))
    views = plan.layout.views(plan.layout.pack("a", adapter))
    assert np.array_equal(views["head.weight"][:3], adapter.head.weight)
    assert not views["head.weight"][3:].any()
    assert np.array_equal(views["head.bias"][:3], adapter.head.bias)
    assert np.isneginf(views["head.bias"][3:]).all()
    assert views["head.own"] == 1.0


def test_an_adapter_without_a_head_leaves_the_head_zero():
    adapters = {"a": random_adapter(FACTS, classes=3), "b": random_adapter(FACTS, classes=None)}
    layout = plan_branches(FACTS, adapters, Reserve()).layout
    views = layout.views(layout.pack("b", adapters["b"]))
    assert not views["head.weight"].any()
    assert not views["head.bias"].any()
    assert views["head.own"] == 0.0


def test_rows_of_different_adapters_differ():
    first, second = random_adapter(FACTS, seed=1), random_adapter(FACTS, seed=2)
    layout = plan_branches(FACTS, {"a": first, "b": second}, Reserve()).layout
    assert not np.array_equal(layout.pack("a", first), layout.pack("b", second))


@pytest.fixture
def layout():
    """Room for one additive adapter of proj and fc1, rank 3, 7 classes, no backbone head."""
    return plan_branches(
        FACTS, {"a": random_adapter(FACTS, targets=("proj", "fc1"))}, Reserve()
    ).layout


def refused(layout, adapter, *parts):
    with pytest.raises(CapacityError) as caught:
        layout.pack("late", adapter)
    for part in ("'late'", *parts):
        assert part in str(caught.value), f"{part!r} is not in {caught.value!s}"


def test_capacity(layout):
    targets = ("proj", "fc1")
    layout.pack("late", random_adapter(FACTS, targets=("proj",), seed=3))
    refused(layout, random_adapter(FACTS, targets=("q",)), "blocks.0.attn.qkv.q", "`sites`")
    sequential = random_adapter(FACTS, targets=("proj",), form="sequential")
    refused(layout, sequential, "blocks.0.attn.proj (sequential)", "`sites`")
    refused(layout, random_adapter(FACTS, targets=targets, r=2), "needs rank 4", "max_rank=4")
    refused(layout, random_adapter(FACTS, targets=targets, classes=8), "8", "max_classes=8")
    refused(layout, random_adapter(FACTS, classes=None, targets=targets), "keep_backbone_head=True")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_products_outside_the_range_of_float32(layout, sign):
    """d∘u of 1e60, to both sides: -inf is padding in a head's bias and an error elsewhere."""
    adapter = random_adapter(FACTS, targets=("proj", "fc1"))
    site = adapter.sites["blocks.0.attn.proj"]
    huge = replace(
        site,
        u=np.full(DIM, sign * 1e30, np.float32),
        v=np.zeros(DIM, np.float32),
        d=np.full(DIM, 1e30, np.float32),
    )
    sites = {**adapter.sites, "blocks.0.attn.proj": huge}
    refused(layout, replace(adapter, sites=sites), f"{DIM} values", "range of float32")


def test_delta_and_row_agree_on_a_low_rank_site(layout):
    adapter = random_adapter(FACTS, targets=("proj",))
    low = {k: replace(s, u=None, v=None, d=None) for k, s in adapter.sites.items()}
    adapter = replace(adapter, sites=low)
    row = layout.pack("late", adapter)
    delta = adapter.delta("blocks.0.attn.proj")
    assert isinstance(delta, SiteDelta)
    assert_parity(
        delta.dense(), read(layout, row, "blocks.0.attn.proj", "additive"), "algebra", "float32"
    )


# -- s_in, s_out and db ---------------------------------------------------------------------------

QKV = "blocks.0.attn.qkv"


@pytest.mark.parametrize("form", ["additive", "sequential"])
def test_parts_are_stored_so_that_zeros_are_the_backbone(form):
    adapter = random_adapter(FACTS, form=form, targets=("fc2",), parts=PARTS)
    layout = plan_branches(FACTS, {"a": adapter}, Reserve()).layout
    views = layout.views(layout.pack("a", adapter))
    site = adapter.sites["blocks.1.mlp.fc2"]
    for part, neutral in (("s_in", 1.0), ("s_out", 1.0), ("db", 0.0)):
        expected = (getattr(site, part).astype(np.float64) - neutral).astype(np.float32)
        assert np.array_equal(views[f"blocks.1.mlp.fc2/additive/{part}"][0], expected), part


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_an_adapter_at_another_strength(part):
    adapter = random_adapter(FACTS, targets=("q", "k", "v", "fc2"), parts=(part,))
    alone = {name: SiteTensors(**site.parts) for name, site in adapter.sites.items()}
    adapter = replace(adapter, sites=alone)
    layout = plan_branches(FACTS, {"a": adapter}, Reserve()).layout
    whole = layout.views(layout.pack("a", adapter))
    half = layout.views(layout.pack("a", at_strength(adapter, -0.5)))
    for linear in (QKV, "blocks.1.mlp.fc2"):
        name = f"{linear}/additive/{part}"
        assert_parity(-0.5 * whole[name], half[name], "algebra", "float32")


def test_one_s_in_for_the_thirds_and_an_s_out_for_each():
    adapter = random_adapter(FACTS, targets=("q", "k", "v"), parts=PARTS)
    layout = plan_branches(FACTS, {"a": adapter}, Reserve()).layout
    views = layout.views(layout.pack("a", adapter))
    assert views[f"{QKV}/additive/s_in"].shape == (1, DIM)
    for i, third in enumerate("qkv"):
        site = adapter.sites[f"{QKV}.{third}"]
        assert np.array_equal(views[f"{QKV}/additive/db"][i], site.db)
        assert_parity(site.s_out - 1.0, views[f"{QKV}/additive/s_out"][i], "algebra", "float32")


@pytest.mark.parametrize("which", ["another", "none", "no site"])
def test_thirds_with_different_s_in_can_only_be_folded(which):
    adapter = random_adapter(FACTS, targets=("q", "k", "v"), parts=PARTS)
    layout = plan_branches(FACTS, {"a": adapter}, Reserve()).layout
    sites = dict(adapter.sites)
    if which == "no site":
        del sites[f"{QKV}.k"]
    else:
        other = sites[f"{QKV}.k"].s_in + np.float32(0.5) if which == "another" else None
        sites[f"{QKV}.k"] = replace(sites[f"{QKV}.k"], s_in=other)
    message = ("s_in of", f"{QKV}.q, {QKV}.k, {QKV}.v", "expected the same", "`fold=True`")
    refused(layout, replace(adapter, sites=sites), *message)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_the_bundle_lacks_is_named(part):
    reserve = Reserve(sites=("proj",), max_classes=7, parts=tuple(p for p in PARTS if p != part))
    layout = plan_branches(FACTS, {}, reserve).layout
    adapter = random_adapter(FACTS, targets=("proj",), parts=PARTS)
    refused(layout, adapter, f".{part}", f"no {part}", "`parts`")
    full = plan_branches(FACTS, {}, replace(reserve, parts=PARTS)).layout
    full.pack("late", adapter)
    after = random_adapter(FACTS, form="sequential", targets=("fc2",), parts=(part,))
    plain = replace(reserve, sites=("fc2:sequential",), parts=())
    refused(plan_branches(FACTS, {}, plain).layout, after, f"fc2.{part}", f"no {part}", "`parts`")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("found", [1, DIM, HIDDEN, DIM + 1])
def test_parts_of_another_size(part, found):
    """Also one value, which would be spread over all, and the size of the Linear's other side."""
    reserve = Reserve(sites=("fc1",), max_classes=7, parts=PARTS)
    layout = plan_branches(FACTS, {}, reserve).layout
    adapter = random_adapter(FACTS, targets=("fc1",))
    site = SiteTensors(**{part: np.full(found, 2.0, np.float32)})
    changed = replace(adapter, sites={"blocks.0.mlp.fc1": site})
    expected = DIM if part == "s_in" else HIDDEN
    if found == expected:
        layout.pack("late", changed)
        return
    message = (f"fc1.{part} has {found} values", f"takes {expected}", "another model")
    refused(layout, changed, *message)


def test_a_row_beyond_float16_is_refused_where_there_is_such_a_graph():
    for most in (FLOAT16_MAX, -FLOAT16_MAX):
        row = np.asarray([0.0, most, -np.inf], np.float32)  # of a head with fewer classes
        check_row_range("a", row, ["float32", "float16"])
        check_row_range("a", row * 2, ["float32", "bfloat16"])
        with pytest.raises(CapacityError, match=r"'a': a value of 6\.55e\+04 in its row is beyond"):
            check_row_range("a", row * np.float32(1.0005), ["float32", "float16"])
