"""Models of transformers and of a user's function: loading, what is assumed, what is refused."""

from __future__ import annotations

import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from hhdeploy.adapters.checks import check
from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Head
from hhdeploy.adapters.importers import import_adapter
from hhdeploy.backbones.converting import agree
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.meaning import UNSTATED, meaning_beside
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.backbones.structure import classifier_path
from hhdeploy.backbones.transformers import models, with_classifier
from hhdeploy.backbones.transformers.processors import from_image_processor, stated_transform
from hhdeploy.errors import AdapterError, BackboneError
from hhdeploy.training import attach, extract
from tests.hhdeploy.backbones.small_vit import SMALL_VIT, save_small_vit
from tests.own_models import encoder
from tests.parity.architectures import save_transformers_config
from tests.support import (
    TINY_ARGS,
    TINY_MODEL,
    assert_parity,
    images,
    logits_of,
    random_adapter,
    tiny_spec,
)

SMALL = {**SMALL_VIT, "num_labels": 7}
OWN = "python:tests.own_models"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of save_pretrained. Read only."""
    return save_small_vit(tmp_path_factory.mktemp("saved") / "vit", num_labels=7)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved` to change."""
    path = tmp_path / "vit"
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def spec(folder, **options):
    return BackboneSpec(f"transformers:{folder}", **options)


