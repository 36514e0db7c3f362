"""`difference`: how two adapters of one backbone differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.adapters.config import LABELS
from hhdeploy.adapters.differing import difference
from hhdeploy.adapters.format import SiteTensors
from hhdeploy.adapters.mixing import merge_adapters
from hhdeploy.errors import AdapterError
from hhdeploy.parity import bound
from tests.hhdeploy.adapters.test_mixing import adapters

ROUNDING = bound("algebra", "float32").range_error


def test_differences(tiny):
    parts = adapters(tiny.facts)
    hta = parts["hta"]
    assert difference(hta, hta).equal
    half = difference(hta, merge_adapters({"a": (hta, 0.5)}))
    assert not half.equal
    for site in half.sites:
        if site.site != "head":
            assert site.distance == pytest.approx(0.5, abs=ROUNDING)
            assert site.cosine == pytest.approx(1.0, abs=ROUNDING)
            assert site.norm_b == pytest.approx(site.norm_a / 2, rel=ROUNDING)
    opposite = difference(hta, merge_adapters({"a": (hta, -1.0)}))
    assert opposite.sites[0].cosine == pytest.approx(-1.0, abs=ROUNDING)
    assert opposite.sites[0].distance == pytest.approx(2.0, abs=ROUNDING)
    found = {site.site: site for site in difference(hta, parts["scaled"]).sites}
    assert found["blocks.0.attn.qkv.q"].norm_b == 0.0
    assert found["blocks.0.attn.qkv.q"].cosine is None
    assert difference(hta, parts["sequential"]).settings["form"] == ("additive", "sequential")
    labels = replace(hta, config=replace(hta.config, problem_type=LABELS))
    assert difference(hta, labels).settings == {"problem_type": (None, LABELS)}
    wider = SiteTensors(lora_A=np.ones((1, 50), np.float32), lora_B=np.ones((48, 1), np.float32))
    foreign = replace(hta, sites={"blocks.0.attn.qkv.q": wider})
    with pytest.raises(AdapterError, match="different backbones"):
        difference(hta, foreign)
