"""Folded weights in torch on the GPU, without ONNX, ONNX Runtime or TensorRT."""

from __future__ import annotations

import pytest

from hhdeploy.adapter import load_adapter
from hhdeploy.parity import compare
from tests.gpu.folding import folded_in_torch, logits_on_gpu
from tests.gpu.workbench import MODELS, TYPED
from tests.support import assert_caught, assert_parity

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("precision", TYPED)
@pytest.mark.parametrize("model", MODELS)
def test_folded_weights(torch_cuda, workbench, model, precision, record):
    made = workbench.model(model)
    errors = []
    for name in sorted(set(made.truth().names) - {None}):
        truth = made.truth_of(name)
        adapter = load_adapter(made.adapter(name))
        network = folded_in_torch(made.spec, adapter)
        found = logits_on_gpu(network, truth.images, precision)
        own = truth.logits[:, : found.shape[1]]
        errors.append(compare(own, found).range_error)
        record(range_error=max(errors))
        assert_parity(own, found, "engine", precision)


def test_the_wrong_adapter_is_caught(torch_cuda, workbench):
    made = workbench.model("starter")
    right, wrong = made.pair
    truth = made.truth_of(right)
    network = folded_in_torch(made.spec, load_adapter(made.adapter(wrong)))
    found = logits_on_gpu(network, truth.images, "float32")
    assert_caught(truth.logits[:, : found.shape[1]], found, "engine", "float32")