def change(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


# -- transformers -----------------------------------------------------------------------------


def test_a_directory_of_transformers(saved):
    backbone = load_backbone(spec(saved))
    facts = backbone.facts
    assert (facts.classifier, facts.dim, facts.classes) == ("classifier", 48, 7)
    assert facts.preprocess.input_size == (3, 32, 32)
    assert facts.linears[0].path == "vit.layers.0.attention.q_proj"
    model = transformers.ViTForImageClassification.from_pretrained(saved).eval()
    inputs = torch.from_numpy(images(3)).double()
    with torch.no_grad():
        expected = model.double()(pixel_values=inputs).logits
        found = backbone.model.double()(inputs)
    assert_parity(expected.numpy(), found.numpy(), "algebra", "float32")
    assert torch.equal(
        backbone.model.state_dict()["classifier.bias"], model.state_dict()["classifier.bias"]
    )


@pytest.mark.filterwarnings(r"ignore:unclosed file .*adapter_config\.json:ResourceWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
def test_an_adapter_beside_a_model_of_transformers_is_not_put_on_it(saved, folder, monkeypatch):
    """transformers puts it there by itself where PEFT is installed: another model is the backbone.
    The adapter comes in from that very directory."""
    model = transformers.ViTForImageClassification.from_pretrained(saved)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    found, plain = load_backbone(spec(folder)), load_backbone(spec(saved))
    line = "an adapter of PEFT beside the model is left out: it has to be imported"
    assert found.notes == (line, *plain.notes)
    assert replace(found.facts, extra={}) == replace(plain.facts, extra={})
    assert set(import_adapter(folder, found).sites) == {
        site.name for linear in found.facts.linears for site in linear.sites if site.kind == "q"
    }
    # As of the hub, where nobody sees it beforehand.
    monkeypatch.setattr(models, "_adapter_beside", lambda *_: ())
    with pytest.raises(
        BackboneError, match=r"is a model with an adapter of PEFT on it \(adapter_c"
    ):
        load_backbone(spec(folder))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
def test_a_directory_of_a_model_that_peft_wraps_says_what_to_do(folder):
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    save_file(tuned.state_dict(), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"missing: vit.*of a model that PEFT wraps"):
        load_backbone(spec(folder))


@pytest.mark.parametrize("where", ["model", "checkpoint"])
def test_a_model_of_timm_in_transformers_has_the_transform_of_its_config(tmp_path, where):
    """It was asked for its size, and then took another transform than the one that is stated."""
    stated = {
        "input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
        "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center",
    }  # fmt: skip

    def save(folder, **changes):
        config = transformers.TimmWrapperConfig(
            architecture=TINY_MODEL, model_args=TINY_ARGS, num_labels=7, **changes
        )
        transformers.TimmWrapperForImageClassification(config).save_pretrained(tmp_path / folder)
        return spec(tmp_path / folder)

    saved = save("own", pretrained_cfg=stated)
    if where == "checkpoint":
        file = tmp_path / "own" / "model.safetensors"
        saved = replace(save("other"), checkpoint=file)
    backbone = load_backbone(saved)
    found = backbone.facts.preprocess
    assert (found.input_size, found.mean, found.std) == (
        (3, 32, 32),
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
    )
    assert (found.interpolation, found.crop_pct, found.crop_mode) == ("bicubic", 0.9, "center")
    assert (backbone.facts.classifier, backbone.facts.classes) == ("timm_model.head", 7)
    (line,) = load_backbone(save("bare")).notes
    assert line.startswith("image transform assumed, for want of pretrained_cfg: 32x32, bicubic")


def test_no_path_of_the_machine_is_in_the_facts(saved):
    facts = load_backbone(spec(saved)).facts
    assert facts.model == "transformers:ViTForImageClassification"
    assert str(saved.parent) not in json.dumps(facts.to_json())


def test_the_key_of_the_cache_holds_version_attention_and_configuration(folder):
    before = load_backbone(spec(folder)).traced_with
    assert before is not None
    assert {f"transformers {transformers.__version__}", "eager"} < set(before)
    change(folder / "config.json", layer_norm_eps=1e-6)
    assert load_backbone(spec(folder)).traced_with != before


def test_arguments_replace_entries_of_the_configuration(saved):
    backbone = load_backbone(spec(saved, args={"hidden_act": "relu"}))
    assert backbone.model.config.hidden_act == "relu"
    assert backbone.facts.args == {"hidden_act": "relu"}
    for name in ("no_such_entry", "_attn_implementation", "trust_remote_code"):
        with pytest.raises(BackboneError, match=rf"no entry '{name}'.*hidden_size"):
            load_backbone(spec(saved, args={name: True}))


def test_weights_that_do_not_fit(saved, folder):
    state = load_file(folder / "model.safetensors")
    del state["vit.layernorm.bias"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"missing: vit\.layernorm\.bias.*random.*'CLASS'"):
        load_backbone(spec(folder))
    with pytest.raises(
        BackboneError, match=r"classifier\.bias \(expected \[3\], found \[7\]\).*`model_args`"
    ):
        load_backbone(spec(folder, args={"num_labels": 3}, checkpoint=saved / "model.safetensors"))


@pytest.fixture
def headless(folder):
    """The same weights as a ViTModel's, which has a pooler and no classifier."""
    theirs = transformers.ViTModel(transformers.ViTConfig(**{**SMALL, "num_labels": 2}))
    theirs.save_pretrained(folder)
    return folder


def test_a_model_saved_without_a_classifier_gives_features_or_gets_a_place_for_one(headless):
    features = load_backbone(spec(headless)).facts
    assert (features.classifier, features.classes, features.dim) == ("", 0, 48)
    made = with_classifier(spec(headless))
    assert made.args == {"architectures": ["ViTForImageClassification"]}
    with_place = load_backbone(made).facts
    assert (with_place.classifier, with_place.classes, with_place.dim) == ("classifier", 0, 48)
    assert with_place.args == made.args
    assert with_classifier(made) is made
    assert with_classifier(BackboneSpec(f"{OWN}:encoder")) == BackboneSpec(f"{OWN}:encoder")


def test_a_classifier_of_an_adapter_without_a_place_says_what_to_do(headless):
    facts = load_backbone(spec(headless)).facts
    adapter = random_adapter(facts, classes=None)
    adapter = replace(adapter, head=Head("classifier", np.ones((7, 48), "f4"), np.ones(7, "f4")))
    with pytest.raises(
        AdapterError, match=r"the classifier classifier, .*'architectures'.*behind it"
    ):
        check("a", adapter, facts)


def test_half_a_classifier_is_none(folder):
    state = load_file(folder / "model.safetensors")
    whole = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    assert load_backbone(spec(folder)).facts.classes == 0
    for name in ("classifier.bias", "classifier.weight"):
        half = {k: v for k, v in state.items() if k != name}
        save_file(half, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BackboneError, match=rf"missing: {name}\..* whole or not at all"):
            load_backbone(spec(folder))


def test_two_classifiers_are_refused_and_one_of_the_adapters_is_offered(tmp_path):
    name = "DeiTForImageClassificationWithTeacher"
    torch.manual_seed(3)
    model = getattr(transformers, name)(transformers.DeiTConfig(**SMALL))
    model.save_pretrained(tmp_path / "deit")
    with pytest.raises(BackboneError, match=rf"{name} averages the answers of two classifiers"):
        load_backbone(spec(tmp_path / "deit"))
    one = {"architectures": ["DeiTForImageClassification"]}
    facts = load_backbone(spec(tmp_path / "deit", args=one)).facts
    assert (facts.classifier, facts.classes) == ("classifier", 0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("VideoMAEForVideoClassification", r"takes videos \(num_frames .* is 16\)"),
        ("VivitForVideoClassification", r"takes videos \(num_frames"),
        ("TimesformerForVideoClassification", r"takes videos \(num_frames"),
        ("VJEPA2ForVideoClassification", r"takes videos \(frames_per_clip"),
        ("VJEPA2Model", r"takes videos \(frames_per_clip"),
        ("PerceiverForImageClassificationLearned", r"Learned is none of the classes .* loaded"),
    ],
)
def test_a_model_of_no_single_images_is_refused_for_that(tmp_path, name, said):
    """ViViT's weights were called incomplete, V-JEPA's image size unknown, Perceiver's two."""
    save_transformers_config(name, {}, tmp_path / "model")
    with pytest.raises(BackboneError, match=said):
        load_backbone(spec(tmp_path / "model", pretrained=False))


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("Siglip2ForImageClassification", {"vision_config": SMALL_VIT}, "patches of .* spatial_sh"),
        ("Siglip2VisionModel", SMALL_VIT, "patches of .* spatial_shapes"),
        (
            "CLIPModel",
            {"vision_config": SMALL_VIT, "text_config": {"num_hidden_layers": 1}},
            r"input_ids.* tower \(vision_model\)",
        ),
        (
            "ImageGPTForImageClassification",
            {"n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 17},
            "input_ids",
        ),
        ("IJepaModel", SMALL_VIT, r"IJepaModel returned .* function that makes features"),
    ],
)
def test_a_model_of_more_than_images_is_refused_for_that(tmp_path, name, args, said):
    save_transformers_config(name, args, tmp_path / "model")
    asked = spec(tmp_path / "model", pretrained=False, input_size=(3, 32, 32))
    with pytest.raises(BackboneError, match=said) as refused:
        load_backbone(asked)
    assert "it does not compute" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["CLIPVisionModelWithProjection", "Aimv2VisionModel", "SiglipVisionModel"]
)
def test_an_image_tower_has_no_classifier_whoever_asks(tmp_path, name):
    """`attach` took a projection, or a Linear of the pooling, for one: the digest left it out, and
    the export refused the adapter as one of other weights."""
    kind = getattr(transformers, name)
    torch.manual_seed(3)
    model = kind(kind.config_class(**SMALL_VIT)).eval()
    model.save_pretrained(tmp_path / "tower")
    attach(model, AdapterConfig("tower", r=2, target_modules=("v",)))
    backbone = load_backbone(spec(tmp_path / "tower"))
    assert backbone.facts.classifier == classifier_path(model) == ""
    assert extract(model).config.base_sha256 == backbone.facts.sha256


