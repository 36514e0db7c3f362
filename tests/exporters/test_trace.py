"""The base graph: tags, order, symbolic batch, opset, cache, and what tracing leaves behind."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.sites import linear_spec
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.backbones.structure import find_linears
from hhdeploy.errors import BackboneError
from hhdeploy.exporters import trace as trace_module
from hhdeploy.exporters.fold import folded_model
from hhdeploy.exporters.trace import base_graph, default_cache, trace
from hhdeploy.exporters.writer import save_graph
from hhdeploy.files.caches import CacheWarning, clear, stored_in
from hhdeploy.graph import LINEAR_TAG, linears_by_path
from tests.exporters.synthetic import fingerprint, graph, random
from tests.parity.architectures import traced
from tests.parity.ladder import run, session
from tests.support import (
    assert_caught,
    assert_parity,
    images,
    logits_of,
    random_adapter,
    tiny_backbone,
    tiny_spec,
)

MODELS = ("vit", "swin", "beit")


def no_tracing(*args, **kwargs):
    raise AssertionError("traced again")


# -- tags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_is_tagged_with_its_own_weight(name):
    backbone, base = traced(name)
    found = linears_by_path(base.model.graph)
    paths = [linear.path for linear in find_linears(backbone.model)]
    assert paths
    for path in (*paths, base.facts.classifier):
        (linear,) = found[path]
        module = backbone.model.get_submodule(path)
        assert np.array_equal(linear.weight, module.weight.numpy()), path
        if module.bias is not None:
            assert np.array_equal(linear.bias, module.bias.numpy()), path
        assert linear.node.name == f"{path}/{linear.node.op_type}"
    assert {linear.path for linear in base.facts.linears} == set(paths)


def test_qkv_without_a_linear_call_has_its_bias_from_its_parts():
    """BEiT calls F.linear on the weight and concatenates q_bias, zeros and v_bias."""
    backbone, base = traced("beit")
    attention = backbone.model.get_submodule("blocks.1.attn")
    (linear,) = linears_by_path(base.model.graph)["blocks.1.attn.qkv"]
    zeros = np.zeros_like(attention.q_bias.numpy())
    parts = [attention.q_bias.numpy(), zeros, attention.v_bias.numpy()]
    assert attention.qkv.bias is None
    assert np.array_equal(linear.bias, np.concatenate(parts))


def test_execution_order_comes_from_the_graph():
    backbone, base = traced("swin")
    called: list[str] = []
    hooks = [
        backbone.model.get_submodule(linear.path).register_forward_hook(
            lambda *_, path=linear.path: called.append(path)
        )
        for linear in base.facts.linears
    ]
    with torch.no_grad():
        backbone.model(torch.from_numpy(images(1)))
    for hook in hooks:
        hook.remove()
    assert [linear.path for linear in base.facts.linears] == called


def cached_with_facts(tmp_path: Path, **changes) -> BackboneFacts:
    """The facts that come out of a cached graph when other facts go in."""
    backbone, base = traced("vit")
    with mock.patch.object(trace_module, "trace", return_value=base.model):
        return base_graph(
            replace(backbone, facts=replace(backbone.facts, **changes)), tmp_path
        ).facts


def test_facts_are_sorted_into_execution_order(tmp_path):
    facts = traced("vit")[1].facts
    found = cached_with_facts(tmp_path, linears=facts.linears[::-1])
    assert found.linears == facts.linears


def test_a_linear_that_the_model_never_calls_is_no_site(tmp_path):
    facts = traced("vit")[1].facts
    unused = linear_spec("blocks.9.attn.proj", 48, 48)
    assert unused is not None
    assert cached_with_facts(tmp_path, linears=(unused, *facts.linears)).linears == facts.linears


def test_a_classifier_that_the_model_never_calls(tmp_path):
    with pytest.raises(BackboneError, match=r"vit_tiny.*classifier head\.fc was not found"):
        cached_with_facts(tmp_path, classifier="head.fc")


# -- the graph ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_batch_is_symbolic_and_the_opset_is_20(name):
    backbone, base = traced(name)
    graph = base.model.graph
    assert base.model.opset_imports == {"": 20}
    (inputs,), (outputs,) = graph.inputs, graph.outputs
    assert (inputs.name, outputs.name) == ("images", "logits")
    assert (inputs.dtype, outputs.dtype) == (ir.DataType.FLOAT, ir.DataType.FLOAT)
    assert inputs.shape is not None
    assert outputs.shape is not None
    assert [str(d) for d in inputs.shape] == ["batch", "3", "32", "32"]
    assert [str(d) for d in outputs.shape] == ["batch", "1000"]
    assert "Attention" not in {node.op_type for node in graph}
    proto = ir.to_proto(base.model)
    onnx.checker.check_model(proto, full_check=True)
    with session(base.model) as runner:
        for batch in (1, 2, 3, 7):
            found = run(runner, images(batch))
            with torch.no_grad():
                expected = backbone.model(torch.from_numpy(images(batch))).numpy()
            assert_parity(expected, found, "folded", "float32")
        assert_caught(expected, run(runner, images(7, seed=1)), "folded", "float32")


def test_the_graph_carries_nothing_of_the_machine_that_traced_it():
    content = fingerprint(traced("vit")[1].model)
    for trace_of in (b"site-packages", b"pkg.torch", b"stack_trace", b".py"):
        assert trace_of not in content


# -- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_fused_attention_is_restored(name):
    backbone, _ = traced(name)
    flags = [m.fused_attn for m in backbone.model.modules() if hasattr(m, "fused_attn")]
    assert flags == [True, True]


def test_fused_attention_is_restored_when_tracing_fails(tiny, capsys):
    seen = []

    def refuse(model, *args, **kwargs):
        seen.extend(m.fused_attn for m in model.modules() if hasattr(m, "fused_attn"))
        raise RuntimeError("cannot view a tensor\nsecond line")

    with (
        mock.patch("torch.onnx.export", refuse),
        pytest.raises(
            BackboneError, match=r"could not trace vit_tiny\S* with .*: RuntimeError: cannot view"
        ) as caught,
    ):
        trace(tiny)
    assert "second line" not in str(caught.value)
    assert seen == [False, False]
    assert all(m.fused_attn for m in tiny.model.modules() if hasattr(m, "fused_attn"))


def test_a_model_that_does_not_compute_is_not_called_untraceable(tiny):
    facts = tiny.facts
    wrong = replace(facts, preprocess=replace(facts.preprocess, input_size=(3, 40, 32)))
    with pytest.raises(
        BackboneError, match=r"does not compute on images \[2, 3, 40, 32\] alone: \w+: .*input_size"
    ):
        trace(replace(tiny, facts=wrong))


def test_a_model_that_fixes_the_batch_is_refused():
    """torch specialises the graph to the two images of the example, and says nothing."""
    backbone = tiny_backbone(depth=1)

    class Fixed(type(backbone.model)):
        def forward(self, x):
            return super().forward(x).reshape(len(x), -1)

    backbone.model.__class__ = Fixed
    with pytest.raises(BackboneError, match=r"images has the shape \[2,.*fixes the number"):
        base_graph(backbone, None)


def test_unfused_attention_stays_unfused(tiny):
    first = tiny.model.get_submodule("blocks.0.attn")
    first.fused_attn = False
    with mock.patch("torch.onnx.export", no_tracing), pytest.raises(BackboneError):
        trace(tiny)
    assert not first.fused_attn
    assert tiny.model.get_submodule("blocks.1.attn").fused_attn


# -- shared initializers ------------------------------------------------------------------------


def test_a_large_linear_that_is_called_twice_has_one_weight():
    """As CoaT's MLPs have, and ViTs whose blocks share their weights."""
    backbone = load_backbone(BackboneSpec("python:tests.own_models:repeating"))
    base = base_graph(backbone, None)
    found = linears_by_path(base.model.graph)["fc1"]
    assert [linear.node.inputs[1].name for linear in found] == ["fc1.weight_t"] * 2
    inputs = images(2, size=16)
    with session(base.model) as runner:
        logits = run(runner, inputs)
    assert_parity(logits_of(backbone.model, inputs), logits, "folded", "float32")


