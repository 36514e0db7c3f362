"""Names and problem type of a model's own classifier: read where its weights are, and kept."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from hhdeploy.adapters.format import save_adapter
from hhdeploy.adapters.importers.checkpoint import extract_adapter
from hhdeploy.adapters.importers.template import ImportOptions
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.meaning import UNSTATED, Meaning, meaning_beside, meaning_of
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.errors import BackboneError, BundleError
from hhdeploy.exporting.bundles import export
from hhdeploy.exporting.outputs import unkept_meaning
from hhdeploy.parity import CLASSES, LABELS, VALUES
from hhdeploy.plan import Reserve
from hhdeploy.runtime import open_session
from tests.hhdeploy.backbones.small_vit import save_small_vit
from tests.support import assert_parity, random_adapter, tiny_spec

NAMES = ("cat", "dog", "bird")


def test_a_configuration_of_nothing_but_brackets_says_nothing(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert meaning_beside(tmp_path / "model.safetensors", 3) == UNSTATED
    with pytest.raises(BackboneError, match=r"no config\.json that can be read"):
        load_backbone(BackboneSpec(str(tmp_path)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Labels that are true or not, with their names, as transformers saves them. Read only."""
    labels = {"id2label": dict(enumerate(NAMES)), "problem_type": LABELS}
    return save_small_vit(tmp_path_factory.mktemp("meaning") / "vit", **labels)


