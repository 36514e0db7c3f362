"""A bank in the graph: the same bits, NaN for bad ids, whatever the graph's types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from hhdeploy.adapters.format import Adapter
from hhdeploy.bundle import Bundle
from hhdeploy.choices import TYPED
from hhdeploy.errors import PlanError
from hhdeploy.exporters.bake import baked
from hhdeploy.exporters.branches import branched_model
from hhdeploy.exporters.inserter import Inserter
from hhdeploy.exporters.precision.typed import typed_model
from hhdeploy.exporters.trace import BaseGraph
from hhdeploy.plan import Plan, Reserve, plan_branches
from tests.exporters.synthetic import fingerprint, random
from tests.parity.architectures import traced
from tests.parity.ladder import Floats, run, save, session
from tests.support import assert_caught, images, random_adapter
from tests.workshop import HEAVY, run_python

LARGEST = np.iinfo(np.int64)
FLOATS = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


def adapters_of(base: BaseGraph) -> dict[str, Adapter]:
    return {
        "beside": random_adapter(base.facts, targets=["q", "v", "proj", "fc1"], classes=7, seed=1),
        "after": random_adapter(
            base.facts, form="sequential", targets=["proj", "fc2"], r=2, classes=3, seed=2
        ),
    }


def planned(base: BaseGraph, adapters: dict[str, Adapter], **reserve: bool) -> tuple[Plan, Floats]:
    """A plan and its bank."""
    plan = plan_branches(base.facts, adapters, Reserve(**reserve))
    rows = [plan.layout.pack(name, adapters[name]) for name in plan.names]
    return plan, np.stack([np.zeros(plan.layout.size, np.float32), *rows])


def quantised(model: ir.Model) -> ir.Model:
    """The graph with the gathered rows and every MatMul's activations in INT8 (explicit Q/DQ)."""
    clone = model.clone()
    for node in list(clone.graph):
        if node.op_type not in ("MatMul", "Gather") or not node.name:
            continue
        value = node.outputs[0]
        if value.is_graph_output() or value.dtype not in FLOATS:
            continue
        uses = list(value.uses())
        insert = Inserter(clone.graph, f"int8/{node.name}", after=node)
        scale = insert.constant("scale", np.asarray(0.25, FLOATS[value.dtype]))
        zero = insert.constant("zero", np.asarray(0, np.int8))
        low = insert("QuantizeLinear", "q", [value, scale, zero], dtype=ir.DataType.INT8)
        back = insert(
            "DequantizeLinear", "dq", [low, scale, zero], dtype=value.dtype, shape=value.shape
        )
        for user, index in uses:
            user.replace_input_with(index, back)
    assert sum(node.op_type == "QuantizeLinear" for node in clone.graph) > 10
    return clone


KINDS = {
    "float32": lambda model: model,
    "float16": lambda model: typed_model(model, "float16"),
    "int8": quantised,
    "int8 from float16": lambda model: quantised(typed_model(model, "float16")),
}


@pytest.fixture(scope="module", params=["vit", "swin", "beit"])
def base(request) -> BaseGraph:
    return traced(request.param)[1]


@pytest.fixture(scope="module")
def vit() -> BaseGraph:
    return traced("vit")[1]