def test_a_weight_is_read_once_in_each_order_of_its_dimensions():
    text = """agraph (float[3, 3] images) => (float[3, 3] logits) {
        a = Transpose<perm=[1,0]>(w)  b = Transpose<perm=[1,0]>(w)  c = Transpose<perm=[0,1]>(w)
        d = Transpose<perm=[1,0]>(images)  e = Transpose<perm=[1,0]>(images)
        ab = MatMul(a, b)  cd = MatMul(c, d)  abe = MatMul(ab, e)  logits = Add(abe, cd)
    }"""
    model, x = graph(text, {"w": random(3, 3)}, {}), random(3, 3)
    with session(model) as before:
        expected = run(before, x)
    trace_module._read_once(model.graph)
    left = [n.outputs[0].name for n in model.graph if n.op_type == "Transpose"]
    assert left == ["a", "c", "d", "e"]
    with session(model) as after:
        assert np.array_equal(run(after, x), expected)


def test_pads_of_nothing_are_gone():
    text = """agraph (float[3, 3] images) => (float[3, 4] y, float[3, 4] z) {
        a = Pad(images, nothing)  b = Pad(a, something)  y = Relu(b)  z = Pad(b, nothing)
    }"""
    pads = {"nothing": np.asarray([0, 0, 0, 0]), "something": np.asarray([0, 0, 0, 1])}
    model = graph(text, pads, {})
    trace_module._remove_empty_pads(model.graph)
    assert [node.outputs[0].name for node in model.graph] == ["b", "y", "z"]