@pytest.fixture
def tuned(saved, tmp_path):
    """The same model, its weights changed a little, in a directory of its own."""
    path = tmp_path / "tuned"
    path.mkdir()
    (path / "config.json").write_bytes((saved / "config.json").read_bytes())
    state = load_file(saved / "model.safetensors")
    save_file({k: v + 0.01 * v.std() for k, v in state.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("stated", "classes", "expected"),
    [
        ({"id2label": {"0": "cat", "1": "dog"}}, 2, Meaning(("cat", "dog"))),
        ({"id2label": {1: "dog"}}, 3, Meaning(("0", "dog", "2"))),
        ({"label_names": ["cat", "dog"]}, 2, Meaning(("cat", "dog"))),
        ({"id2label": {0: "LABEL_0", 1: "LABEL_1"}}, 2, UNSTATED),
        ({"id2label": {0: "a", 1: "b", 2: "c"}}, 2, UNSTATED),
        ({"id2label": {}, "problem_type": None}, 2, UNSTATED),
        ({"problem_type": LABELS}, 2, Meaning(None, LABELS)),
        ({"problem_type": VALUES}, 2, Meaning(None, VALUES)),
        ({"problem_type": "single_label_classification"}, 1, UNSTATED),
        ({"problem_type": LABELS, "id2label": {0: "a"}}, 0, UNSTATED),
    ],
)
def test_what_a_configuration_says(stated, classes, expected):
    assert meaning_of(stated, classes) == expected
    assert Meaning.from_json(expected.to_json()) == expected


def test_a_whole_model_answers_with_its_labels(saved, tmp_path):
    model = f"transformers:{saved}"
    result = export(model, {}, tmp_path / "out", fold=True, verify_images=1, cache=None)
    (entry,) = result.manifest.adapters
    assert (entry.class_names, entry.problem_type) == (NAMES, LABELS)
    assert Bundle.open(tmp_path / "out").manifest.backbone.meaning == Meaning(NAMES, LABELS)
    picture = Image.new("RGB", (32, 32), (200, 3, 90))
    with open_session(tmp_path / "out", device="cpu") as session:
        pixels = session.preprocess([picture])
        (answers,) = session.classify([picture])
    own = transformers.ViTForImageClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        shares = own(torch.from_numpy(pixels)).logits.sigmoid()[0]
    found = {answer.label: answer.score for answer in answers}
    assert_parity(shares.numpy(), np.array([found[n] for n in NAMES]), "folded", "float32")


def test_a_checkpoint_brings_its_own(saved, tuned, tmp_path):
    """Those of the backbone are of another classifier, for all that anybody knows."""
    base = BackboneSpec(f"transformers:{saved}")
    config = extract_adapter(tuned / "model.safetensors", base).config
    assert (config.class_names, config.problem_type) == (NAMES, LABELS)
    asked = ImportOptions(class_names=("a", "b", "c"), problem_type=VALUES)
    config = extract_adapter(tuned / "model.safetensors", base, asked).config
    assert (config.class_names, config.problem_type) == (("a", "b", "c"), VALUES)
    (tuned / "config.json").unlink()
    config = extract_adapter(tuned / "model.safetensors", base).config
    assert (config.class_names, config.problem_type) == (None, None)


def test_arguments_have_the_last_word(saved, tuned):
    model, file = f"transformers:{saved}", tuned / "model.safetensors"
    spec = BackboneSpec(model, {"problem_type": VALUES}, checkpoint=file)
    assert load_backbone(spec).facts.meaning == Meaning(NAMES, VALUES)


def test_names_beside_a_file_of_timm(tmp_path):
    spec = tiny_spec(num_classes=3)
    torch.save(load_backbone(spec).model.state_dict(), tmp_path / "model.pth")
    args = {key: value for key, value in spec.args.items() if key != "num_classes"}
    spec = BackboneSpec(spec.model, args, checkpoint=tmp_path / "model.pth")
    assert load_backbone(spec).facts.meaning == UNSTATED
    (tmp_path / "config.json").write_text(json.dumps({"label_names": NAMES}))
    assert load_backbone(spec).facts.meaning == Meaning(NAMES)
    (tmp_path / "config.json").write_text(json.dumps(["of somebody else"]))
    assert load_backbone(spec).facts.meaning == UNSTATED


def test_an_adapter_without_a_classifier_answers_with_the_backbone_s(saved, tmp_path):
    model, said = f"transformers:{saved}", []
    facts = load_backbone(BackboneSpec(model)).facts
    for name, classes in (("own", 4), ("none", None), ("later", None)):
        save_adapter(random_adapter(facts, classes=classes), tmp_path / name)
    adapters = {name: tmp_path / name for name in ("own", "none")}
    out = tmp_path / "out"
    options = {"verify": False, "cache": None, "progress": said.append}
    export(model, adapters, out, **options)
    assert not any("numbered classes" in line for line in said)
    add_adapter(out, "later", tmp_path / "later")
    entries = Bundle.open(out).manifest.adapters
    found = {entry.name: (entry.class_names, entry.problem_type) for entry in entries}
    theirs, own = (NAMES, LABELS), (tuple(f"class {i}" for i in range(4)), CLASSES)
    assert found == {"own": own, "none": theirs, "later": theirs}


def test_what_a_kept_classifier_does_not_tell_is_said(saved, tmp_path):
    model, said = f"transformers:{saved}", []
    save_adapter(random_adapter(load_backbone(BackboneSpec(model)).facts), tmp_path / "a")
    options = {"verify": False, "cache": None, "progress": said.append}
    reserve = Reserve(keep_backbone_head=True)
    export(model, {"a": tmp_path / "a"}, tmp_path / "out", reserve=reserve, **options)
    assert any(f"numbered classes: {LABELS} and the names" in line for line in said)


def test_a_kept_classifier_of_one_output_is_said_to_be_always_certain():
    facts = load_backbone(tiny_spec(num_classes=1, depth=1)).facts
    line = unkept_meaning(facts, Reserve(keep_backbone_head=True))
    assert line is not None
    assert "numbered classes, of its one output always with the first: regression, as a" in line
    assert unkept_meaning(facts, Reserve()) is None
    two = replace(facts, classes=2)
    assert unkept_meaning(two, Reserve(keep_backbone_head=True)) is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("class_names", ["a"], r"backbone\.class_names: expected 5 names, found 1"),
        ("class_names", "abc", r"backbone\.class_names: expected a list of names"),
        ("problem_type", "ranking", "a problem type of single.*found 'ranking'"),
    ],
)
def test_a_damaged_meaning_is_refused(workshop, tmp_path, key, value, message):
    out = tmp_path / "out"
    workshop.export(out, ["alpha"], verify=False)
    manifest = json.loads((out / "hhdeploy.json").read_text())
    manifest["backbone"][key] = value
    (out / "hhdeploy.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=rf"damaged .*{message}"):
        Bundle.open(out)
