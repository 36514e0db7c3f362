"""Folded weights in torch on the GPU, without ONNX or TensorRT, and models that train there."""

from __future__ import annotations

import pytest

from hhdeploy.adapters.format import load_adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.outputs import base_answer
from hhdeploy.parity import compare
from tests.gpu.folding import folded_in_torch, logits_in_torch, products_in
from tests.gpu.scale import SCALE
from tests.gpu.workbench import TYPED
from tests.support import assert_caught, assert_parity


@pytest.mark.parametrize("precision", TYPED)
@pytest.mark.parametrize("model", SCALE.models)
def test_folded_weights_in_torch(torch_device, workbench, model, precision, record):
    made = workbench.model(model)
    errors = []
    for name in sorted(set(made.truth().names) - {None}):
        truth = made.truth_of(name)
        adapter = load_adapter(made.adapter(name))
        network = folded_in_torch(made.spec, adapter)
        found = logits_in_torch(network, truth.images, precision, torch_device)
        own = truth.logits[:, : found.shape[1]]
        errors.append(compare(own, found).range_error)
        record(model=model, graph="torch", precision=precision, range_error=max(errors))
        assert_parity(own, found, "engine", precision)


def test_the_wrong_adapter_is_caught_in_torch(torch_device, workbench):
    made = workbench.model(SCALE.models[0])
    right, wrong = made.pair
    truth = made.truth_of(right)
    network = folded_in_torch(made.spec, load_adapter(made.adapter(wrong)))
    found = logits_in_torch(network, truth.images, "float32", torch_device)
    assert_caught(truth.logits[:, : found.shape[1]], found, "engine", "float32")


@pytest.mark.parametrize("products", ["ieee", "tf32"])
@pytest.mark.parametrize("model", SCALE.models)
def test_a_training_there_is_of_the_model_here(torch_device, workbench, model, products, record):
    """What `attach` keeps of a model on the GPU is what `export` finds on the CPU, also where
    products are rounded to TensorFloat-32, as convolutions are unless told otherwise."""
    backbone = load_backbone(workbench.model(model).spec)
    network, facts = backbone.model, backbone.facts
    size = facts.preprocess.input_size
    here = base_answer(network, facts.classifier, size)
    with products_in(products):
        there = base_answer(network.to(torch_device), facts.classifier, size, certain=True)
    assert here is not None
    assert there is not None
    distance = here.distance(there)
    record(model=model, products=products, full_precision=there.full_precision, distance=distance)
    assert distance is not None
    assert distance <= here.bound(there)
