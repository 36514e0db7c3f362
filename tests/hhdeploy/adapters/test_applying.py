"""What an adapter makes of the parameters, against the training-time model."""

from __future__ import annotations

import numpy as np

from hhdeploy.adapters.applying import logits_with, parameters_with
from hhdeploy.training import attach, detach
from tests.support import assert_parity, images, logits_of, random_adapter, tiny_backbone


def test_a_bias_of_a_linear_that_has_none():
    backbone = tiny_backbone(qkv_bias=False, depth=1, num_classes=7)
    adapter = random_adapter(backbone.facts, targets=("q", "v", "proj"), parts=("db",))
    found = parameters_with(backbone, adapter)
    shift = found["blocks.0.attn.qkv.bias"]
    width = len(shift) // 3
    assert shift[:width].any()
    assert not shift[width : 2 * width].any()  # k has none
    before = list(backbone.model.state_dict())
    ours = logits_with(backbone, found, images(2))
    assert list(backbone.model.state_dict()) == before
    attach(backbone.model, adapter)
    try:
        truth = logits_of(backbone.model, images(2))
    finally:
        detach(backbone.model)
    assert_parity(truth, ours, "algebra", "float64")
    without = logits_with(
        backbone, {k: v for k, v in found.items() if k[-8:] != "qkv.bias"}, images(2)
    )
    assert np.abs(without - truth).max() > 1e-3 * np.ptp(truth)