def test_what_was_assumed_stays_in_the_manifest(folder):
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    backbone = load_backbone(spec(folder))
    (line,) = backbone.notes
    stated = backbone.facts.to_json()
    assert stated["assumed"] == [line]
    assert BackboneFacts.from_json(stated).extra == {"assumed": [line]}


def test_a_checkpoint_of_its_own(saved, tmp_path):
    state = load_file(saved / "model.safetensors")
    changed = {f"module._orig_mod.{k}": v + 1 for k, v in state.items()}
    torch.save({"model": state, "model_ema": changed}, tmp_path / "c.pth")
    model = load_backbone(spec(saved, checkpoint=tmp_path / "c.pth")).model
    assert torch.equal(model.state_dict()["classifier.bias"], state["classifier.bias"] + 1)
    headless = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    save_file(headless, tmp_path / "c.safetensors")
    assert load_backbone(spec(saved, checkpoint=tmp_path / "c.safetensors")).facts.classes == 0
    save_file({**state, "more": torch.zeros(2)}, tmp_path / "d.safetensors")
    with pytest.raises(BackboneError, match="unexpected: more"):
        load_backbone(spec(saved, checkpoint=tmp_path / "d.safetensors"))


@pytest.mark.parametrize("where", ["nowhere", "no config"])
def test_no_model_there(tmp_path, where, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "no config").mkdir()
    with pytest.raises(BackboneError, match=r"has no configuration that can be read"):
        load_backbone(spec(tmp_path / where))