def test_outputs_but_the_logits_have_nodes_of_their_own():
    text = """agraph (float[3, 3] images) => (float[3, 3] logits, float[3, 3] features) {
        features = Relu(images)  logits = Neg(features)
    }"""
    model, x = graph(text, {}, {}), random(3, 3)
    trace_module._set_apart(model.graph)
    assert [node.op_type for node in model.graph] == ["Relu", "Identity", "Neg"]
    logits, features = model.graph.outputs
    assert (logits.name, features.name) == ("logits", "features")
    assert logits.producer().op_type == "Neg"
    assert features.producer().op_type == "Identity"
    assert not features.uses()
    with session(model) as found:
        for output, expected in (("features", np.maximum(x, 0)), ("logits", -np.maximum(x, 0))):
            assert np.array_equal(found.run([output], {"images": x})[0], expected)


def test_folding_one_layer_leaves_its_twins_alone():
    """Equal tensors become one initializer: editing it in place would change every layer."""
    backbone = load_backbone(tiny_spec(num_classes=48))
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if name.endswith(("proj.bias", "fc2.bias")):
                parameter.fill_(0.25)
        backbone.model.get_submodule("blocks.1.attn.proj").weight.copy_(
            backbone.model.get_submodule("blocks.0.attn.proj").weight
        )
        backbone.model.get_submodule("head").weight.normal_(
            std=0.3, generator=torch.Generator().manual_seed(2)
        )
    base = base_graph(backbone, None)
    graph = base.model.graph
    biases = [
        linear.bias_node.inputs[linear.bias_index]
        for path in ("blocks.0.attn.proj", "blocks.1.attn.proj", "blocks.1.mlp.fc2")
        for linear in linears_by_path(graph)[path]
        if linear.bias_node is not None
    ]
    assert len(biases) == 3
    assert len(set(biases)) == 1, "the tracer no longer shares: this test has lost its point"
    before = fingerprint(base.model)
    adapter = random_adapter(base.facts, form="sequential", targets=["blocks.0.attn.proj"])
    folded = folded_model(base, adapter)
    assert fingerprint(base.model) == before
    inputs = images(3)
    with session(folded) as runner:
        found = run(runner, inputs)
    from hhdeploy.training import attach, detach

    # The weights were changed after their digest was taken.
    attach(backbone.model, replace(adapter, config=replace(adapter.config, base_sha256=None)))
    reference = logits_of(backbone.model, inputs)
    detach(backbone.model.float())
    assert_parity(reference, found, "folded", "float32")
    # The mistake: the shared bias edited in place.
    edited = folded_model(base, adapter)
    by_path = linears_by_path(edited.graph)
    (first,), (twin,) = by_path["blocks.0.attn.proj"], by_path["blocks.1.attn.proj"]
    assert first.bias is not None
    twin.set_bias(edited.graph, "edited", first.bias)
    with session(edited) as runner:
        assert_caught(reference, run(runner, inputs), "folded", "float32")


