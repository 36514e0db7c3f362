"""Which inputs hold the images of a batch one after the other, and graphs of one batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hhdeploy.backbones.sites import linear_spec
from hhdeploy.errors import BackboneError
from hhdeploy.exporters.batches import batch_shapes, check_batch, images_apart
from tests.exporters.synthetic import graph

TOKENS, FEATURES = 6, 4
# How a Linear is called with tokens [batch, 6, 4], and whether images are apart in what it takes.
CALLS = {
    "kept": (lambda linear, x: linear(x), True),
    "pooled": (lambda linear, x: linear(x.mean(1)), True),
    "windows": (lambda linear, x: linear(x.reshape(-1, 3, FEATURES)), True),
    "windows_first": (lambda linear, x: linear(x.unflatten(1, (2, 3)).transpose(0, 1)), False),
    "windows_joined": (
        lambda linear, x: linear(x.unflatten(1, (2, 3)).transpose(0, 1).flatten(0, 1)),
        False,
    ),
    "tokens_first": (lambda linear, x: linear(x.transpose(0, 1)), False),
    "turned": (lambda linear, x: linear(x.flip(0)), False),
    "mixed": (lambda linear, x: linear(x + 0.01 * x.mean(0)), False),
    "hardly_mixed": (lambda linear, x: linear(x + 1e-5 * x.mean(0)), True),
    "first_alone": (lambda linear, x: linear(x[:1].expand(x.shape)), False),
    "second_use": (lambda linear, x: linear(x) + linear(x.transpose(0, 1)).mean(0)[:1], False),
    # What no image reaches is told by its shape: of the batch's size, or of two tokens.
    "class_token": (lambda linear, x: linear(x.new_ones(len(x), 1, FEATURES)), True),
    "two_tokens": (lambda linear, x: linear(x.new_ones(2, len(x), FEATURES)), False),
    "three_tokens": (lambda linear, x: linear(x.new_ones(3, len(x), FEATURES)), False),
    "class_token_and_turned": (
        lambda linear, x: linear(x.new_ones(len(x), 1, FEATURES)) + linear(x.flip(0)),
        False,
    ),
    "four_rows": (lambda linear, x: linear(x.new_ones(2 * len(x), FEATURES)), False),
    "by_hand": (lambda linear, x: x @ linear.weight.T, True),
    "by_matmul": (lambda linear, x: torch.matmul(x, other=linear.weight.T), True),
    "by_mm": (lambda linear, x: torch.mm(x.flatten(0, 1), mat2=linear.weight.T), True),
    "by_name": (lambda linear, x: nn.functional.linear(weight=linear.weight, input=x), True),
    "by_hand_turned": (lambda linear, x: x.flip(0) @ linear.weight.T, False),
    "never": (lambda linear, x: x, False),
}


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in CALLS:
            self.add_module(name, nn.Linear(FEATURES, FEATURES))

    def forward(self, images: torch.Tensor) -> None:
        for name, (call, _) in CALLS.items():
            call(getattr(self, name), images[:, 0])


def test_images_are_apart_where_they_lie_one_after_the_other():
    linears = [linear_spec(name, FEATURES, FEATURES) for name in CALLS]
    found = images_apart(Calls().eval(), linears, (1, TOKENS, FEATURES))
    assert found == {name for name, (_, apart) in CALLS.items() if apart}


@pytest.mark.parametrize(
    ("taken", "given", "named"),
    [("batch", "batch", None), ("2", "batch", "x"), ("batch", "2", "y")],
)
def test_a_graph_takes_and_gives_any_number_of_images(taken, given, named):
    model = graph(
        f"agraph (float[{taken}, 3] x) => (float[{given}, 3] y) {{ y = Relu(x) }}", {}, {}
    )
    if named is None:
        check_batch(model, "m")
        return
    with pytest.raises(BackboneError, match=rf"m: .*, {named} has the shape .*fixes the number"):
        check_batch(model, "m")


def test_the_shapes_of_a_call_follow_its_signature():
    class Wrapped(nn.Module):
        def forward(self, *args, **kwargs):
            return args

    assert batch_shapes(Calls(), "b") == ({0: "b"},)
    assert batch_shapes(Wrapped(), "b") == (({0: "b"},),)
