"""Models that keep what they computed of their parameters, when the parameters are replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hhdeploy.backbones.parameters import forgetting, values_in


class Keeps(nn.Module):
    """As LeViT of timm and of transformers: a table that is computed once in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.kept = nn.Parameter(torch.tensor([1.0, 2.0])), None
        self.frozen = nn.BatchNorm1d(2).eval()

    def train(self, mode: bool = True) -> Keeps:
        super().train(mode)
        self.kept = None if mode else self.kept
        return self

    def forward(self) -> torch.Tensor:
        if self.training:
            return self.table.flip(0)
        if self.kept is None:
            self.kept = self.table.flip(0)
        return self.kept


class Computes(Keeps):
    """As LeViT of its authors: the table is computed when eval mode begins."""

    def train(self, mode: bool = True) -> Keeps:
        super().train(mode)
        self.kept = None if mode else self.table.flip(0)
        return self


@pytest.mark.parametrize("kind", [Keeps, Computes])
@pytest.mark.parametrize("training", [False, True])
def test_a_table_is_computed_of_the_values_that_replace_its_parameter(kind, training):
    model = kind().train(training)
    model.frozen.eval()
    assert model().tolist() == [2.0, 1.0]
    with values_in(model, {"table": np.asarray([3.0, 4.0], np.float32)}, "an adapter"):
        assert model().tolist() == [4.0, 3.0]
    assert model().tolist() == [2.0, 1.0]
    assert (model.training, model.frozen.training) == (training, False)


def test_nothing_is_kept_of_another_type():
    model = Keeps().eval()
    with forgetting(model):
        model.kept = model().double()
    assert model().dtype == torch.float32