# -- cache --------------------------------------------------------------------------------------


def test_a_hit_is_the_traced_graph_and_traces_nothing(tmp_path):
    backbone, base = traced("vit")
    with mock.patch.object(trace_module, "trace", return_value=base.model) as tracing:
        stored = base_graph(backbone, tmp_path)
    tracing.assert_called_once()
    with mock.patch.object(trace_module, "trace", no_tracing):
        hit = base_graph(tiny_backbone(), tmp_path)
    assert hit.facts == stored.facts == base.facts
    tags = [n.metadata_props.get(LINEAR_TAG) for n in base.model.graph]
    assert [n.metadata_props.get(LINEAR_TAG) for n in hit.model.graph] == tags
    with session(base.model) as ours, session(hit.model) as cached:
        assert np.array_equal(run(ours, images(2)), run(cached, images(2)))


def test_whatever_the_graph_depends_on_is_in_the_key(tmp_path, tiny):
    base = traced("vit")[1]
    with mock.patch.object(trace_module, "trace", return_value=base.model) as tracing:

        def misses(backbone):
            before = tracing.call_count
            base_graph(backbone, tmp_path)
            return tracing.call_count > before

        facts = tiny.facts
        assert misses(tiny)
        assert not misses(tiny)
        assert misses(replace(tiny, facts=replace(facts, model="vit_tiny_patch16_224.other")))
        assert misses(replace(tiny, facts=replace(facts, args={**facts.args, "depth": 2.0})))
        wider = replace(facts.preprocess, input_size=(3, 32, 40))
        assert misses(replace(tiny, facts=replace(facts, preprocess=wider)))
        assert misses(replace(tiny, traced_with=("timm 0.0",)))
        with torch.no_grad():
            tiny.model.get_submodule("blocks.0.attn.proj").bias[3] += 1e-6
        assert misses(tiny)
        with mock.patch.object(trace_module, "OPSET", 21):
            assert misses(tiny)


def test_a_model_of_a_function_is_never_cached(tmp_path):
    """The same weights, the same name, another forward: nobody could tell."""
    backbone, base = traced("vit")
    unknown = replace(backbone, traced_with=None)
    with mock.patch.object(trace_module, "trace", return_value=base.model) as tracing:
        base_graph(unknown, tmp_path)
        base_graph(unknown, tmp_path)
    assert tracing.call_count == 2
    assert not list(tmp_path.iterdir())


def test_without_a_cache_nothing_is_stored(tmp_path, monkeypatch):
    backbone, base = traced("vit")
    monkeypatch.setenv("HHDEPLOY_CACHE", str(tmp_path / "cache"))
    assert default_cache() == tmp_path / "cache"
    with mock.patch.object(trace_module, "trace", return_value=base.model):
        base_graph(backbone, None)
        assert not (tmp_path / "cache").exists()
        base_graph(backbone, default_cache())
    assert (tmp_path / "cache" / "base").is_dir()


