"""Folding one adapter into the traced graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from hhdeploy.adapters.format import SiteTensors
from hhdeploy.algebra import SiteDelta
from hhdeploy.errors import PlanError
from hhdeploy.exporters.fold import fold_additive, folded_model
from hhdeploy.exporters.trace import BaseGraph
from hhdeploy.graph import linears_by_path
from tests.exporters.synthetic import fingerprint, linear, random, shared_twice
from tests.parity.architectures import traced
from tests.parity.ladder import run, save, session, without_householder
from tests.support import assert_caught, assert_parity, images, random_adapter


@pytest.fixture(scope="module")
def base() -> BaseGraph:
    return traced("vit")[1]


def test_the_base_graph_is_unchanged(base):
    before = fingerprint(base.model)
    for form, targets in (
        ("additive", ("q", "k", "v", "proj", "fc1", "fc2")),
        ("sequential", ("proj", "fc2")),
    ):
        folded = folded_model(base, random_adapter(base.facts, form=form, targets=targets))
        assert fingerprint(folded) != before
        onnx.checker.check_model(ir.to_proto(folded), full_check=True)
        assert [n.op_type for n in folded.graph] == [n.op_type for n in base.model.graph]
        assert [n.name for n in folded.graph] == [n.name for n in base.model.graph]
    assert fingerprint(base.model) == before


def test_only_the_adapted_thirds_of_qkv_change(base):
    adapter = random_adapter(base.facts, targets=["blocks.0.attn.qkv.q", "blocks.1.attn.qkv.v"])
    folded = folded_model(base, adapter)
    for block, site, changed in ((0, "q", slice(0, 48)), (1, "v", slice(96, 144))):
        path = f"blocks.{block}.attn.qkv"
        old, new = linear(base.model, path), linear(folded, path)
        kept = np.ones(144, bool)
        kept[changed] = False
        assert np.array_equal(new.weight[kept], old.weight[kept])
        expected = old.weight[changed] + adapter.delta(f"{path}.{site}").dense()
        assert_parity(expected, new.weight[changed], "algebra", "float32")
        assert_caught(expected, old.weight[changed], "algebra", "float32")
        assert np.array_equal(new.bias, old.bias)
    assert np.array_equal(
        linear(folded, "blocks.0.attn.proj").weight,
        linear(base.model, "blocks.0.attn.proj").weight,
    )


@pytest.mark.parametrize("kind", ["proj", "fc1", "fc2"])
@pytest.mark.parametrize("reflection", ["unnormalized", "orthogonal"])
def test_an_additive_fold_is_the_weight_plus_the_dense_delta(base, kind, reflection):
    adapter = random_adapter(base.facts, targets=[kind], reflection=reflection)
    folded = folded_model(base, adapter)
    for site in adapter.sites:
        old, new = linear(base.model, site), linear(folded, site)
        delta = adapter.delta(site)
        assert_parity(old.weight + delta.dense(), new.weight, "algebra", "float32")
        assert np.array_equal(new.bias, old.bias)


@pytest.mark.parametrize("rank", [1, 4, 5, 16])
@pytest.mark.parametrize("by_column", [False, True])
def test_a_product_of_any_rank_is_added(rank, by_column):
    """Columns one at a time or as one product, into a weight of either memory order."""
    rng = np.random.default_rng(rank)
    weight = rng.standard_normal((7, 9), np.float32)
    weight = np.asfortranarray(weight) if by_column else weight
    delta = SiteDelta(np.ones(7), rng.standard_normal((7, rank)), rng.standard_normal((rank, 9)))
    folded = fold_additive(weight, delta)
    assert_parity(weight + delta.dense(), folded, "algebra", "float32")
    assert_caught(weight + delta.dense(), weight, "algebra", "float32")


@pytest.mark.parametrize("kind", ["proj", "fc2"])
def test_the_sequential_form_changes_weight_and_bias(base, kind):
    adapter = random_adapter(base.facts, form="sequential", targets=[kind])
    folded = folded_model(base, adapter)
    for site in adapter.sites:
        old, new = linear(base.model, site), linear(folded, site)
        m = adapter.delta(site).dense()
        assert_parity(m @ old.weight, new.weight, "algebra", "float32")
        assert_parity(m @ old.bias, new.bias, "algebra", "float32")
        assert_caught(m @ old.bias, old.bias, "algebra", "float32")
        assert_caught(m.T @ old.weight, new.weight, "algebra", "float32")


def test_scales_and_db_are_those_of_their_own_rows(base):
    path = "blocks.0.attn.qkv"
    adapter = random_adapter(base.facts, targets=[f"{path}.k", f"{path}.v"], parts=("s_out", "db"))
    old, new = linear(base.model, path), linear(folded_model(base, adapter), path)
    assert np.array_equal(new.weight[:48], old.weight[:48])
    assert np.array_equal(new.bias[:48], old.bias[:48])
    for site, rows in (("k", slice(48, 96)), ("v", slice(96, 144))):
        change = adapter.change(f"{path}.{site}")
        scaled = change.scales.s_out[:, None] * old.weight[rows]
        assert_parity(scaled + change.delta.dense(), new.weight[rows], "algebra", "float32")
        assert_parity(old.bias[rows] + change.db, new.bias[rows], "algebra", "float32")
    adapter = random_adapter(base.facts, form="sequential", targets=["fc2"], parts=("db",))
    folded = folded_model(base, adapter)
    for site in adapter.sites:
        old, new, change = linear(base.model, site), linear(folded, site), adapter.change(site)
        moved = change.delta.dense() @ (old.bias + change.db)
        assert_parity(moved, new.bias, "algebra", "float32")


def test_a_linear_without_a_bias_stays_without_one():
    base = shared_twice()
    stripped = base.model.clone()
    for used in linears_by_path(stripped.graph)["blocks.0.attn.proj"]:
        used.output.replace_all_uses_with(used.node.outputs[0])
        assert used.bias_node is not None
        stripped.graph.remove(used.bias_node, safe=True)
    base = replace(base, model=stripped)
    adapter = random_adapter(base.facts, form="sequential", targets=["proj"], classes=None)
    folded = folded_model(base, adapter)
    assert [n.op_type for n in folded.graph].count("Add") == 0
    assert all(u.bias is None for u in linears_by_path(folded.graph)["blocks.0.attn.proj"])


@pytest.mark.parametrize("form", ["additive", "sequential"])
def test_a_linear_that_is_called_twice_is_folded_twice(form):
    base = shared_twice()
    adapter = random_adapter(base.facts, form=form, targets=["proj"], classes=3)
    folded = folded_model(base, adapter)
    delta = adapter.delta("blocks.0.attn.proj").dense()
    (old, _) = linears_by_path(base.model.graph)["blocks.0.attn.proj"]
    weight, bias = old.weight.astype(np.float64), old.bias.astype(np.float64)
    if form == "additive":
        weight = weight + delta
    else:
        weight, bias = delta @ weight, delta @ bias
    x = random(4, 5, 7)
    hidden = np.maximum(x @ weight.T + bias, 0) @ weight.T + bias
    expected = hidden.mean(axis=1) @ adapter.head.weight.T + adapter.head.bias
    with session(folded) as runner:
        assert_parity(expected, run(runner, x), "folded", "float32")
    once = folded.clone()
    uses = linears_by_path(once.graph)["blocks.0.attn.proj"]
    uses[1].replace_weight(once.graph, "old", old.weight)
    with session(once) as runner:
        assert_caught(expected, run(runner, x), "folded", "float32")


@pytest.mark.parametrize("classes", [1, 7, 1500])
def test_a_head_of_another_size(base, classes):
    adapter = random_adapter(base.facts, targets=["q"], classes=classes)
    folded = folded_model(base, adapter)
    onnx.checker.check_model(ir.to_proto(folded), full_check=True)
    head = linear(folded, "head")
    assert np.array_equal(head.weight, adapter.head.weight)
    assert np.array_equal(head.bias, adapter.head.bias)
    (logits,) = folded.graph.outputs
    assert (logits.name, [str(d) for d in logits.shape]) == ("logits", ["batch", str(classes)])
    with session(folded) as runner:
        assert run(runner, images(2)).shape == (2, classes)


@pytest.mark.parametrize("name", ["vit", "zero bias"])
def test_an_adapter_without_a_head_keeps_the_classifier(name):
    base = traced(name)[1]
    folded = folded_model(base, random_adapter(base.facts, classes=None))
    old, new = linear(base.model, "head"), linear(folded, "head")
    assert np.array_equal(new.weight, old.weight)
    assert (new.bias is None) == (old.bias is None)


def test_a_head_on_a_classifier_whose_bias_was_dropped():
    base = traced("zero bias")[1]
    adapter = random_adapter(base.facts, targets=["q"], classes=5)
    folded = folded_model(base, adapter)
    assert np.array_equal(linear(folded, "head").bias, adapter.head.bias)
    onnx.checker.check_model(ir.to_proto(folded), full_check=True)


def test_weights_that_are_not_used_any_more_are_gone(base):
    folded = folded_model(base, random_adapter(base.facts, targets=["proj"]))
    assert all(value.uses() for value in folded.graph.initializers.values())
    old = {v.name for v in base.model.graph.initializers.values() if v.name}
    new = {v.name for v in folded.graph.initializers.values() if v.name}
    assert {name for name in new - old if "folded" not in name} == set()
    assert len(old - new) >= 2 + 2, "the two proj weights, the head's weight and bias"


def huge(site: SiteTensors, **changes) -> SiteTensors:
    return replace(site, **{k: np.full_like(getattr(site, k), v) for k, v in changes.items()})


def test_an_overflow_names_the_site(base, tmp_path):
    adapter = random_adapter(base.facts, targets=["q", "v"])
    name = "blocks.1.attn.qkv.v"
    sites = dict(adapter.sites) | {name: huge(adapter.sites[name], u=1e30, v=1e30)}
    folded = folded_model(base, replace(adapter, sites=sites))
    with pytest.raises(PlanError, match=r"^blocks\.1\.attn\.qkv\.v: the folded weight leaves"):
        save(folded, tmp_path)


def test_an_overflow_in_a_bias_names_the_site(base):
    """Only the bias overflows: the weight's rows are zero where the bias is not."""
    synthetic = shared_twice()
    model = synthetic.model.clone()
    for used in linears_by_path(model.graph)["blocks.0.attn.proj"]:
        used.replace_weight(model.graph, "zero", np.zeros_like(used.weight))
    synthetic = replace(synthetic, model=model)
    adapter = random_adapter(synthetic.facts, form="sequential", targets=["proj"], classes=None)
    adapter = without_householder(adapter)
    name = "blocks.0.attn.proj"
    sites = {name: huge(adapter.sites[name], lora_A=1e30, lora_B=1e30)}
    with pytest.raises(PlanError, match=r"^blocks\.0\.attn\.proj \(bias\): .*float32"):
        folded_model(synthetic, replace(adapter, sites=sites))


def test_a_then_b_then_a_gives_a_to_the_bit(base):
    a = random_adapter(base.facts, seed=1)
    b = random_adapter(base.facts, form="sequential", targets=["proj", "fc2"], seed=2)
    first, between, again = (fingerprint(folded_model(base, x)) for x in (a, b, a))
    assert first == again
    assert first != between