@pytest.mark.parametrize(
    ("model", "pretrained"),
    [
        ("transformers:nobody/nothing", True),
        ("hf-hub:nobody/nothing", True),
        ("hf-hub:nobody/nothing", False),
        ("vit_tiny_patch16_224", True),
    ],
)
def test_without_a_network_the_message_says_how_not_to_wait(model, pretrained, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    with pytest.raises(BackboneError, match="Without a network, HF_HUB_OFFLINE=1 in") as caught:
        load_backbone(BackboneSpec(model, pretrained=pretrained))
    assert ".." not in str(caught.value)


def test_of_a_directory_no_network_is_spoken(tmp_path):
    with pytest.raises(BackboneError, match="no configuration that can be read") as caught:
        load_backbone(spec(tmp_path))
    assert "HF_HUB_OFFLINE" not in str(caught.value)


VIT = {"model_type": "vit", "hidden_size": 48, "num_attention_heads": 3, "image_size": 32}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, r"can be read: maximum recursion[^\n]*[^.]\. Expected a directory"),
        ("5", "no configuration that can be read"),
        (json.dumps({"model_type": ["vit"]}), "no configuration that can be read: unhashable"),
        # Some versions of transformers see it at once, others when the model is made.
        (json.dumps({**VIT, "hidden_size": None}), "'hidden_size'.*expected int|cannot be loaded"),
        (json.dumps({**VIT, "id2label": 5}), "no configuration that can be read"),
        (json.dumps({**VIT, "patch_size": 0}), "cannot be loaded: .*zero"),
    ],
    ids=["deep", "number", "type", "null", "labels", "zero"],
)
def test_a_configuration_with_values_that_are_none(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BackboneError, match=said):
        load_backbone(replace(spec(tmp_path), pretrained=False))


# -- no code of a file ------------------------------------------------------------------------


