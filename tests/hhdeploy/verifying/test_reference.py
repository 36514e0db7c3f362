"""What a verification compares, with what, and what it says of an adapter that rounding hides."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.adapters.format import PARTS
from hhdeploy.algebra import Scales, SiteDelta
from hhdeploy.bundle import Bundle
from hhdeploy.errors import BundleError, PlanError
from hhdeploy.preprocess import open_image
from hhdeploy.verifying.answers import _default_precisions, check_columns
from hhdeploy.verifying.reference import Reference, VerifyData, _interleaved
from hhdeploy.verifying.survival import _judged, _undone
from tests.support import random_adapter


def test_neighbours_are_of_different_adapters():
    assert _interleaved([2, 3, 1]).tolist() == [0, 2, 5, 1, 3, 4]


def test_noise_is_that_of_its_seed(tiny_facts):
    def noise(**data):
        return VerifyData(**data).batch("a", None, tiny_facts)

    assert noise(images=3).shape == (3, 3, 32, 32)
    assert noise(images=3).tobytes() == noise(images=3, seed=0).tobytes()
    assert noise(images=3).tobytes() != noise(images=3, seed=1).tobytes()


def test_each_adapter_sees_its_own_images_through_its_own_transform(tiny_facts, tmp_path):
    for place, level in (("one/a.png", 40), ("one/b.png", 90), ("all.png", 200)):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (48, 40), (level, 0, 7)).save(tmp_path / place)
    adapter = random_adapter(tiny_facts)
    own = replace(tiny_facts.preprocess, mean=(0.1, 0.2, 0.3))
    adapter = replace(adapter, config=replace(adapter.config, preprocess=own))
    data = VerifyData(tmp_path, 2)
    expected = [own(open_image(tmp_path / "one" / name)) for name in ("a.png", "b.png")]
    assert np.array_equal(data.batch("one", adapter, tiny_facts), np.stack(expected))
    everything = data.batch(BACKBONE, None, tiny_facts)
    assert np.array_equal(everything[0], tiny_facts.preprocess(open_image(tmp_path / "all.png")))


def test_a_part_of_a_reference_is_about_its_rows():
    ids = np.asarray([0, 1, 2, 1])
    whole = Reference(np.arange(4.0).reshape(4, 1, 1, 1), ids, np.arange(8.0).reshape(4, 2))
    part = whole.of_rows([0, 1])
    assert part.adapter_ids.tolist() == [0, 1, 1]
    assert part.images.ravel().tolist() == [0, 1, 3]
    assert part.logits[:, 0].tolist() == [0, 2, 6]


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("which", ["small", "folded"])
def test_a_manifest_of_fewer_or_more_classes_than_the_reference(request, which, change):
    bundle = Bundle.open(request.getfixturevalue(which))
    manifest, (_, ids, logits) = bundle.manifest, bundle.reference()
    entry = manifest.adapters[0]
    own = logits[ids == (entry.row or 0)]
    check_columns(bundle, entry.name, own)
    ruled_out = own.copy()
    ruled_out[0, entry.classes - 1] = -np.inf  # of one image: the model's own answer
    check_columns(bundle, entry.name, ruled_out)
    others = (replace(entry, classes=entry.classes + change), *manifest.adapters[1:])
    wrong = replace(bundle, manifest=replace(manifest, adapters=others))
    message = rf"{entry.name}: expected {entry.classes} classes, .* found {entry.classes + change}"
    with pytest.raises(BundleError, match=message):
        check_columns(wrong, entry.name, own)


def test_what_noise_can_show_and_each_engine_s_precision_once():
    bundle = SimpleNamespace(
        path="b",
        manifest=SimpleNamespace(
            graphs={"float32": "", "int8": "", "bfloat16": ""},
            engines=[
                SimpleNamespace(backend=backend, precision=precision)
                for backend, precision in (
                    *(("tensorrt", "float16"), ("tensorrt", "int8"), ("tensorrt", "float16")),
                    ("tensorrt-rtx", "float32"),
                )
            ],
        ),
    )
    assert _default_precisions(bundle, "cpu", noise=True) == ("float32", "bfloat16")
    assert _default_precisions(bundle, "cpu", noise=False) == ("float32", "int8", "bfloat16")
    assert _default_precisions(bundle, "tensorrt", noise=True) == ("float16", "int8")


@pytest.mark.parametrize(
    ("exact", "found", "said"),
    [
        ([0.0, 0.0], [0.1, 0.0], None),  # a classifier alone
        ([3.0, 4.0], [3.1, 3.9], None),
        ([3e-9, 4e-9], [3e-9, 4e-9], None),
        (
            [3.0, 4.0],
            [0.0, -4.0],
            "float16 moves the logits as much as the adapter does (1.7 times",
        ),
        ([3.0, 4.0], [4e-9, 0.0], "float16 rounds all of it away: it moves no logit there"),
    ],
)
def test_an_adapter_that_rounding_hides_is_named(exact, found, said):
    given = "a", "float16", np.asarray([exact]), np.asarray([found])
    line = _judged(*given, False)
    assert (line is None) is (said is None)
    assert said is None or said in str(line)
    if said is not None and "all of it" in said:
        with pytest.raises(PlanError, match="'a': float16 rounds all of it away"):
            _judged(*given, True)
    else:
        assert _judged(*given, True) == line


@pytest.mark.parametrize("form", ["additive", "sequential"])
def test_a_weight_is_what_it_was_before_an_adapter_where_that_can_be_told(tiny_facts, form):
    path = "blocks.0.attn.proj"
    parts = PARTS if form == "additive" else ()
    adapter = random_adapter(tiny_facts, form=form, targets=["proj"], parts=parts)
    change = adapter.change(path)
    before = np.random.default_rng(5).standard_normal((48, 48))
    ones = np.ones(48)
    s_in, s_out = (ones if s is None else s for s in (change.scales.s_in, change.scales.s_out))
    after = s_out[:, None] * before * s_in
    after = change.delta.dense() @ after if form == "sequential" else after + change.delta.dense()
    found = _undone(adapter, change, after)
    assert np.abs(found - before).max() < 1e-9
    lost = ones.copy()
    lost[3] = 0.0
    for scales in (Scales(s_in=lost), Scales(s_out=lost)):
        assert _undone(adapter, replace(change, scales=scales), after) is None
    if form == "sequential":
        nothing = SiteDelta(np.zeros(48), np.zeros((48, 1)), np.zeros((1, 48)))
        assert _undone(adapter, replace(change, delta=nothing), after) is None
