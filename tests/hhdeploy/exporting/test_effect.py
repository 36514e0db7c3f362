"""An adapter that moves no logit fails the export, unless that is meant."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.adapters.format import save_adapter
from hhdeploy.bundle import Bundle
from hhdeploy.errors import AdapterError
from tests.support import TINY_MODEL


@pytest.fixture
def untrained(workshop, tmp_path):
    """LoRA as it is before training, with a trained classifier."""
    adapter = workshop.adapters["lora"]
    sites = {n: replace(t, lora_B=np.zeros_like(t.lora_B)) for n, t in adapter.sites.items()}
    save_adapter(replace(adapter, sites=sites), tmp_path / "untrained")
    return tmp_path / "untrained"


@pytest.mark.parametrize("fold", [False, True])
def test_it_fails_the_export(workshop, untrained, tmp_path, fold):
    from hhdeploy.exporting.bundles import export

    options = {"checkpoint": workshop.checkpoint, "cache": workshop.cache, "verify_images": 1}
    with pytest.raises(AdapterError, match=r"adapter 'a' moves no logit.*`allow_no_effect=True`"):
        export(TINY_MODEL, {"a": untrained}, tmp_path / "b", fold=fold, **options)
    assert not (tmp_path / "b").exists()
    export(TINY_MODEL, {"a": untrained}, tmp_path / "b", fold=fold, allow_no_effect=True, **options)
    assert Bundle.open(tmp_path / "b").manifest.adapter("a").verified


def test_a_strength_of_zero_has_none(workshop, tmp_path):
    with pytest.raises(AdapterError, match="moves no logit"):
        workshop.export(tmp_path / "b", ["alpha"], strengths={"alpha": 0.0})