def test_a_bin_file_that_changed_on_its_way_is_refused(folder):
    """transformers reads it as other weights."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file, value = folder / "pytorch_model.bin", state["vit.embeddings.position_embeddings"]
    torch.save(state, file)
    load_backbone(spec(folder))
    whole = file.read_bytes()
    at = whole.index(value.numpy().tobytes())
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(BackboneError, match=r"cannot be loaded: it is damaged: .*Copy or downl"):
        load_backbone(spec(folder))


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_a_pickle_in_place_of_weights_runs_nothing(folder, tmp_path):
    mark = tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "w.pth"):
        with (folder / name).open("wb") as stream:
            pickle.dump({"vit.layernorm.bias": Hostile(mark)}, stream, protocol=2)
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(spec(folder))
    with pytest.raises(BackboneError, match="cannot be read"):
        load_backbone(spec(folder, checkpoint=folder / "w.pth"))
    assert not mark.exists()


@pytest.mark.parametrize("known", [True, False])
def test_code_that_a_configuration_names_never_runs(folder, tmp_path, known):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\n"
    (folder / "hostile.py").write_text(code + "class Config: pass\nclass Model: pass\n")
    names = {
        "AutoConfig": "hostile.Config",
        "AutoModelForImageClassification": "hostile.Model",
    }
    change(folder / "config.json", auto_map=names)
    if known:  # of a type that transformers has, its own code is taken
        assert load_backbone(spec(folder)).facts.classes == 7
    else:
        change(folder / "config.json", model_type="hostile")
        with pytest.raises(BackboneError, match="code that comes with a model is never run"):
            load_backbone(spec(folder))
    assert not mark.exists()


# -- image transforms -----------------------------------------------------------------------------


def test_the_image_transform_of_the_source(folder):
    assumed = load_backbone(spec(folder))
    assert assumed.notes == (
        "image transform assumed, for want of preprocessor_config.json: 32x32, bilinear, squash "
        "crop 1, mean 0.5, std 0.5",
    )
    stated = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "resample": 3}
    stated |= {"image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    backbone = load_backbone(spec(folder))
    assert backbone.notes == ()
    found = backbone.facts.preprocess
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (found.interpolation, found.crop_mode, found.crop_pct) == ("bicubic", "squash", 1.0)
    # transformers 5 writes it among those of other inputs, and reads that first.
    nested = {"image_processor": stated | {"image_mean": [0.7, 0.8, 0.9]}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert load_backbone(spec(folder)).facts.preprocess.mean == (0.7, 0.8, 0.9)
    (folder / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert load_backbone(spec(folder)).facts.preprocess.mean == (0.1, 0.2, 0.3)
    (folder / "processor_config.json").unlink()


def test_what_lies_beside_a_checkpoint_goes_before(saved, folder):
    """As of a directory that is itself the model, on a timm model and on one of transformers."""
    file, tiny = (
        folder / "model.safetensors",
        ("vit_tiny_patch16_224", {**TINY_ARGS, "depth": 1, "mlp_ratio": 1.67}),
    )
    specs = [BackboneSpec(*tiny, checkpoint=file), spec(saved, checkpoint=file)]
    for one in specs:
        (line,) = load_backbone(one).notes
        assert line.startswith("image transform assumed, for want of preprocessor_config.json: 32")
    stated = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "resample": 1}
    stated |= {"image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    whole = load_backbone(spec(folder)).facts.preprocess
    assert whole.mean == (0.1, 0.2, 0.3)
    for one in specs:
        backbone = load_backbone(one)
        assert backbone.facts.preprocess == whole
        assert backbone.notes == (
            "image transform taken from preprocessor_config.json beside the weights: "
            f"{whole.described()}",
        )
    change(folder / "preprocessor_config.json", do_pad=True)
    for one in specs:
        with pytest.raises(BackboneError, match=r"`checkpoint`: .*vit: .*do_pad: .* without it"):
            load_backbone(one)
    # transformers 5 writes it among those of other inputs: the file that is read is named.
    nested = {"image_processor": stated | {"image_mean": [0.7, 0.8, 0.9]}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    for one in specs:
        (line,) = load_backbone(one).notes
        assert line.startswith("image transform taken from processor_config.json beside the weigh")
    nested["image_processor"] |= {"do_pad": True}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    with pytest.raises(BackboneError, match=r"vit: processor_config\.json: do_pad: "):
        load_backbone(specs[0])
    (folder / "processor_config.json").unlink()


def test_a_configuration_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "preprocessor_config.json")
    with pytest.raises(BackboneError, match=r"preprocessor_config\.json cannot be read: it is a p"):
        stated_transform(str(tmp_path), (3, 32, 32))
    os.mkfifo(tmp_path / "config.json")
    beside = tmp_path / "x.safetensors"
    assert meaning_beside(beside, 5) == UNSTATED
    with pytest.raises(BackboneError, match=r"config\.json cannot be read: it is a pipe"):
        agree(torch.nn.LayerNorm(4), beside)
    with pytest.raises(
        BackboneError, match=r"has no config\.json that can be read: .*it is a pipe"
    ):
        load_backbone(BackboneSpec(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a JSON object, found list"),
        pytest.param("[" * 100_000, "is not valid JSON", id="deep"),
        ('{"image_mean": [0.5], "image_std": [0.5]}', "cannot be read: .*3 numbers"),
        ('{"image_mean": 1, "image_std": 1, "resample": "x"}', "cannot be read: "),
        ('{"image_mean": [127.5, 127.5, 127.5], "image_std": [1, 1, 1]}', "by 255"),
    ],
)
def test_a_damaged_image_processor(folder, content, message):
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(BackboneError, match=message):
        load_backbone(spec(folder))


@pytest.mark.parametrize(
    "stated",
    [
        {"size": {"height": 24, "width": 24}, "do_center_crop": False},
        {"size": {"shortest_edge": 32}, "do_center_crop": True},
        {
            "size": {"height": 32, "width": 32},
            "do_center_crop": True,
            "crop_size": {"height": 24, "width": 24},
        },
    ],
)
def test_an_image_processor_gives_the_same_pixels(stated):
    crop = {"crop_size": {"height": 24, "width": 24}}
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2}
    processor = transformers.CLIPImageProcessor(**{**crop, **settings, **stated})
    pixels = np.random.default_rng(0).integers(0, 256, (41, 59, 3), np.uint8)
    expected = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    found = from_image_processor({**settings, **stated}, (3, 24, 24))(Image.fromarray(pixels))
    # torchvision and Pillow round differently, at most by two levels of 255.
    assert np.abs(found - expected).max() < 2.1 / 255 / 0.2


# -- functions --------------------------------------------------------------------------------


def test_a_model_of_texts_and_images_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config={**sizes, "vocab_size": 99}, vision_config=vision)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    with pytest.raises(
        BackboneError, match=r"CLIPModel takes input_ids, .* images alone.*vision_mod"
    ):
        load_backbone(spec(tmp_path / "clip"))


@pytest.mark.parametrize("way", ["directory", "checkpoint", "random"])
def test_a_tower_with_a_projection_gives_what_it_projects(tmp_path, way):
    sizes = {key: value for key, value in SMALL.items() if key != "num_labels"}
    torch.manual_seed(4)
    config = transformers.CLIPVisionConfig(**sizes, projection_dim=16)
    own = transformers.CLIPVisionModelWithProjection(config).eval()
    own.save_pretrained(tmp_path / "clip")
    options = {
        "directory": {},
        "checkpoint": {"checkpoint": tmp_path / "clip" / "model.safetensors"},
        "random": {"pretrained": False},
    }[way]
    found = load_backbone(spec(tmp_path / "clip", **options))
    assert (found.facts.classes, found.facts.dim) == (0, 16)
    assert "visual_projection" in {linear.path for linear in found.facts.linears}
    if way != "random":
        x = images(2)
        with torch.no_grad():
            right = own(torch.from_numpy(x)).image_embeds.double().numpy()
        assert_parity(right, logits_of(found.model, x), "algebra", "float32")


def test_weights_without_a_place_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["ViTModel"]
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    pooler = {"vit.pooler.dense.weight": torch.eye(48), "vit.pooler.dense.bias": torch.zeros(48)}
    save_file(state | pooler, folder / "model.safetensors", {"format": "pt"})
    assert any("left out: classifier" in note for note in load_backbone(spec(folder)).notes)
    # In the file the blocks have one name more before them than in the model of features.
    more = "vit.layers.0.attention.q_proj.loras.task.lora_A"
    save_file(
        state | pooler | {more: torch.ones(4)}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(BackboneError, match=f"unexpected: {more}.* these beside it"):
        load_backbone(spec(folder))


H = [0.5] * 3
NUMBERS = {"image_mean": H, "image_std": H, "do_normalize": True, "do_resize": True}


@pytest.mark.parametrize(
    ("kind", "stated"),
    [
        ("ViT", {"size": 32}),
        ("ViT", {"size": 32, "resample": 3}),
        ("Beit", {"size": 32, "do_center_crop": False, "crop_size": 32}),
        ("DeiT", {"size": 40, "do_center_crop": True, "crop_size": 32}),
        ("CLIP", {"size": 32, "do_center_crop": True, "crop_size": 32}),
        ("CLIP", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
        ("CLIP", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}),
        ("ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3}),
        ("ConvNext", {"size": {"shortest_edge": 32}}),
        ("Levit", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
        ("Siglip", {"size": {"height": 32, "width": 32}}),
    ],
)
def test_a_processor_is_read_as_its_kind_reads_itself(kind, stated):
    """Of a wide picture, with what the file leaves to the processor left to it. What is cut off is
    an even number of pixels: of an odd one, they cut the smaller half off first."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8))
    picture = coarse.resize((160, 80), Image.Resampling.BICUBIC)
    name = f"{kind}ImageProcessor"
    theirs = getattr(transformers, name)(**NUMBERS, **stated)
    wanted = np.asarray(theirs(picture, return_tensors="np")["pixel_values"][0])
    found = from_image_processor({**NUMBERS, **stated, "image_processor_type": name}, (3, 32, 32))
    assert np.abs(found(picture) - wanted).mean() < 0.02


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"size": 40, "do_center_crop": True}, "size 40 is a square to some image processors"),
        ({"size": {"shortest_edge": 32}, "crop_pct": 0.9}, "crop_pct of a processor that is not"),
        ({"size": 32, "do_flip_channel_order": True}, "do_flip_channel_order: the transform here"),
        ({"size": 32, "do_pad": True}, "do_pad: the transform here has no such step"),
        ({"size": 32, "do_resize": False}, "do_resize: false: the transform here"),
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 24},
            "crop_size: pictures are cut to 24 x 24, and the model's inputs are 32 x 32",
        ),
        ({"size": 64}, "size: pictures are resized to 64 x 64, and the model's inputs are 32 x 32"),
        ({"size": {"height": 32, "width": 64}}, "size: pictures are resized to 32 x 64"),
        ({"size": {"height": 40, "width": 60}, "do_center_crop": True}, "resized to 40 x 60"),
        ({"size": {"max_height": 32, "max_width": 32}}, "size: .*found max_height, max_width"),
        ({"size": {"longest_edge": 32}}, "size: .*found longest_edge"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "found shortest_edge, longest_edge"),
        ({"size": 0}, "cannot be read: size is {'height': 0, 'width': 0}"),
        ({"size": {"height": -32, "width": 32}}, "cannot be read: size is"),
        ({"size": {"shortest_edge": 32}}, "a shortest_edge of 32 and no do_center_crop leave"),
        ({"image_processor_type": "CLIPImageProcessor"}, "size: expected the shortest_edge"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}},
            "size: pictures are cut to 64 x 64, and the model's inputs are 32 x 32",
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
            "size: pictures are cut to 384 x 384",
        ),
        ({"size": 32, "rescale_offset": True}, "rescale_offset: the transform here has no such"),
        ({"size": 32, "do_color_quantize": True}, "do_color_quantize: the transform here has no"),
        ({"size": 32, "pad_size": {"height": 64, "width": 64}}, "pad_size: the transform here"),
        ({"size": 32, "crop_to_patches": True}, "crop_to_patches: the transform here"),
        ({"size": 32, "include_top": True}, "include_top: the transform here"),
    ],
)
def test_what_a_processor_does_and_we_do_not_is_refused(stated, message):
    with pytest.raises(BackboneError, match=message):
        from_image_processor({**NUMBERS, **stated}, (3, 32, 32))