def assert_baked(model: ir.Model, bank: Floats) -> None:
    """Good rows have the bits of the graph with an input bank, bad ones NaN, in one batch."""
    slots = len(bank)
    rows = np.asarray([1, -1, 2, slots, 0, LARGEST.max, 1, LARGEST.min], np.int64)
    bad = (rows < 0) | (rows >= slots)
    inputs = images(len(rows))
    with session(baked(model, bank)) as fixed, session(model) as free:
        found = run(fixed, inputs, adapter_ids=rows)
        expected = run(free, inputs, adapter_ids=np.where(bad, 0, rows), adapter_bank=bank)
        alone = run(fixed, inputs, adapter_ids=np.where(bad, 0, rows))
        shifted = run(fixed, inputs, adapter_ids=np.where(rows == 1, 2, 1))
    assert found.dtype == np.float32
    assert np.isnan(found[bad]).all()
    assert not np.isnan(found[~bad]).any()
    assert found[~bad].tobytes() == expected[~bad].tobytes()
    assert alone.tobytes() == expected.tobytes(), "a bad id changed another image's row"
    assert_caught(expected[[0, 6], :3], shifted[[0, 6], :3], "branches", "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_and_nan_for_bad_ids(vit, kind):
    plan, bank = planned(vit, adapters_of(vit), keep_backbone_head=True)
    assert_baked(KINDS[kind](branched_model(vit, plan)), bank)


def test_every_architecture(base):
    plan, bank = planned(base, adapters_of(base), keep_backbone_head=True)
    assert_baked(branched_model(base, plan), bank)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_from_disk(vit, kind, tmp_path):
    plan, bank = planned(vit, adapters_of(vit))
    assert_baked(ir.load(save(KINDS[kind](branched_model(vit, plan)), tmp_path)), bank)


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_and_what_does_not(vit, kind):
    plan, bank = planned(vit, adapters_of(vit))
    model = KINDS[kind](branched_model(vit, plan))
    before, rows = fingerprint(model), bank.copy()
    fixed = baked(model, bank)
    assert fingerprint(model) == before
    assert [v.name for v in fixed.graph.inputs] == ["images", "adapter_ids"]
    assert [v.name for v in fixed.graph.outputs] == ["logits"]
    assert [str(d) for d in fixed.graph.outputs[0].shape] == ["batch", str(plan.classes)]
    assert fixed.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert fixed.graph.initializers["adapter_bank"].dtype == ir.DataType.FLOAT
    known = {node.name for node in model.graph}
    new = [node.name for node in fixed.graph if node.name not in known]
    assert new, "nothing was inserted"
    assert all((name or "").startswith("branch/bank/") for name in new)
    assert known <= {node.name for node in fixed.graph}
    onnx.checker.check_model(ir.to_proto(fixed), full_check=True)
    # The bank is copied: what the caller does with its own is its own business.
    text = fingerprint(fixed)
    bank[:] = 0
    assert fingerprint(fixed) == text
    assert np.array_equal(fixed.graph.initializers["adapter_bank"].const_value.numpy(), rows)


@pytest.mark.parametrize("precision", TYPED)
def test_typing_before_and_after_baking_round_alike(vit, precision):
    """export types a baked graph, a server's repository bakes a typed one."""
    plan, bank = planned(vit, adapters_of(vit))
    model = branched_model(vit, plan)
    first = typed_model(baked(model, bank), precision)
    last = baked(typed_model(model, precision), bank)
    for graph in (first, last):
        onnx.checker.check_model(ir.to_proto(graph), full_check=True)
        assert graph.graph.initializers["adapter_bank"].dtype == ir.DataType.FLOAT
    if precision == "bfloat16":
        return  # ONNX Runtime has no bfloat16 kernels on a CPU
    rows = np.asarray([1, 2, 3, 0], np.int64)
    with session(first) as a, session(last) as b:
        found = run(a, images(4), adapter_ids=rows), run(b, images(4), adapter_ids=rows)
    assert found[0].tobytes() == found[1].tobytes()


def test_without_heads(vit):
    """The classifier's own product is the output; row 0 is the backbone to the bit."""
    plan, bank = planned(vit, {"bare": random_adapter(vit.facts, classes=None)})
    model = baked(branched_model(vit, plan), bank)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    with session(model) as fixed, session(vit.model) as bare:
        found = run(fixed, images(3), adapter_ids=np.asarray([0, 2, 1], np.int64))
        expected = run(bare, images(3))
    assert found[0].tobytes() == expected[0].tobytes()
    assert np.isnan(found[1]).all()
    assert_caught(expected[[2]], found[[2]], "branches", "float32")


def test_one_slot(vit):
    plan, bank = planned(vit, adapters_of(vit))
    with session(baked(branched_model(vit, plan), bank[1:2])) as fixed:
        found = run(fixed, images(3), adapter_ids=np.asarray([0, 1, -1], np.int64))
    assert np.isfinite(found[0, :7]).all()
    assert np.isnan(found[1:]).all()


def test_a_bundle_of_either_kind_gives_the_same_bits(small, constant):
    """export --bank-as-constant is this pass over the graph of a plain export."""
    bundle = Bundle.open(small)
    model = ir.load(bundle.graph("float32"))
    rows = np.asarray([2, 1, 3], np.int64)
    with (
        session(baked(model, bundle.bank())) as ours,
        session(ir.load(Bundle.open(constant).graph("float32"))) as exported,
    ):
        found = run(ours, images(3), adapter_ids=rows)
        expected = run(exported, images(3), adapter_ids=rows)
    assert found.tobytes() == expected.tobytes()
    assert np.isnan(found[2]).all()


def test_baking_needs_no_torch(small, tmp_path):
    code = """
        import sys
        import onnx_ir as ir
        from hhdeploy.bundle import Bundle
        from hhdeploy.exporters.bake import baked
        bundle = Bundle.open(sys.argv[1])
        ir.save(baked(ir.load(bundle.graph("float32")), bundle.bank()), sys.argv[2])
    """
    blocked = [name for name in HEAVY if name not in ("onnx", "onnx_ir")]
    assert "torch" in blocked
    done = run_python(code, small, tmp_path / "baked.onnx", blocked=blocked)
    assert done.returncode == 0, done.stderr
    assert Path(tmp_path / "baked.onnx").stat().st_size > 0


# -- what it refuses ------------------------------------------------------------------------------


def test_a_graph_without_a_bank(vit):
    plan, bank = planned(vit, adapters_of(vit))
    once = baked(branched_model(vit, plan), bank)
    with pytest.raises(PlanError, match=r"no input adapter_bank \(its inputs: images, adapter_ids"):
        baked(once, bank)
    with pytest.raises(
        PlanError, match=r"no input adapter_bank \(its inputs: images\).*`fold=True`"
    ):
        baked(vit.model, bank)


@pytest.mark.parametrize(
    ("shape", "dtype", "found"),
    [
        ((3, 5), np.float32, r"found float32 \[3, 5\]"),
        ((0, None), np.float32, r"at least one slot, found float32 \[0, "),
        ((3, None), np.float64, r"expected float32 .* found float64"),
        ((3, None), np.float16, r"expected float32 .* found float16"),
        ((None,), np.float32, r"expected float32 \[slots, \d+\].* found float32 \[\d+\]"),
    ],
)
def test_banks_that_do_not_fit(vit, shape, dtype, found):
    plan, _ = planned(vit, adapters_of(vit))
    bank = np.zeros([plan.layout.size if n is None else n for n in shape], dtype)
    with pytest.raises(PlanError, match=rf"^bank: .*{found}"):
        baked(branched_model(vit, plan), bank)


def test_a_bank_with_another_reader(vit):
    plan, bank = planned(vit, adapters_of(vit))
    model = branched_model(vit, plan)
    gather = next(node for node in model.graph if node.name == "branch/bank/gather")
    insert = Inserter(model.graph, "other", before=gather)
    extra = insert("Add", "half", [model.graph.inputs[2], insert.constant("c", random(1))])
    gather.replace_input_with(0, extra)
    with pytest.raises(PlanError, match=r"adapter_bank is read by Add other/half; expected Gather"):
        baked(model, bank)
