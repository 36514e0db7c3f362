"""Licences, from where they are stated to what bundles and graphs say."""

from __future__ import annotations

import json
import os
import shutil

import onnx
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import save_file

from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.adapters.importers import import_adapter
from hhdeploy.adapters.mixing import merge_adapters
from hhdeploy.backbones.licences import CARD, in_words, licences_of, licences_of_card
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.errors import AdapterError
from tests.support import TINY_ARGS, TINY_MODEL, random_adapter
from tests.workshop import BACKBONE_CLASSES

NAMED = "other\nlicense_name: house-1\nlicense_link: LICENSE"


def card(folder, front, body="# A model\nlicense: mit\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).write_text(f"---\n{front}\n---\n{body}")


@pytest.mark.parametrize(
    ("front", "found"),
    [
        ("license: apache-2.0\ntags:\n- mit", ("apache-2.0",)),
        ("tags: [a]\nlicense: 'cc-by-nc-4.0' # not for sale", ("cc-by-nc-4.0",)),
        ("license:\n- apache-2.0\n  - mit\nbase_model: x", ("apache-2.0", "mit")),
        ('license: [apache-2.0, "mit", MIT]', ("apache-2.0", "mit")),
        (f"license: {NAMED}", ("house-1",)),
        ("license: other", ("other",)),
        ("license_name: house-1", ()),
        ("license:\ntags: []", ()),
        ("license: unknown", ()),
        ("model:\n  license: mit", ()),
        ("about: |\n  words\n  - mit\n", ()),
    ],
)
def test_front_matter(tmp_path, front, found):
    card(tmp_path, front)
    assert licences_of_card(tmp_path) == found


@pytest.mark.parametrize("text", ["", "license: mit\n", "---\nlicense: mit\n", "\x00\xff"])
def test_no_front_matter(tmp_path, text):
    (tmp_path / CARD).write_bytes(text.encode("latin-1"))
    assert licences_of_card(tmp_path) == ()
    (tmp_path / CARD).unlink()
    assert licences_of_card(tmp_path) == ()


@pytest.mark.parametrize("kind", ["pipe", "directory", "loop"])
def test_a_card_that_is_no_file(tmp_path, kind):
    """Of a pipe nobody would ever come back."""
    if kind == "pipe":
        os.mkfifo(tmp_path / CARD)
    elif kind == "directory":
        (tmp_path / CARD).mkdir()
    else:
        (tmp_path / CARD).symlink_to(CARD)
    assert licences_of_card(tmp_path) == ()


def test_unknown_is_said():
    assert in_words(licences_of(None)) == "unknown"
    assert in_words(licences_of(["mit", "apache-2.0"])) == "mit and apache-2.0"
    with pytest.raises(ValueError, match="the name of a licence"):
        licences_of(3)


# -- backbones -----------------------------------------------------------------------------------


@pytest.fixture
def timm_folder(tmp_path, workshop):
    """The workshop's backbone as timm saves it, under a licence."""
    folder = tmp_path / "timm"
    card(folder, "license: mit")
    shutil.copy(workshop.checkpoint, folder / "model.safetensors")
    pretrained = {**workshop.backbone.model.pretrained_cfg, "license": "apache-2.0"}
    config = {
        "architecture": TINY_MODEL,
        "num_classes": BACKBONE_CLASSES,
        "model_args": TINY_ARGS,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_of_timm_and_its_card(timm_folder, workshop):
    assert load_backbone(BackboneSpec(str(timm_folder))).facts.license == ("apache-2.0", "mit")
    other = load_backbone(BackboneSpec(str(timm_folder), checkpoint=workshop.checkpoint))
    assert other.facts.license == (), "of these weights nobody says anything"


def test_random_weights_have_none(monkeypatch):
    import timm

    create = timm.create_model

    def licensed(*args, **kwargs):
        model = create(*args, **{**kwargs, "pretrained": False})
        model.pretrained_cfg["license"] = "apache-2.0"
        return model

    monkeypatch.setattr(timm, "create_model", licensed)
    assert load_backbone(BackboneSpec(TINY_MODEL, TINY_ARGS)).facts.license == ("apache-2.0",)
    random = load_backbone(BackboneSpec(TINY_MODEL, TINY_ARGS, pretrained=False))
    assert random.facts.license == ()


def test_transformers(tmp_path, monkeypatch):
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12,
    )  # fmt: skip
    folder = tmp_path / "hub" / "models--me--vit" / "snapshots" / ("0" * 40)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    assert load_backbone(BackboneSpec(f"transformers:{folder}")).facts.license == ()
    card(folder, "license: cc-by-4.0")
    assert load_backbone(BackboneSpec(f"transformers:{folder}")).facts.license == ("cc-by-4.0",)
    # The same of the hub, as its cache has it.
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    from hhdeploy.backbones.transformers.models import _licences

    found = _licences("me/vit")
    assert found == ("cc-by-4.0",)
    assert _licences("me/nobody") == ()


# -- adapters ------------------------------------------------------------------------------------


def test_an_adapter_s_configuration_and_card(tmp_path, tiny):
    adapter = random_adapter(tiny.facts)
    save_adapter(adapter, tmp_path / "a")
    assert load_adapter(tmp_path / "a").config.license == ()
    file = tmp_path / "a" / "adapter_config.json"
    content = json.loads(file.read_text())
    assert "license" not in content
    file.write_text(json.dumps({**content, "license": "MIT"}))
    card(tmp_path / "a", "license: [mit, apache-2.0]")
    both = load_adapter(tmp_path / "a")
    assert both.config.license == ("MIT", "apache-2.0")
    save_adapter(both, tmp_path / "b")
    assert load_adapter(tmp_path / "b").config == both.config
    file.write_text(json.dumps({**content, "license": {"name": "mit"}}))
    with pytest.raises(AdapterError, match="license: expected the name of a licence"):
        load_adapter(tmp_path / "a")
    merged = merge_adapters({"a": (both, 0.5), "b": (adapter, 0.5)}, head="a")
    assert merged.config.license == ("MIT", "apache-2.0")


def test_an_import_carries_it(tmp_path, tiny):
    source = tmp_path / "peft"
    card(source, "library_name: peft\nlicense: cc-by-nc-4.0")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["fc1"]}
    (source / "adapter_config.json").write_text(json.dumps(config))
    fc1 = tiny.model.get_submodule("blocks.0.mlp.fc1")
    stem = "base_model.model.blocks.{}.mlp.fc1.lora_{}.weight"
    tensors = {}
    for block in range(len(tiny.model.blocks)):
        tensors[stem.format(block, "A")] = torch.ones(2, fc1.in_features)
        tensors[stem.format(block, "B")] = torch.ones(fc1.out_features, 2)
    save_file(tensors, source / "adapter_model.safetensors")
    assert import_adapter(source, tiny).config.license == ("cc-by-nc-4.0",)
    (source / "adapter_config.json").write_text(json.dumps({**config, "license": 3}))
    with pytest.raises(AdapterError, match="license: expected a licence's name"):
        import_adapter(source, tiny)