def test_a_shortest_edge_is_of_a_square_alone():
    """The transform here covers a rectangle, theirs resizes to the edge and pads."""
    stated = {**NUMBERS, "size": {"shortest_edge": 40}, "do_center_crop": True}
    with pytest.raises(BackboneError, match=r"size: pictures are resized to 40 x 40, .* 32 x 48"):
        from_image_processor(stated, (3, 32, 48))


@pytest.mark.parametrize("size", [375, {"height": 375, "width": 375}, {"shortest_edge": 375}])
def test_the_edge_that_a_share_stands_for_is_found_again(size):
    """224 / (224 / 375) is less than 375 in floating point, and is rounded down."""
    stated = {**NUMBERS, "size": size, "image_processor_type": "CLIPImageProcessor"}
    found = from_image_processor({**stated, "do_center_crop": True}, (3, 224, 224))
    assert found.resized(1, 1) == (375, 375)


def test_what_changes_no_picture_is_no_step():
    stated = {"do_convert_rgb": True, "do_reduce_labels": True, "do_pad": False, "pad_size": None}
    stated |= {"size": {"height": 32, "width": 32, "longest_edge": None}}
    assert from_image_processor({**NUMBERS, **stated}, (3, 32, 32)).crop_mode == "squash"


def test_a_processor_that_names_no_kind_and_cuts_nothing_squashes():
    """google/vit-base-patch16-224 is such a file."""
    assert from_image_processor({**NUMBERS, "size": 32}, (3, 32, 32)).crop_mode == "squash"


