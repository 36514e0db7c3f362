"""Which Linears a graph has as one node each, so that an adapter there changes all that it would
in the model; and models that are no function of their images."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.sites import sites_of
from hhdeploy.errors import BackboneError
from hhdeploy.exporters.branches import branched_model
from hhdeploy.exporters.fold import folded_model
from hhdeploy.exporters.trace import base_graph
from hhdeploy.plan import Reserve, plan_branches
from hhdeploy.training import attach
from tests.parity.ladder import run, session
from tests.support import assert_parity, images, random_adapter, tiny_spec

SITE = "mlp.fc2"


def reading(how: str):
    return load_backbone(replace(tiny_spec("python:tests.own_models:reading"), args={"how": how}))


@functools.cache
def traced(how: str):
    """The graph of a model of `reading`, to read only."""
    return base_graph(reading(how), None)


@pytest.mark.parametrize("form", ["additive", "sequential"])
@pytest.mark.parametrize("how", ["as a linear", "twice", "without its bias", "by hand"])
def test_a_weight_that_is_used_as_a_linear_alone_is_one(how, form):
    backbone, base = reading(how), traced(how)
    adapter = random_adapter(base.facts, form=form, targets=[SITE])
    inputs = images(3)
    with session(folded_model(base, adapter)) as runner:
        found = run(runner, inputs)
    attach(backbone.model, adapter)
    with torch.no_grad():
        expected = backbone.model(torch.from_numpy(inputs)).numpy()
    assert_parity(expected, found, "folded", "float32")


@pytest.mark.parametrize("how", ["as a linear", "by hand", "by hand, joined"])
def test_each_image_has_its_own_adapter_however_the_product_is_written(how):
    """A product by hand was taken for one in which the images do not lie one after the other."""
    backbone, base = reading(how), traced(how)
    adapters = {"one": random_adapter(base.facts, targets=[SITE], seed=1)}
    plan = plan_branches(base.facts, adapters, Reserve(keep_backbone_head=True))
    bank = np.stack(
        [np.zeros(plan.layout.size, np.float32), plan.layout.pack("one", adapters["one"])]
    )
    inputs = images(3)
    with session(branched_model(base, plan)) as runner:
        found = run(runner, inputs, adapter_ids=np.asarray([1, 0, 1]), adapter_bank=bank)
    with torch.no_grad():
        bare = backbone.model(torch.from_numpy(inputs)).numpy()
        attach(backbone.model, adapters["one"])
        changed = backbone.model(torch.from_numpy(inputs)).numpy()
    expected = np.stack([changed[0], bare[1], changed[2]])
    assert_parity(expected, found, "branches", "float32")


@pytest.mark.parametrize(
    "how",
    [
        *("not transposed", "and back", "by its norm", "scaled as well", "as a table", "in halves"),
        *("in chunks", "from the left", "by einsum", "by addmm", "by a convolution"),
        *("scaled", "moved"),
        *("bias elsewhere", "bias twice", "another bias", "another addend"),
    ],
)
def test_what_reads_a_weight_or_adds_a_constant_besides_makes_it_no_site(how):
    """A changed weight would change it in the model, and not in the graph."""
    assert list(sites_of(traced(how).facts.linears)) == ["mlp.fc1"]


@pytest.mark.parametrize("how", ["dropout", "noise", "python", "calls", "attention"])
def test_a_model_that_answers_otherwise_at_every_call_is_refused(how):
    backbone = load_backbone(
        replace(tiny_spec("python:tests.own_models:drawing"), args={"how": how})
    )
    with pytest.raises(BackboneError, match=r"called twice .* two answers.*random numbers"):
        base_graph(backbone, None)
