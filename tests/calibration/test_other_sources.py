"""INT8 of models that are not timm's: a transformers ViT, and a module of one's own."""

from __future__ import annotations

import numpy as np
import pytest

from hhdeploy.adapters.format import save_adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.bundle import Bundle
from hhdeploy.exporting.bundles import export
from hhdeploy.parity import bound, compare
from hhdeploy.quantising import CalibrationOptions, CalibrationSettings, calibrate_bundle
from hhdeploy.runtime import open_session
from tests.parity.architectures import save_transformers_config
from tests.support import images, random_adapter

pytest.importorskip("nncf")

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}


@pytest.mark.parametrize("source", ["transformers", "python"])
def test_int8_of_another_source(source, tmp_path):
    model = "python:tests.own_models:encoder"
    if source == "transformers":
        (tmp_path / "model").mkdir()
        save_transformers_config("ViTForImageClassification", SIZES, tmp_path / "model")
        model = f"transformers:{tmp_path / 'model'}"
    facts = load_backbone(BackboneSpec(model, pretrained=False)).facts
    save_adapter(random_adapter(facts, targets=("q", "fc1"), scale=0.1), tmp_path / "a")
    export(
        model, {"a": tmp_path / "a"}, tmp_path / "out", pretrained=False, verify_images=2,
        model_args={}, cache=None,
    )  # fmt: skip
    noise = images(12)
    data = ({"images": noise[i : i + 2], "adapters": ["a", "a"]} for i in range(0, 12, 2))
    options = CalibrationOptions(cache=None)
    calibrate_bundle(tmp_path / "out", data, CalibrationSettings(images=8), options)
    assert set(Bundle.open(tmp_path / "out").manifest.graphs) == {"float32", "int8"}
    x, answers = images(4, seed=3), {}
    for precision in ("float32", "int8"):
        with open_session(tmp_path / "out", device="cpu", precision=precision) as session:
            answers[precision] = session.run(x, "a")
    comparison = compare(answers["float32"], answers["int8"])
    assert not comparison.failures(bound("quantised", "int8")), comparison
    assert not np.array_equal(answers["float32"], answers["int8"])
