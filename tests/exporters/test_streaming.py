"""Weights on their way from the model to the files: never a second copy of them all in memory."""

from __future__ import annotations

import io
import tracemalloc
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from hhdeploy.backbones.spec import Backbone
from hhdeploy.exporters import trace as trace_module
from hhdeploy.exporters.branches import branched_model
from hhdeploy.exporters.fold import folded_model
from hhdeploy.exporters.trace import BaseGraph, base_graph
from hhdeploy.exporters.writer import save_graph
from hhdeploy.graph import ViewTensor
from hhdeploy.plan import Reserve, plan_branches
from tests.support import random_adapter, tiny_backbone

# Bytes of weights from which a tensor counts: smaller ones are constants of the graph.
LARGE = 10_000


@pytest.fixture(scope="module")
def wide() -> tuple[Backbone, BaseGraph]:
    """A model whose memory is its weights: 3 blocks, 6 MB."""
    backbone = tiny_backbone(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=16,
        embed_dim=186,
        depth=3,
        num_heads=3,
        num_classes=7,
    )
    return backbone, base_graph(backbone, None)


def test_a_traced_graph_shares_the_weights_of_the_model(wide):
    """The transposed ones too: they are views."""
    backbone, base = wide
    own = [p.numpy() for p in backbone.model.parameters()]
    large = [
        value
        for value in base.model.graph.initializers.values()
        if value.const_value.nbytes > LARGE
    ]
    assert len(large) > 3 * 4
    for value in large:
        array = value.const_value.numpy()
        assert any(np.shares_memory(array, parameter) for parameter in own), value.name


@pytest.mark.parametrize("kind", ["fold", "branches"])
def test_a_graph_is_written_weight_by_weight(wide, kind, tmp_path):
    _, base = wide
    weights = sum(v.const_value.nbytes for v in base.model.graph.initializers.values())
    adapter = random_adapter(base.facts, targets=["q", "k", "v", "proj", "fc1", "fc2"])
    tracemalloc.start()
    try:
        if kind == "fold":
            model = folded_model(base, adapter)
        else:
            model = branched_model(base, plan_branches(base.facts, {"a": adapter}, Reserve()))
        save_graph(model, tmp_path / "model.onnx")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    written = (tmp_path / "model.onnx.data").stat().st_size
    assert written > 0.9 * weights
    assert peak < 0.6 * weights, f"{peak} bytes at once for {weights} bytes of weights"


def test_a_stored_graph_is_kept_and_read_weight_by_weight(wide, tmp_path, monkeypatch):
    backbone, base = wide
    weights = sum(v.const_value.nbytes for v in base.model.graph.initializers.values())
    monkeypatch.setattr(trace_module, "_CHUNK", 1 << 16)
    tracemalloc.start()
    try:
        with mock.patch.object(trace_module, "trace", return_value=base.model) as tracing:
            base_graph(backbone, tmp_path / "cache")
            stored = base_graph(backbone, tmp_path / "cache")
        save_graph(stored.model, tmp_path / "model.onnx")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tracing.call_count == 1
    assert (tmp_path / "model.onnx.data").stat().st_size > 0.9 * weights
    assert peak < 0.6 * weights, f"{peak} bytes at once for {weights} bytes of weights"


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_, ml_dtypes.bfloat16])
def test_a_view_is_written_in_its_own_order(dtype):
    values = np.arange(15).reshape(3, 5).astype(dtype)
    for view in (values.T, values[:, 1:], values[1, 2].reshape(())):
        file = io.BytesIO()
        ViewTensor(view, name="view").tofile(file)
        assert file.getvalue() == view.tobytes()
