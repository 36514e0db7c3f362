"""Random views of images for pre-training."""

from __future__ import annotations

import torch
from torch.nn import functional


def _uniform(n: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(n) * (high - low) + low


def random_views(images: torch.Tensor) -> torch.Tensor:
    """Return one random view of every image, [n, 3, height, width], values in -1 .. 1.

    A view is rotated by up to 14 degrees, scaled (0.75 to 1.3), stretched, sheared and shifted;
    its gamma changes (0.6 to 1.4), and one of five is inverted.
    """
    n = len(images)
    angle, shear = _uniform(n, -0.25, 0.25), _uniform(n, -0.15, 0.15)
    tall = 1 / _uniform(n, 0.75, 1.3)
    wide = tall * _uniform(n, 0.85, 1.15)
    right, down = _uniform(n, -0.2, 0.2), _uniform(n, -0.2, 0.2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = (
        torch.stack([cos * tall, -sin * wide + shear, right], 1),
        torch.stack([sin * tall, cos * wide, down], 1),
    )
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    views = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gamma = _uniform(n, 0.6, 1.4).view(n, 1, 1, 1)
    views = ((views + 1) / 2).clamp(1e-3, 1) ** gamma * 2 - 1
    sign = torch.where(torch.rand(n) < 0.2, -1.0, 1.0)
    return views * sign.view(n, 1, 1, 1)
