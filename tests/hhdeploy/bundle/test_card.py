"""The model card: what hubs read of it, what people read, and that every change writes it again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hhdeploy.adapters.config import LABELS, VALUES, Compression
from hhdeploy.backbones.licences import CARD
from hhdeploy.bundle import Bundle, add_adapter, edit, remove_adapter
from hhdeploy.bundle.card import card_of, hub_id
from hhdeploy.bundle.manifest import OLD
from tests.workshop import AGE, TAGS, contents, copy_bundle

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"


@pytest.fixture
def bundle(small, tmp_path) -> Path:
    """Alpha and gamma, free to be changed."""
    return copy_bundle(small, tmp_path / "bundle")


def front(bundle):
    return ModelCard.load(bundle / CARD).data


def test_of_a_fresh_export(small):
    text = (small / CARD).read_text()
    manifest = Bundle.open(small).manifest
    assert CARD in manifest.files
    assert text == card_of(Bundle.open(small)), "the same bundle, the same card"
    data = front(small)
    assert data.license == "unknown"
    assert data.library_name == "hhdeploy"
    assert data.pipeline_tag == "image-classification"
    assert data.base_model == f"timm/{manifest.backbone.model}"
    alpha, gamma = (a.preprocess.described() for a in manifest.adapters)
    assert f"* alpha: {alpha}" in text.replace("\\", "")
    assert f"* gamma: {gamma}" in text.replace("\\", "")
    stages = [s for s in Bundle.open(small).parity()["stages"] if s["precision"] == "float32"]
    worst = max(stages, key=lambda s: s["range_error"])
    assert f"{worst['range_error']:.1e} of the range ({worst['adapter']}) | 100.0 %" in text
    size = sum((small / n).stat().st_size for n in ("model.onnx", "model.onnx.data")) / 1e6
    assert f"| float32 | `model.onnx` | {size:.1f} |" in text
    assert "| alpha | 7 classes" in text
    assert "| yes |" in text
    assert "not yet" not in text
    assert "seeded noise (2 an adapter" in text
    for language in ("```python", "```js", "```cpp"):
        assert text.split(language)[1].split("```")[0].count("\n") == 4
    # OpenVINO's own choice is bfloat16 where the processor has it.
    assert '"CPU", ov::hint::inference_precision(ov::element::f32)).create' in text
    assert (
        'request.set_tensor("adapter_ids", adapter_ids); request.set_tensor("adapter_bank"' in text
    )


def test_of_other_bundles(folded, heads, constant):
    assert "with alpha folded in" in (folded / CARD).read_text()
    assert "adapter_ids" not in (folded / CARD).read_text()
    assert "adapter_bank" not in (constant / CARD).read_text()
    text = (heads / CARD).read_text()
    assert f"| {TAGS} | 3 independent labels" in text
    assert f"| {AGE} | 1 value: class 0 |" in text


@pytest.mark.parametrize(
    ("classes", "kind", "said"),
    [
        (2, VALUES, "2 values: age, height"),
        (1, VALUES, "1 value"),
        (2, LABELS, "2 independent labels: age, height"),
    ],
)
def test_a_model_that_was_exported_as_it_is_says_what_it_answers(folded, classes, kind, said):
    bundle = Bundle.open(folded)
    names = ("age", "height") if classes == 2 else None
    entry = replace(
        bundle.manifest.adapters[0], classes=classes, class_names=names, problem_type=kind
    )
    files = {n: d for n, d in bundle.manifest.files.items() if not n.startswith("adapters/")}
    manifest = replace(bundle.manifest, adapters=(entry,), files=files)
    assert manifest.whole
    text = card_of(replace(bundle, manifest=manifest))
    assert f"## Answers\n\n{said}." in text
    assert "## Adapters" not in text


def test_features_are_not_asked_for_in_javascript_which_knows_none(small):
    bundle = Bundle.open(small)
    adapters = tuple(replace(a, classes=0, class_names=None) for a in bundle.manifest.adapters)
    shapes = {"features": (48,)}
    manifest = replace(bundle.manifest, classes=0, adapters=adapters, features=shapes)
    text = card_of(replace(bundle, manifest=manifest))
    assert "| alpha | features |" in text
    assert "```js" not in text
    assert "session.run(images" in text.split("```python")[1].split("```\n\nC++")[0]


def test_licences_that_hubs_know_and_others(small):
    bundle = Bundle.open(small)
    alpha, gamma = bundle.manifest.adapters

    def data(backbone, a, g):
        facts = replace(bundle.manifest.backbone, license=backbone)
        entries = (replace(alpha, license=a), replace(gamma, license=g))
        manifest = replace(bundle.manifest, backbone=facts, adapters=entries)
        text = card_of(replace(bundle, manifest=manifest))
        return ModelCard(text).data, text

    one, _ = data(("Apache-2.0",), ("apache-2.0",), ("apache-2.0",))
    assert one.license == "apache-2.0"
    both, text = data(("apache-2.0",), ("mit",), ())
    assert both.license == ["apache-2.0", "mit", "unknown"]
    assert "* adapter alpha: mit\n* adapter gamma: unknown" in text
    other, _ = data(("apache-2.0",), ("House: 1",), ("mit",))
    assert (other.license, other.license_name) == ("other", "apache-2.0 and House: 1 and mit")


def test_words_of_others_are_words(small):
    bundle = Bundle.open(small)
    names = ("a|b", "<script>x</script>", "two\nlines", "`c`", *"defghijklmn")
    entry = replace(bundle.manifest.adapters[0], class_names=names, classes=len(names))
    lost = replace(entry, name="lost", compressed=Compression(4, 1e-3, "blocks.0"))
    manifest = replace(bundle.manifest, adapters=(entry, lost))
    text = card_of(replace(bundle, manifest=manifest))
    assert r"a\|b, \<script\>x\</script\>, two lines, \`c\`" in text
    assert "k and 3 more |" in text
    assert "* lost is compressed to rank 4" in text


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("vit_x.tag", "timm/vit_x.tag"),
        ("vit_x", None),
        ("transformers:google/vit-base", "google/vit-base"),
        ("transformers:ViTForImageClassification", None),
        ("python:package.module:function", None),
    ],
)
def test_where_the_hub_has_a_backbone(model, found):
    assert hub_id(model) == found


def test_every_change_writes_it_again(bundle, workshop):
    fresh = (bundle / CARD).read_text()
    add_adapter(bundle, "rival", workshop.directory("rival"))
    text = (bundle / CARD).read_text()
    assert "| rival | 7 classes" in text
    assert "| not yet |" in text
    assert text == card_of(Bundle.open(bundle))
    assert (bundle / OLD / CARD).read_text() == fresh
    Bundle.open(bundle).check_files()
    remove_adapter(bundle, "rival")
    assert (bundle / CARD).read_text() == fresh


def test_a_change_of_nothing_leaves_it(bundle):
    before = contents(bundle)
    with edit(bundle):
        pass
    assert contents(bundle) == before


def test_a_change_that_fails_leaves_the_old_one(bundle, workshop):
    before = contents(bundle)

    def fail():
        with edit(bundle) as change:
            change.manifest = replace(change.manifest, versions={"x": "1"})
            change._renew_card()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert contents(bundle) == before


def test_a_bundle_from_before_gets_one_and_an_own_readme_stays(tmp_path):
    bundle = copy_bundle(WITNESS / "added", tmp_path / "bundle")
    remove_adapter(bundle, "rival")
    assert (bundle / CARD).read_text() == card_of(Bundle.open(bundle))
    shutil.rmtree(bundle)
    copy_bundle(WITNESS / "added", bundle)
    (bundle / CARD).write_text("mine")
    remove_adapter(bundle, "rival")
    assert (bundle / CARD).read_text() == "mine"
    assert CARD not in Bundle.open(bundle).manifest.files


def test_what_calibration_found_is_told():
    text = card_of(Bundle.open(WITNESS / "int8"))
    assert "* int8: INT8 gives the answer of float32 on 100.0% of 8 held-out images" in text
    assert "| int8 | `model.int8.onnx` |" in text


def test_a_card_that_was_committed_and_not_yet_moved(bundle, workshop, monkeypatch):
    """A crash after the manifest: readers find the new card, and the next change ends the move."""
    from hhdeploy.bundle import locking

    monkeypatch.setattr(locking, "_settle_card", lambda bundle: None)
    old = (bundle / CARD).read_text()
    add_adapter(bundle, "rival", workshop.directory("rival"))
    assert (bundle / CARD).read_text() == old
    Bundle.open(bundle).check_files()
    monkeypatch.undo()
    remove_adapter(bundle, "rival")
    assert (bundle / CARD).read_text() == old
    Bundle.open(bundle).check_files()
    assert not (bundle / f".{CARD}.new").exists()