# -- bundles -------------------------------------------------------------------------------------


def licensed(workshop, name, folder, licence):
    shutil.copytree(workshop.directory(name), folder)
    card(folder, f"license: {licence}")
    return folder


def test_bundle_graph_and_lines_tell_both(workshop, timm_folder, tmp_path):
    from hhdeploy.exporting.bundles import export

    alpha = licensed(workshop, "alpha", tmp_path / "alpha", "cc-by-nc-4.0")
    said = []
    result = export(
        str(timm_folder), {"alpha": alpha, "gamma": workshop.directory("gamma")}, tmp_path / "out",
        bank_as_constant=True, verify=False, cache=None, progress=said.append,
    )  # fmt: skip
    assert any("'alpha' states the licence cc-by-nc-4.0, its backbone apache-2.0 and mit" in line
               for line in said)  # fmt: skip
    assert not any("gamma" in line and "licence" in line for line in said)
    manifest = Bundle.open(result.path).manifest
    assert manifest.backbone.license == ("apache-2.0", "mit")
    assert [a.license for a in manifest.adapters] == [("cc-by-nc-4.0",), ()]
    content = manifest.to_json()
    assert content["backbone"]["license"] == ["apache-2.0", "mit"]
    assert [a.get("license") for a in content["adapters"]] == ["cc-by-nc-4.0", None]
    model = onnx.load(result.path / "model.onnx", load_external_data=False)
    props = {p.key: p.value for p in model.metadata_props}
    assert props["license"] == "apache-2.0 and mit"
    told = json.loads(props["adapters"])
    assert [told[name]["license"] for name in ("alpha", "gamma")] == ["cc-by-nc-4.0", "unknown"]


def test_an_adapter_that_is_added(workshop, small, tmp_path):
    bundle = shutil.copytree(small, tmp_path / "bundle")
    rival = licensed(workshop, "rival", tmp_path / "rival", "gpl-3.0")
    add_adapter(bundle, "rival", rival)
    assert Bundle.open(bundle).manifest.adapter("rival").license == ("gpl-3.0",)
