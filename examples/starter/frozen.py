"""Frozen features of a backbone, and a linear classifier fitted on them."""

from __future__ import annotations

from typing import Any

import backbone
import numpy as np
import torch
from torch.nn import functional


@torch.no_grad()
def features(model: Any, pixels: np.ndarray, batch: int = 250) -> torch.Tensor:
    """Return what the classifier sees, float32 [n, width], for uint8 pixels [n, 32, 32, 3]."""
    model.eval()
    parts = [
        model.forward_head(
            model.forward_features(backbone.normalize(pixels[at : at + batch])), pre_logits=True
        )
        for at in range(0, len(pixels), batch)
    ]
    return torch.cat(parts)


def fit_linear(
    found: torch.Tensor, labels: torch.Tensor, classes: int, decay: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit multinomial logistic regression with an L2 penalty to optimality (L-BFGS).

    The features are standardised first, and that is folded into the result, so the returned
    weight [classes, width] and bias [classes] apply to the features as they are.
    """
    mean, spread = found.mean(0), found.std(0) + 1e-6
    scaled = (found - mean) / spread
    weight = torch.zeros(classes, found.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(scaled @ weight.T + bias, labels)
        value = value + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    folded = weight.detach() / spread
    return folded, bias.detach() - folded @ mean
