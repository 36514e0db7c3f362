"""Side branches: names, cost, bits of the backbone, heads, and what the graph accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from hhdeploy.adapters.format import PARTS, Adapter
from hhdeploy.backbones.sites import sites_of
from hhdeploy.bundle import Bundle
from hhdeploy.errors import BackboneError, PlanError
from hhdeploy.exporters.bake import baked
from hhdeploy.exporters.branches import _bias_may_ride, branched_model
from hhdeploy.exporters.qkv import qkv_views
from hhdeploy.exporters.trace import BaseGraph, base_graph
from hhdeploy.graph import LINEAR_TAG, linear_of, linears_by_path
from hhdeploy.plan import Plan, Reserve, plan_branches
from tests.exporters.synthetic import base_of, graph, random, shared_twice
from tests.parity.architectures import traced
from tests.parity.ladder import Floats, folded_model, run, session
from tests.support import assert_caught, assert_parity, images, random_adapter, tiny_backbone

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2", "proj:sequential", "fc2:sequential")
MODELS = ("vit", "swin", "beit")
# q, k and v are thirds of one Linear; fc1, proj and fc2 are Linears alike, whatever the model.
OF_EACH = [
    *(("vit", target) for target in TARGETS),
    *((model, target) for model in MODELS[1:] for target in ("v", "fc1", "proj:sequential")),
]
PROJ = "blocks.0.attn.proj"


def bank_of(plan: Plan, adapters: dict[str, Adapter]) -> Floats:
    rows = [plan.layout.pack(name, adapters[name]) for name in plan.names]
    return np.stack([np.zeros(plan.layout.size, np.float32), *rows])


def ids(*rows: int) -> np.ndarray:
    return np.asarray(rows, np.int64)


def inserted(base: BaseGraph, model: ir.Model) -> list[ir.Node]:
    known = {node.name for node in base.model.graph}
    return [node for node in model.graph if node.name not in known]


def pair(base: BaseGraph) -> dict[str, Adapter]:
    return {
        "beside": random_adapter(
            base.facts, targets=["q", "k", "v", "proj", "fc1", "fc2"], classes=7, seed=1
        ),
        "after": random_adapter(
            base.facts, form="sequential", targets=["proj", "fc2"], r=2, classes=3, seed=2
        ),
    }


@pytest.fixture(scope="module", params=MODELS)
def base(request) -> BaseGraph:
    return traced(request.param)[1]


@pytest.fixture(scope="module")
def vit() -> BaseGraph:
    return traced("vit")[1]


# -- structure ------------------------------------------------------------------------------------


def _between(node, ends):
    """Names of a node and all that follow it up to the producers of ``ends``."""
    names = {node.name}
    for value in node.outputs:
        if not any(value is end for end in ends):
            for user, _ in value.uses():
                names |= _between(user, ends)
    return names


def test_names_and_order(base):
    plan = plan_branches(base.facts, pair(base), Reserve(keep_backbone_head=True))
    before = ir.to_proto(base.model).SerializeToString(deterministic=True)
    model = branched_model(base, plan)
    assert ir.to_proto(base.model).SerializeToString(deterministic=True) == before
    nodes = inserted(base, model)
    own = {branch.name for branch in plan.layout.branches}
    assert {form for name in own for form in [name.rpartition("/")[2]]} == {
        "additive",
        "sequential",
    }
    fused = [branch for branch in plan.layout.branches if len(branch.sites) == 3]
    thirds = {f"{site}/MatMul" for branch in fused for site in branch.sites}
    prefixes = own | {"bank", base.facts.classifier}
    prefixes |= {f"{site}/{branch.form}" for branch in fused for site in branch.sites}
    found = set()
    for node in nodes:
        assert node.name is not None
        if node.name in thirds:  # a third of the frozen Linear, not a part of the branch
            continue
        start, _, rest = node.name.partition("/")
        assert start == "branch"
        (prefix,) = [p for p in prefixes if rest.startswith(f"{p}/")]
        found.add(prefix)
        assert LINEAR_TAG not in node.metadata_props
        for value in node.outputs:
            assert value is model.graph.outputs[0] or (value.name or "").startswith("branch/")
    assert found == prefixes
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    # The backbone's nodes keep their names; gone are Adds whose bias a branch has taken over, and
    # the fused qkv with its views, in whose place the thirds stand.
    by_path = linears_by_path(base.model.graph)
    gone = {u.bias_node.name for b in plan.layout.branches for u in by_path[b.linear]}
    for linear in (use for branch in fused for use in by_path[branch.linear]):
        views = qkv_views(linear)
        assert views is not None
        gone |= {linear.node.name, *_between(views.reshape, views.parts)}
    assert {n.name for n in base.model.graph} - set(names) <= gone
    assert thirds <= set(names)
    assert [v.name for v in model.graph.inputs] == ["images", "adapter_ids", "adapter_bank"]
    assert [v.name for v in model.graph.outputs] == ["logits"]


def test_only_one_gather_reads_the_bank(base):
    plan = plan_branches(base.facts, pair(base), Reserve())
    model = branched_model(base, plan)
    bank = model.graph.inputs[2]
    assert [str(d) for d in bank.shape] == ["slots", str(plan.layout.size)]
    ((reader, index),) = bank.uses()
    assert (reader.op_type, index) == ("Gather", 0)
    assert reader.attributes.get_int("axis", 0) == 0
    assert reader.inputs[1] is model.graph.inputs[1]
    assert "slots" not in {str(d) for n in model.graph for v in n.outputs for d in v.shape or ()}


def test_shapes_do_not_depend_on_the_slots(base):
    """With 2 or 64 slots, every value but the bank has the same inferred shape."""
    plan = plan_branches(base.facts, pair(base), Reserve())

    def inferred(slots: int) -> dict[str, str]:
        model = branched_model(base, plan)
        for node in model.graph:
            for value in node.outputs:
                if value is not model.graph.outputs[0]:
                    value.shape = None
        model.graph.inputs[0].shape = ir.Shape([5, 3, 32, 32])
        model.graph.inputs[1].shape = ir.Shape([5])
        model.graph.inputs[2].shape = ir.Shape([slots, plan.layout.size])
        model.graph.outputs[0].shape = ir.Shape([5, plan.classes])
        proto = onnx.shape_inference.infer_shapes(
            ir.to_proto(model), strict_mode=True, data_prop=True
        )
        return {v.name: str(v.type) for v in proto.graph.value_info}

    few, many = inferred(2), inferred(64)
    assert few == many
    gathered = [kind for name, kind in few.items() if name == "branch/bank/gather"]
    assert len(gathered) == 1
    assert str(plan.layout.size) in gathered[0]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("constant", [True, False])
def test_the_checker_accepts(base, keep, constant):
    adapters = pair(base)
    plan = plan_branches(base.facts, adapters, Reserve(keep_backbone_head=keep))
    model = branched_model(base, plan)
    if constant:
        model = baked(model, bank_of(plan, adapters))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert model.opset_imports == {"": 20}
    assert [str(d) for d in model.graph.outputs[0].shape] == ["batch", str(plan.classes)]
    assert plan.classes == (1000 if keep else 7)


# -- a row of zeros is the backbone ---------------------------------------------------------------


@pytest.mark.parametrize(("base", "target"), OF_EACH, indirect=["base"])
def test_a_row_of_zeros_is_the_backbone_to_the_bit(base, target):
    reserve = Reserve(sites=(target,), max_rank=5, max_classes=11, keep_backbone_head=True)
    plan = plan_branches(base.facts, {}, reserve)
    assert plan.layout.branches
    bank = random(3, plan.layout.size)
    bank[1] = 0
    inputs = images(5)
    with session(base.model) as bare, session(branched_model(base, plan)) as branched:
        for count in (1, 2, 5):
            expected = run(bare, inputs[:count])
            rows = ids(*[1] * count)
            found = run(branched, inputs[:count], adapter_ids=rows, adapter_bank=bank)
            assert found.tobytes() == expected.tobytes()
        other = run(branched, inputs, adapter_ids=ids(1, 2, 1, 0, 1), adapter_bank=bank)
    assert other[[0, 2, 4]].tobytes() == expected[[0, 2, 4]].tobytes()
    assert_caught(expected[[1]], other[[1]], "branches", "float32")


def test_a_row_of_zeros_with_every_branch_at_once(base):
    kindless = [linear.path for linear in base.facts.linears if not linear.sites[0].kind]
    reserve = Reserve(sites=(*TARGETS, *kindless), keep_backbone_head=True)
    plan = plan_branches(base.facts, {}, reserve)
    assert len(plan.layout.branches) == sum(
        2 if branch.path.endswith(("proj", "fc2")) else 1 for branch in base.facts.linears
    )
    bank = np.zeros((2, plan.layout.size), np.float32)
    with session(base.model) as bare, session(branched_model(base, plan)) as branched:
        expected = run(bare, images(3))
        found = run(branched, images(3), adapter_ids=ids(0, 1, 0), adapter_bank=bank)
    assert found.tobytes() == expected.tobytes()


# -- one kind at a time, rectangular ones included ------------------------------------------------


def one_kind(base: BaseGraph, target: str) -> Adapter:
    kind, _, form = target.partition(":")
    # Queries and keys of an untrained model hardly differ: each matters only with the other.
    targets = ["q", "k"] if kind in ("q", "k") else [kind]
    return random_adapter(
        base.facts, form=form or "additive", targets=targets, r=2, classes=5, seed=6, scale=0.5
    )


@pytest.mark.parametrize(("base", "target"), OF_EACH, indirect=["base"])
def test_one_branch_is_the_folded_weight(base, target):
    adapter = one_kind(base, target)
    plan = plan_branches(base.facts, {"one": adapter}, Reserve())
    bank = bank_of(plan, {"one": adapter})
    inputs = images(3)
    with session(folded_model(base, adapter)) as folded:
        expected = run(folded, inputs)
    with session(branched_model(base, plan)) as branched:
        found = run(branched, inputs, adapter_ids=ids(1, 1, 1), adapter_bank=bank)
        assert_parity(expected, found, "branches", "float32")
        parts = plan.layout.views(bank[1])
        for branch in plan.layout.branches:
            index = "qkv".index(target) if len(branch.sites) == 3 else 0
            for part in branch.parts:
                parts[part][index] = 0
        mistaken = run(branched, inputs, adapter_ids=ids(1, 1, 1), adapter_bank=bank)
        assert_caught(expected, mistaken, "branches", "float32")


def test_some_of_these_sites_are_rectangular(vit):
    sites = sites_of(vit.facts.linears)
    assert (sites["blocks.0.mlp.fc1"].out, sites["blocks.0.mlp.fc1"].in_) == (192, 48)
    assert (sites["blocks.0.mlp.fc2"].out, sites["blocks.0.mlp.fc2"].in_) == (48, 192)


@pytest.mark.parametrize("form", ["additive", "sequential"])
def test_a_linear_that_is_called_twice_has_two_branches(form):
    base = shared_twice()
    adapter = random_adapter(base.facts, form=form, targets=["proj"], classes=3)
    plan = plan_branches(base.facts, {"one": adapter}, Reserve(keep_backbone_head=True))
    model = branched_model(base, plan)
    for use in ("", "@1"):
        assert any((n.name or "").startswith(f"branch/{PROJ}/{form}{use}/") for n in model.graph)
    bank = bank_of(plan, {"one": adapter})
    inputs = random(4, 5, 7)
    with session(folded_model(base, adapter)) as folded, session(base.model) as bare:
        expected, zero = run(folded, inputs), run(bare, inputs)
    with session(model) as branched:
        found = run(branched, inputs, adapter_ids=ids(1, 0, 1, 0), adapter_bank=bank)
    assert_parity(expected[[0, 2]], found[[0, 2], :3], "branches", "float32")
    assert found[[1, 3]].tobytes() == zero[[1, 3]].tobytes()
    assert_caught(expected, zero[:, :3], "branches", "float32")


# -- both forms at one Linear ---------------------------------------------------------------------


def test_additive_then_sequential_at_one_linear(base):
    """z = W x + b + additive(x), y = M z: a row may use either, neither or both."""
    adapters = pair(base)
    plan = plan_branches(base.facts, adapters, Reserve())
    bank = bank_of(plan, adapters)
    # Both in one row: the sequential adapter's parts over the additive one's.
    both = bank[1].copy()
    parts, after = plan.layout.views(both), plan.layout.views(bank[2])
    for name in parts:
        if "/sequential/" in name:
            parts[name][...] = after[name]
    inputs = images(3)
    with session(branched_model(base, plan)) as branched:
        rows = np.concatenate([bank, both[None]])
        found = run(branched, inputs, adapter_ids=ids(3, 3, 3), adapter_bank=rows)[:, :7]
        alone = run(branched, inputs, adapter_ids=ids(1, 1, 1), adapter_bank=rows)[:, :7]
    folded = replace(base, model=folded_model(base, adapters["beside"]))
    headless = replace(adapters["after"], head=None)
    with session(folded_model(folded, headless)) as runner:
        expected = run(runner, inputs)
    assert_parity(expected, found, "branches", "float32")
    assert_caught(expected, alone, "branches", "float32")


# -- heads ----------------------------------------------------------------------------------------


def run_pair(base: BaseGraph, reserve: Reserve, rows: Sequence[int]) -> tuple[Floats, Plan]:
    adapters = pair(base)
    plan = plan_branches(base.facts, adapters, reserve)
    with session(branched_model(base, plan)) as branched:
        bank = bank_of(plan, adapters)
        return run(branched, images(len(rows)), adapter_ids=ids(*rows), adapter_bank=bank), plan


def test_columns_past_an_adapters_classes_are_minus_infinity(base):
    found, plan = run_pair(base, Reserve(max_classes=11), (1, 2, 2, 1))
    assert found.shape == (4, 11) == (4, plan.classes)
    for logits, classes in zip(found, (7, 3, 3, 7), strict=True):
        assert np.isfinite(logits[:classes]).all()
        assert np.isneginf(logits[classes:]).all()


def test_a_kept_classifier_is_for_row_zero_alone(base):
    found, _ = run_pair(base, Reserve(keep_backbone_head=True), (0, 1, 0, 2))
    assert found.shape == (4, 1000)
    assert np.isfinite(found[[0, 2]]).all()
    assert np.isneginf(found[1, 7:]).all()
    assert np.isneginf(found[3, 3:]).all()
    assert np.isfinite(found[3, :3]).all()


def test_room_for_more_classes_than_the_backbone_has():
    base = shared_twice()
    adapters = {"wide": random_adapter(base.facts, targets=["proj"], classes=17)}
    plan = plan_branches(base.facts, adapters, Reserve(keep_backbone_head=True))
    model = branched_model(base, plan)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    with session(model) as branched, session(base.model) as bare:
        x = random(3, 5, 7)
        bank = bank_of(plan, adapters)
        found = run(branched, x, adapter_ids=ids(1, 0, 1), adapter_bank=bank)
        expected = run(bare, x)
    assert found.shape == (3, 17)
    assert np.isfinite(found[[0, 2]]).all()
    assert found[1, :9].tobytes() == expected[1].tobytes()
    assert np.isneginf(found[1, 9:]).all()


def test_without_heads_the_classifier_is_left_alone(vit):
    adapters = {"bare": random_adapter(vit.facts, classes=None)}
    plan = plan_branches(vit.facts, adapters, Reserve())
    model = branched_model(vit, plan)
    assert not any((n.name or "").startswith("branch/head/") for n in model.graph)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    with session(model) as branched, session(folded_model(vit, adapters["bare"])) as folded:
        bank = bank_of(plan, adapters)
        found = run(branched, images(2), adapter_ids=ids(1, 1), adapter_bank=bank)
        assert_parity(run(folded, images(2)), found, "branches", "float32")
        zero = run(branched, images(2), adapter_ids=ids(0, 0), adapter_bank=bank)
        assert_caught(run(folded, images(2)), zero, "branches", "float32")


def classified(text: str) -> BaseGraph:
    weights = {"w": random(7, 7), "head_w": random(7, 9), "axes": np.asarray([1], np.int64)}
    model = graph(text, weights, {"p": PROJ, "c": "head"})
    return base_of(model, {PROJ: (7, 7)}, 7)


def test_a_classifier_that_is_not_last():
    base = classified("""agraph (float[batch, 5, 7] images) => (float[batch, 9] logits) {
        p = MatMul(images, w)  pooled = ReduceMean<keepdims=0>(p, axes)
        c = MatMul(pooled, head_w)  logits = Relu(c)
    }""")
    plan = plan_branches(base.facts, {"a": random_adapter(base.facts, targets=["proj"])}, Reserve())
    with pytest.raises(BackboneError, match=r"synthetic: the classifier head is not the last"):
        branched_model(base, plan)


def test_a_classifier_that_takes_tokens():
    base = classified("""agraph (float[batch, 5, 7] images) => (float[batch, 5, 9] logits) {
        p = MatMul(images, w)  logits = MatMul(p, head_w)
    }""")
    model = base.model
    model.graph.outputs[0].producer().metadata_props[LINEAR_TAG] = "head"
    plan = plan_branches(base.facts, {"a": random_adapter(base.facts, targets=["proj"])}, Reserve())
    with pytest.raises(BackboneError, match=r"takes .*expected \[batch, features\]"):
        branched_model(base, plan)


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_a_mixed_batch_is_each_image_alone(base, batch):
    adapters = pair(base)
    plan = plan_branches(base.facts, adapters, Reserve(keep_backbone_head=True))
    bank = bank_of(plan, adapters)
    inputs = images(batch)
    rows = ids(*[(1 + 2 * i) % 3 for i in range(batch)])
    with session(branched_model(base, plan)) as branched:
        mixed = run(branched, inputs, adapter_ids=rows, adapter_bank=bank)
        alone = np.concatenate(
            [
                run(branched, inputs[i : i + 1], adapter_ids=rows[i : i + 1], adapter_bank=bank)
                for i in range(batch)
            ]
        )
        assert_parity(alone, mixed, "branches", "float32")
        rolled = run(branched, inputs, adapter_ids=(rows + 1) % 3, adapter_bank=bank)
    assert not np.array_equal(np.isneginf(rolled), np.isneginf(mixed))
    assert_caught(alone[:, :3], rolled[:, :3], "branches", "float32")


def test_the_same_row_in_another_slot_is_the_same_to_the_bit(vit):
    adapters = pair(vit)
    plan = plan_branches(vit.facts, adapters, Reserve())
    bank = bank_of(plan, adapters)
    wide = random(40, plan.layout.size)
    wide[[31, 5]] = bank[[1, 2]]
    with session(branched_model(vit, plan)) as branched:
        few = run(branched, images(3), adapter_ids=ids(1, 2, 1), adapter_bank=bank)
        many = run(branched, images(3), adapter_ids=ids(31, 5, 31), adapter_bank=wide)
    assert few.tobytes() == many.tobytes()


# -- images apart ---------------------------------------------------------------------------------


def test_tokens_before_the_batch_cannot_have_a_branch():
    """[tokens, batch, features]: a reshape to [batch, tokens, features] would mix the images."""
    backbone = tiny_backbone("python:tests.own_models:tokens_first", depth=1)
    base = base_graph(backbone, None)
    with pytest.raises(PlanError, match=r"encoder\.layers\.0\.linear1 .*not lie one after the"):
        branched_model(base, plan_branches(base.facts, {}, Reserve(sites=("fc1",), max_classes=3)))
    # Attention is traced images first, whatever the model does around it.
    plan = plan_branches(base.facts, {}, Reserve(sites=("q", "proj"), max_classes=3))
    assert branched_model(base, plan)


def test_an_input_that_no_image_reaches_has_a_branch():
    """A class token before it looks at the image: one row for each image."""
    base = base_graph(tiny_backbone("python:tests.own_models:class_token"), None)
    adapters = {
        name: random_adapter(base.facts, targets=["q", "k"], classes=7, seed=seed, scale=0.5)
        for seed, name in enumerate(("one", "two"))
    }
    plan = plan_branches(base.facts, adapters, Reserve())
    inputs = random(5, *base.facts.preprocess.input_size)
    rows = ids(1, 2, 0, 2, 1)
    with session(branched_model(base, plan)) as branched:
        bank = bank_of(plan, adapters)
        found = run(branched, inputs, adapter_ids=rows, adapter_bank=bank)
    for row, name in enumerate(plan.names, start=1):
        with session(folded_model(base, adapters[name])) as folded:
            expected = run(folded, inputs)[rows == row]
        assert_parity(expected, found[rows == row, :7], "branches", "float32")
        with session(base.model) as bare:
            assert_caught(run(bare, inputs)[rows == row], expected, "branches", "float32")


def test_two_tokens_are_not_two_images():
    """[2, batch, features]: with a batch of two, the shapes alone do not tell."""
    base = base_graph(tiny_backbone("python:tests.own_models:class_tokens_first"), None)
    with pytest.raises(PlanError, match=r"attn\.query .*not lie one after the"):
        branched_model(base, plan_branches(base.facts, {}, Reserve(sites=("q",), max_classes=3)))
    plan = plan_branches(base.facts, {}, Reserve(sites=("k", "v"), max_classes=3))
    assert branched_model(base, plan)


# -- a fused qkv ----------------------------------------------------------------------------------

QKV = """agraph (float[batch, 2, IN] images) => (float[batch, 9] logits) {
    p = MatMul(images, w)  a = Add(p, b)
    h = Reshape(a, shape)  t = Transpose<perm=[2,0,3,1,4]>(h)
    q1 = Slice(t, zero, one, zero)  q = Squeeze(q1, zero)
    k1 = Slice(t, one, two, zero)  k = Squeeze(k1, zero)
    v1 = Slice(t, two, three, zero)  v = Squeeze(v1, zero)
    qk = Mul(q, k)  again = Mul(qk, q)  y = Add(again, v)
    pooled = ReduceMean<keepdims=0>(y, axes)  logits = Gemm<transB=1>(pooled, head_w, head_b)
}"""
# Views that are not the known: tokens before heads, or a product with the bias inside.
TOKENS_FIRST = QKV.replace("perm=[2,0,3,1,4]", "perm=[2,0,1,3,4]")
INSIDE = QKV.replace("[batch, 2, IN]", "[batch, IN]").replace(
    "p = MatMul(images, w)  a = Add(p, b)", "a = Gemm<transB=1>(images, w, b)"
)


def of_one_linear(text: str, path: str, in_: int = 5) -> BaseGraph:
    """One Linear of 18 features, which are taken apart, and a classifier."""
    inside = "Gemm<transB=1>(images" in text
    weights = {"w": random(18, in_) if inside else random(in_, 18), "b": random(18)}
    weights |= {"head_w": random(9, 3), "head_b": random(9), "axes": np.asarray([1, 2])}
    numbers = {"zero": 0, "one": 1, "two": 2, "three": 3}
    weights |= {name: np.asarray([number]) for name, number in numbers.items()}
    weights["shape"] = np.asarray([0, 1 if inside else 2, 3, 2, 3])
    first = "a" if inside else "p"
    model = graph(text.replace("IN", str(in_)), weights, {first: path, "logits": "head"})
    return base_of(model, {path: (18, in_)}, 3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("text", [QKV, TOKENS_FIRST, INSIDE], ids=["known", "tokens", "inside"])
@pytest.mark.parametrize("target", ["qkv", "proj", "proj:sequential"])
def test_however_a_linear_is_written_and_read(target, text, bias):
    """Narrow and wide: its input is padded, or cut, to meet the diagonal."""
    kind, _, form = target.partition(":")
    targets = ["q", "k", "v"] if kind == "qkv" else [kind]
    if not bias:
        text = text.replace("w, b)", "w)").replace(
            "a = Add(p, b)\n    h = Reshape(a", "h = Reshape(p"
        )
    for in_ in (4, 20):
        base = of_one_linear(text, f"blocks.0.attn.{kind}", in_)
        adapter = random_adapter(
            base.facts, form=form or "additive", targets=targets, r=2, classes=3, parts=PARTS
        )
        plan = plan_branches(base.facts, {"one": adapter}, Reserve(keep_backbone_head=True))
        inputs = random(3, *(int(n) for n in base.model.graph.inputs[0].shape[1:]))
        with session(folded_model(base, adapter)) as folded, session(base.model) as bare:
            expected, zero = run(folded, inputs), run(bare, inputs)
        with session(branched_model(base, plan)) as branched:
            bank = bank_of(plan, {"one": adapter})
            found = run(branched, inputs, adapter_ids=ids(1, 0, 1), adapter_bank=bank)
        assert_parity(expected[[0, 2]], found[[0, 2], :3], "branches", "float32")
        assert_parity(zero[[1]], found[[1]], "branches", "float32")
        assert_caught(expected, zero[:, :3], "branches", "float32")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("Slice(t, one, two, zero)", "Slice(t, zero, one, zero)"),  # queries as keys
        ("Slice(t, two, three, zero)", "Slice(t, one, two, zero)"),  # no values
        ("k1 = Slice(t, one, two, zero)  k = Squeeze(k1, zero)", "k = Identity(q)"),
        ("h = Reshape(a, shape)", "g = Gelu(a)  h = Reshape(g, shape)"),
        # Read by others, too.
        ("y = Add(again, v)", "m = ReduceMean<keepdims=0>(a)  n = Add(again, v)  y = Add(n, m)"),
        ("y = Add(again, v)", "m = ReduceMean<keepdims=0>(t)  n = Add(again, v)  y = Add(n, m)"),
        ("qk = Mul(q, k)", "o1 = Slice(t, zero, one, zero)  o = Squeeze(o1, zero)  qk = Mul(o, k)"),
        ("perm=[2,0,3,1,4]", "perm=[2,0,1,3,4]"),
    ],
)
def test_a_qkv_is_taken_apart_where_its_views_are_those_that_are_known(right, wrong):
    def views_of(text: str):
        ((linear,), _) = linears_by_path(of_one_linear(text, "attn.qkv").model.graph).values()
        return qkv_views(linear)

    views = views_of(QKV)
    assert views is not None
    assert views.shape == (0, 2, 2, 3)
    assert [part.name for part in views.parts] == ["q", "k", "v"]
    assert right in QKV
    assert views_of(QKV.replace(right, wrong)) is None


# -- whose bias rides -----------------------------------------------------------------------------

LAYER = """agraph (float[batch, 3, 5] x, float[batch, 3, 7] r) => (float[batch, 3, 7] y) {{
    p = MatMul(x, w)  a = Add(p, b)  {rest}
}}"""


@pytest.mark.parametrize(
    ("rest", "rides"),
    [
        ("y = Identity(a)", True),
        ("y = Mul(a, c)", True),
        ("y = Mul(a, r)", False),
        ("y = Gelu(a)", False),
        ("s = Sigmoid(a)  y = Mul(a, s)", False),
        ("y = Add(r, a)", True),
        ("s = Add(r, a)  y = LayerNormalization(s, c)", False),
        ("s = Add(r, a)  n = LayerNormalization(s, c)  y = Add(n, s)", True),
        ("i = Identity(a)  g = Gelu(a)  y = Add(i, g)", False),
    ],
)
def test_a_bias_rides_where_no_runtime_fuses_it(rest, rides):
    """Read from what follows: a Linear's name says nothing."""
    weights = {"w": random(5, 7), "b": random(7), "c": random(7)}
    model = graph(LAYER.format(rest=rest), weights, {})
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert _bias_may_ride(linear_of(product, "mlp.fc1")) is rides


def test_ids_that_are_no_row(small):
    """What docs/formats.md says of them, for those who run the graph themselves."""
    bundle = Bundle.open(small)
    bank, size = bundle.bank(), bundle.manifest.input_size
    runner = ort.InferenceSession(small / "model.onnx", providers=["CPUExecutionProvider"])
    images = np.ones((1, *size), np.float32)

    def logits(row: int) -> Floats:
        feed = {"images": images, "adapter_ids": np.array([row]), "adapter_bank": bank}
        return runner.run(["logits"], feed)[0]

    assert not bundle.manifest.layout.backbone_head
    assert not logits(0).any()
    assert np.array_equal(logits(-1), logits(len(bank) - 1))
    with pytest.raises(Exception, match="out of data bounds"):
        logits(len(bank))
