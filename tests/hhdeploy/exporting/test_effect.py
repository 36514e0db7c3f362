"""An adapter that moves no logit fails the export, unless that is meant."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.adapters.format import save_adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.bundle import Bundle
from hhdeploy.errors import AdapterError
from hhdeploy.exporters.trace import trace
from hhdeploy.exporting.bundles import export
from hhdeploy.verifying.bundles import verify
from tests.support import TINY_MODEL, random_adapter


@pytest.fixture
def untrained(workshop, tmp_path):
    """LoRA as it is before training, with a trained classifier."""
    adapter = workshop.adapters["lora"]
    sites = {n: replace(t, lora_B=np.zeros_like(t.lora_B)) for n, t in adapter.sites.items()}
    save_adapter(replace(adapter, sites=sites), tmp_path / "untrained")
    return tmp_path / "untrained"


@pytest.mark.parametrize("fold", [False, True])
def test_it_fails_the_export(workshop, untrained, tmp_path, fold):
    options = {"checkpoint": workshop.checkpoint, "cache": workshop.cache, "verify_images": 1}
    with pytest.raises(AdapterError, match=r"adapter 'a' moves no logit.*`allow_no_effect=True`"):
        export(TINY_MODEL, {"a": untrained}, tmp_path / "b", fold=fold, **options)
    assert not (tmp_path / "b").exists()
    export(TINY_MODEL, {"a": untrained}, tmp_path / "b", fold=fold, allow_no_effect=True, **options)
    assert Bundle.open(tmp_path / "b").manifest.adapter("a").verified


def test_a_strength_of_zero_has_none(workshop, tmp_path):
    with pytest.raises(AdapterError, match="moves no logit"):
        workshop.export(tmp_path / "b", ["alpha"], strengths={"alpha": 0.0})


@pytest.fixture(scope="module")
def traced_once():
    """Traces of functions are in no cache: whoever exports the same model again gets the same."""
    known = {}

    def once(backbone, outputs):
        key = (str(backbone.facts.args), *outputs)
        if key not in known:
            known[key] = trace(backbone, outputs)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hhdeploy.exporters.trace.trace", once)
        yield


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(("classes", "fold"), [([0, 4], False), ([0, 4], True), ([5, 6], False)])
def test_classes_that_the_model_rules_out_hide_no_effect_and_no_want_of_one(
    tmp_path, classes, fold
):
    """-inf less -inf is no number: nothing was refused, and every precision was warned of. And the
    last classes were taken for padding."""
    model, args = "python:tests.own_models:ruling_out", {"classes": classes}
    facts = load_backbone(BackboneSpec(model, args)).facts
    adapter = random_adapter(facts, targets=("linear1",), r=2, classes=None)
    sites = {name: replace(site, d=np.zeros_like(site.d)) for name, site in adapter.sites.items()}
    idle = {name: replace(site, lora_B=np.zeros_like(site.lora_B)) for name, site in sites.items()}
    save_adapter(adapter, tmp_path / "a")
    save_adapter(replace(adapter, sites=idle), tmp_path / "idle")
    options = {"model_args": args, "fold": fold, "cache": tmp_path / "cache"}
    options["precisions"] = ["bfloat16"]
    lines: list[str] = []
    made = export(model, {"a": tmp_path / "a"}, tmp_path / "b", progress=lines.append, **options)
    assert not [line for line in lines if "rounding" in line]
    assert verify(made.path).passed
    with pytest.raises(AdapterError, match="adapter 'idle' moves no logit"):
        export(model, {"idle": tmp_path / "idle"}, tmp_path / "c", **options)
