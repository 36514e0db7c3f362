"""The float64 reference: as exact as a float64 model, and the model never twice in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from hhdeploy.training import attach
from hhdeploy.verifying.wide import Float64
from tests.support import images, random_adapter, tiny_backbone


@pytest.mark.parametrize("form", ["additive", "sequential"])
def test_as_the_float64_model_and_no_parameter_is_widened(form):
    backbone = tiny_backbone()
    adapter = random_adapter(backbone.facts, form=form, targets=["proj", "fc2"], classes=7)
    model = attach(backbone.model, adapter)
    pictures = torch.from_numpy(images(3))
    seen = []

    def look(*_):
        with torch._C.DisableTorchFunction():  # types as they are
            seen.append({p.dtype for p in model.parameters()})
        assert not parametrize._cache, "adapted weights are kept"

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    with torch.no_grad(), Float64():
        found = model(pictures)
    assert seen
    assert all(types == {torch.float32} for types in seen)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        rounded = model(pictures)
        expected = model.double()(pictures.double())
    assert found.dtype == torch.float64
    error = (found - expected).abs().max()
    assert error < 1e-12
    assert (rounded - expected).abs().max() > 1e4 * error


class Stubborn(torch.nn.Module):
    """Names float32 where a float64 model would lose its digits, and fills a tensor in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.tensor([1 / 3, 1 / 7]))
        self.weight = torch.nn.Parameter(torch.tensor([[0.1, 0.2], [0.3, 0.7]]))

    def forward(self, x):
        y = torch.zeros(x.shape, dtype=torch.float32)
        y[:] = x @ self.weight.T
        return torch.softmax(y.float() + self.offset.to(torch.float32), -1, dtype=torch.float32)


def test_types_that_a_model_names_are_widened_too():
    model, x = Stubborn(), torch.tensor([[0.3, -1.1], [2.0, 0.7]])
    with torch.no_grad(), Float64():
        found = model(x)
    expected = torch.softmax(x.double() @ model.weight.double().T + model.offset.double(), -1)
    assert found.dtype == torch.float64
    np.testing.assert_array_max_ulp(found.numpy(), expected.detach().numpy(), maxulp=2)
    assert model.weight.dtype == torch.float32