def test_a_crop_without_a_resize_is_refused():
    stated = {"do_resize": False, "do_center_crop": True, "crop_size": 32, "size": 40}
    stated |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(BackboneError, match="do_center_crop without do_resize"):
        from_image_processor(stated, (3, 32, 32))


def test_a_function_of_the_user():
    backbone = load_backbone(BackboneSpec(f"{OWN}:authors_vit", input_size=(3, 24, 40)))
    facts = backbone.facts
    assert (facts.model, facts.classifier) == (f"{OWN}:authors_vit", "head")
    assert (facts.dim, facts.classes) == (48, 7)
    assert {s.kind for linear in facts.linears for s in linear.sites} == set(
        "q k v proj fc1 fc2".split()
    )
    assert facts.preprocess.input_size == (3, 24, 40)
    assert backbone.notes[0].startswith("image transform assumed: 24x40")
    assert backbone.traced_with is None  # never cached


def test_the_module_may_say_its_size_and_take_arguments():
    facts = load_backbone(BackboneSpec(f"{OWN}:encoder", {"depth": 1})).facts
    assert facts.preprocess.input_size == (3, 32, 32)
    assert [linear.path.partition(".layers.")[2] for linear in facts.linears] == [
        "0.self_attn.in_proj",
        "0.self_attn.out_proj",
        "0.linear1",
        "0.linear2",
    ]