def test_a_disk_that_fills_up_under_the_cache_takes_no_graph_back(tmp_path, monkeypatch):
    backbone, base = traced("vit")
    monkeypatch.setattr(trace_module, "write_json", full_disk)
    with (
        mock.patch.object(trace_module, "trace", return_value=base.model),
        pytest.warns(CacheWarning, match="not kept .* The disk is full"),
    ):
        graph = base_graph(backbone, tmp_path)
    assert list((tmp_path / "base").iterdir()) == []
    with session(base.model) as ours, session(graph.model) as theirs:
        assert np.array_equal(run(ours, images(2)), run(theirs, images(2)))


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def stored(tmp_path):
    """(backbone, cache with its graph, the entry); tracing again is an error."""
    backbone, base = traced("vit")
    with mock.patch.object(trace_module, "trace", return_value=base.model):
        base_graph(backbone, tmp_path)
    with mock.patch.object(trace_module, "trace", no_tracing):
        yield backbone, tmp_path, next((tmp_path / "base").iterdir())


@pytest.mark.parametrize("found", [True, False])
def test_a_graph_outlives_its_entry(tmp_path, stored, found):
    """Another process evicts it between its opening and its use."""
    backbone, cache, _ = stored
    base = traced("vit")[1]
    if found:
        graph = base_graph(backbone, cache)
    else:
        clear(cache)
        with mock.patch.object(trace_module, "trace", return_value=base.model):
            graph = base_graph(backbone, cache)
    assert len(clear(cache)) == 1
    save_graph(graph.model, tmp_path / "model.onnx")
    original = {n: v.const_value.numpy() for n, v in base.model.graph.initializers.items()}
    written = ir.load(tmp_path / "model.onnx").graph.initializers
    assert set(written) == set(original)
    for name, value in written.items():
        assert np.array_equal(value.const_value.numpy(), original[name]), name


def test_a_graph_that_vanishes_while_it_is_read_is_traced_again(stored):
    backbone, cache, entry = stored
    base, loads = traced("vit")[1], json.loads

    def gone(text):
        clear(cache)
        return loads(text)

    with (
        mock.patch.object(trace_module.json, "loads", gone),
        mock.patch.object(trace_module, "trace", return_value=base.model) as tracing,
    ):
        base_graph(backbone, cache)
    tracing.assert_called_once()
    assert entry.is_dir()


@pytest.mark.parametrize("hashes", ["{}", "[]", "null", "{", '{"model.onnx": 1}'])
def test_a_graph_whose_hashes_are_not_all_there_is_not_used(stored, hashes):
    backbone, cache, entry = stored
    (entry / "sha256.json").write_text(hashes)
    with pytest.raises(AssertionError, match="traced again"):
        base_graph(backbone, cache)


def test_a_graph_larger_than_the_limit_is_used_and_not_kept(stored, monkeypatch):
    backbone, cache, _ = stored
    monkeypatch.setenv("HHDEPLOY_CACHE_LIMIT", "1kB")
    clear(cache)
    base = traced("vit")[1]
    with mock.patch.object(trace_module, "trace", return_value=base.model):
        graph = base_graph(backbone, cache)
    assert list((cache / "base").iterdir()) == []
    with session(base.model) as ours, session(graph.model) as theirs:
        assert np.array_equal(run(ours, images(2)), run(theirs, images(2)))


def test_graphs_used_longest_ago_make_room(stored, monkeypatch):
    backbone, cache, entry = stored
    (only,) = stored_in(cache)
    monkeypatch.setenv("HHDEPLOY_CACHE_LIMIT", str(int(1.5 * only.size)))
    other = replace(backbone, facts=replace(backbone.facts, model="vit_tiny_patch16_224.other"))
    base = traced("vit")[1]
    with mock.patch.object(trace_module, "trace", return_value=base.model):
        base_graph(other, cache)
    assert not entry.exists()
    assert len(stored_in(cache)) == 1
