"""Exports of models that are not timm's, of whole models, and of other channels than three."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hhdeploy.adapters.format import save_adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.bundle import Bundle
from hhdeploy.errors import BackboneError, DataError, PlanError
from hhdeploy.exporting.bundles import export
from hhdeploy.preprocess import Preprocess
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import verify, verify_against_torch
from tests.support import assert_parity, images, logits_of, random_adapter, tiny_spec

OWN = "python:tests.own_models:encoder"
ARGS = {"depth": 1}
SPEC = BackboneSpec(OWN, ARGS, seed=3)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A whole model of a function, folded without an adapter. Read only."""
    out = tmp_path_factory.mktemp("own") / "bundle"
    result = export(OWN, {}, out, fold=True, model_args=ARGS, seed=3, verify_images=2)
    assert result.parity is not None and result.parity.passed
    return out


def test_a_whole_model_is_a_bundle_like_any(own):
    manifest = Bundle.open(own).manifest
    assert (manifest.kind, manifest.classes) == ("folded", 7)
    assert [(a.name, a.classes, a.verified) for a in manifest.adapters] == [("model", 7, True)]
    assert verify(own).passed
    inputs = images(3)
    with open_session(own, device="cpu") as session:
        found = session.run(inputs)
        (answers,) = session.classify([Image.new("RGB", (40, 50), (200, 3, 90))])
    assert_parity(logits_of(load_backbone(SPEC).model, inputs), found, "folded", "float32")
    assert len(answers) == 7


def test_what_a_file_names_is_never_run(own):
    with pytest.raises(BackboneError, match=r"python:tests.*what a file names is never run.*`mod"):
        verify_against_torch(own, seed=3)
    report = verify_against_torch(own, model=OWN, seed=3)
    assert report.passed
    with pytest.raises(BackboneError, match="was exported from the weights"):
        verify_against_torch(own, model=OWN, seed=4)


def test_an_adapter_s_arguments_never_reach_a_function(own, tmp_path):
    facts = load_backbone(SPEC).facts
    save_adapter(random_adapter(facts), tmp_path / "a")
    with pytest.raises(PlanError, match=r"'depth': 1.*`model_args`"):
        export(OWN, {"a": tmp_path / "a"}, tmp_path / "out", seed=3)


def test_one_channel(tmp_path, workshop):
    """Grey pictures: the session's transform makes one channel of them."""
    spec = tiny_spec(in_chans=1, depth=1, num_classes=7)
    export(
        spec.model, {}, tmp_path / "out", fold=True, model_args=spec.args, pretrained=False,
        seed=spec.seed, verify_images=2, cache=workshop.cache,
    )  # fmt: skip
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.input_size == (1, 32, 32)
    with open_session(tmp_path / "out", device="cpu") as session:
        pixels = session.preprocess([Image.new("RGB", (32, 32), (10, 200, 30))])
        assert session.run(pixels).shape == (1, 7)
    luma = round(0.299 * 10 + 0.587 * 200 + 0.114 * 30)
    transform = manifest.backbone.preprocess
    levels = 255 * (pixels.astype(np.float64) * transform.std[0] + transform.mean[0])
    assert np.array_equal(np.rint(levels), np.full((1, 1, 32, 32), luma))


def test_channels_that_no_picture_has():
    transform = Preprocess((12, 8, 8), (0.5,) * 12, (0.25,) * 12)
    with pytest.raises(DataError, match=r"takes 12 channels .*float32 \[batch, 12, 8, 8\]"):
        transform(Image.new("RGB", (8, 8)))
    facts = load_backbone(tiny_spec(in_chans=12, depth=1)).facts
    assert facts.preprocess.input_size == (12, 32, 32)
    assert len(set(facts.preprocess.mean)) == 1
    assert replace(facts.preprocess) == Preprocess.from_json(facts.preprocess.to_json())


def test_a_linear_that_sees_no_image_has_an_adapter_where_it_is_folded(tmp_path):
    """Its result was put into the graph, and the adapter's site was one that no model had."""
    model = "python:tests.own_models:positions"
    facts = load_backbone(BackboneSpec(model, seed=3)).facts
    save_adapter(random_adapter(facts, targets=("positions.0", "linear1"), r=2), tmp_path / "a")
    out, options = tmp_path / "bundle", {"seed": 3, "cache": None, "verify_images": 2}
    result = export(model, {"a": tmp_path / "a"}, out, fold=True, **options)
    assert result.parity is not None and result.parity.passed
    with pytest.raises(PlanError, match=r"positions\.0 takes .* not made of them.* Fold"):
        export(model, {"a": tmp_path / "a"}, tmp_path / "b", **options)


def test_two_bounds_of_one_tensor_are_both_kept(tmp_path):
    """The optimiser gave them one name, and a traceback of a thousand lines was all there was."""
    model = "python:tests.own_models:clamped"
    result = export(model, {}, tmp_path / "bundle", fold=True, seed=3, verify_images=2)
    assert result.parity is not None and result.parity.passed


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("wrapped", {"how": "compiled"}),
        ("wrapped", {"how": "parallel"}),
        ("wrapped", {"how": "any"}),
        ("rescaling", {}),
    ],
)
def test_models_as_people_wrap_them(tmp_path, function, args):
    """Those that take any arguments were untraceable, and one that writes into its images was not
    verified on those that it had been given."""
    model, options = f"python:tests.own_models:{function}", {"seed": 3, "cache": None}
    result = export(
        model, {}, tmp_path / "bundle", fold=True, model_args=args, verify_images=2, **options
    )
    assert result.parity is not None and result.parity.passed


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("quantised", "which quantises. Return the model as it was before"),
        ("meta", "meta device, which has none"),
        ("normed", r"the classifier head was not found .*weight norm"),
    ],
)
def test_models_without_weights_of_their_own(tmp_path, how, said):
    with pytest.raises(BackboneError, match=said):
        export(
            "python:tests.own_models:wrapped",
            {},
            tmp_path / "bundle",
            fold=True,
            model_args={"how": how},
            cache=None,
        )