def with_transform(**stated):
    """A plain module that says how its images become inputs, and no more; see below."""
    model = encoder(1)
    model.pretrained_cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], **stated}
    return model


def test_the_module_may_state_its_transform():
    name = f"python:{__name__}:with_transform"
    # The size that the module says itself goes before that of the weights' first training.
    backbone = load_backbone(BackboneSpec(name, {"crop_pct": 0.5, "input_size": [3, 224, 224]}))
    found = backbone.facts.preprocess
    assert (found.input_size, found.mean, found.std) == (
        (3, 32, 32),
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
    )
    assert (found.crop_pct, backbone.notes, backbone.facts.classifier) == (0.5, (), "head")
    with pytest.raises(BackboneError, match=r"its pretrained_cfg: .*3 numbers"):
        load_backbone(BackboneSpec(name, {"mean": [0.1, 0.2]}))


def test_a_module_of_the_current_directory_is_found_last(tmp_path, monkeypatch):
    (tmp_path / "my_own_vit.py").write_text("from tests.own_models import encoder\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own_vit", raising=False)
    assert load_backbone(BackboneSpec("python:my_own_vit:encoder")).facts.classes == 7
    assert str(tmp_path) not in sys.path


def test_a_current_directory_that_is_in_the_path_stays_where_it_is(monkeypatch):
    """As that of a script is, which is first."""
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    before = list(sys.path)
    load_backbone(BackboneSpec("python:tests.own_models:encoder"))
    assert sys.path == before


@pytest.mark.parametrize("model", [TINY_MODEL, "python:tests.own_models:encoder", "transformers:"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_the_caller_s_random_numbers_go_on(model, pretrained, saved, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    source = spec(saved) if model == "transformers:" else tiny_spec(model)
    torch.manual_seed(3)
    before, seeded = torch.get_rng_state(), seeds.copy()
    load_backbone(replace(source, pretrained=pretrained and model != TINY_MODEL))
    assert torch.equal(torch.get_rng_state(), before)
    assert seeds == seeded  # of the GPUs, where there are some


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("tests.own_models", {}, "expected python:package.module:function"),
        ("tests.nowhere:f", {}, r"No module named 'tests\.nowhere'.*PYTHONPATH"),
        ("tests.own_models:f", {}, r"has no function 'f'. It has .*"),
        ("tests.own_models:authors_vit", {"width": 3}, r"arguments \{'width': 3\}.*width"),
        ("tests.own_models:authors_vit", {}, "the size of its images is not known"),
        ("tests.own_models:no_module", {}, "returned str; expected a torch.nn.Module"),
        ("tests.own_models:lazy", {}, r"Encoder: head\.weight: .*lazy module that has not run"),
    ],
)
def test_functions_that_give_no_model(name, args, message):
    with pytest.raises(BackboneError, match=message):
        load_backbone(BackboneSpec(f"python:{name}", args))


def test_the_digest_is_of_the_weights_whatever_the_source(saved):
    """The same weights under another name: an adapter of one belongs to the other."""
    one = load_backbone(spec(saved)).facts
    other = load_backbone(spec(saved, args={"layer_norm_eps": 1e-5})).facts
    assert one.sha256 == other.sha256
    assert replace(one, args=other.args) == other


def test_a_configuration_alone_gives_random_weights(tmp_path):
    save_transformers_config("ViTForImageClassification", SMALL, tmp_path)
    one, same, other = (
        load_backbone(spec(tmp_path, pretrained=False, seed=seed)).facts.sha256
        for seed in (1, 1, 2)
    )
    assert one == same != other
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(spec(tmp_path))


def test_loading_says_nothing_of_its_own(saved, capfd):
    load_backbone(spec(saved))
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_weight_that_two_modules_have_is_no_site():
    """A graph has one weight for both, where an adapter of the one changed the other in silence; a
    module that is used twice is changed in both uses."""
    found = [linear.path for linear in load_backbone(BackboneSpec(f"{OWN}:tied")).facts.linears]
    assert not [path for path in found if path.endswith("linear1")]
    assert [path for path in found if path.endswith("linear2")] == [
        f"encoder.layers.{layer}.linear2" for layer in range(2)
    ]
