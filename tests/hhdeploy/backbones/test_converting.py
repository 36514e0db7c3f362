"""Weights of transformers on timm's model of the architecture: the same outputs, or a reason."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from hhdeploy.adapters.importers import import_adapter
from hhdeploy.backbones.converting import _TOWER_DEFAULTS
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.errors import AdapterError, BackboneError
from hhdeploy.parity import bound, compare
from hhdeploy.training import attach
from tests.support import assert_parity, images, logits_of, perturb

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"patch_size": 4, "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3], "window_size": 4}
QUICK = {**TIMM, "act_layer": "quick_gelu"}
TANH = {**TIMM, "act_layer": "gelu_tanh"}
TEXT = {"vocab_size": 11, "hidden_size": 12, "intermediate_size": 17, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 5}
# Class of transformers, its configuration, timm's model, its arguments.
SAME = {
    "vit": ("ViTForImageClassification", SIZES, "vit_tiny_patch16_224", TIMM),
    "vit eps": (
        "ViTForImageClassification",
        {**SIZES, "layer_norm_eps": 0.05},
        "vit_tiny_patch16_224",
        TIMM,
    ),
    "vit gelu": (
        "ViTForImageClassification",
        {**SIZES, "hidden_act": "gelu_pytorch_tanh"},
        "vit_tiny_patch16_224",
        {**TIMM, "act_layer": "gelu_tanh"},
    ),
    "beit": (
        "BeitForImageClassification",
        {**SIZES, "use_relative_position_bias": True},
        "beit_base_patch16_224",
        {**TIMM, "init_values": 0.1},
    ),
    "dinov2": (
        "Dinov2Model",
        {**SIZES, "mlp_ratio": 4},
        "vit_small_patch14_dinov2",
        TIMM,
    ),
    "deit": (
        "DeiTForImageClassification",
        SIZES,
        "deit_tiny_patch16_224",
        {**TIMM, "reg_tokens": 1},
    ),
    "clip": (
        "CLIPForImageClassification",
        {"vision_config": SIZES, "num_labels": 7},
        "vit_base_patch16_clip_224",
        {**QUICK, "global_pool": "avg", "final_norm": False},
    ),
    "clip features": ("CLIPVisionModel", SIZES, "vit_base_patch16_clip_224", QUICK),
    "clip whole": (
        "CLIPModel",
        {
            "vision_config": {**SIZES, "layer_norm_eps": 0.05},
            "text_config": TEXT,
            "projection_dim": 13,
        },
        "vit_base_patch16_clip_224",
        QUICK,
    ),
    "siglip": (
        "SiglipForImageClassification",
        {"vision_config": SIZES, "num_labels": 7},
        "vit_base_patch16_siglip_gap_224",
        TANH,
    ),
    "siglip features": ("SiglipVisionModel", SIZES, "vit_base_patch16_siglip_224", TANH),
    "swin": (
        "SwinForImageClassification",
        {**SWIN, "image_size": 32, "num_labels": 7, "layer_norm_eps": 0.05},
        "swin_tiny_patch4_window7_224",
        {**SWIN, "img_size": 32},
    ),
}


def saved(folder, name, config, *, old=False):
    """A model with weights and config.json, by the names of transformers 5 or before."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**config)).eval()
    perturb(model, classifier="classifier")
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file(state_4(state, name) if old else state, folder / "m.safetensors")
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=not old))
    return model


def state_4(state, name):
    """As transformers before version 5 saved it: other names, and what nothing needs: the index
    into a table of position biases, of CLIP and SigLIP the numbers of the positions."""
    if name.startswith(("CLIP", "Siglip")):
        outer = "vision_model." if name.endswith("VisionModel") else ""
        numbers = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
        return {f"{outer}{key}": value for key, value in state.items()} | numbers
    found = {names_4(key): value for key, value in state.items()}
    tables = [key for key in found if key.endswith("relative_position_bias_table")]
    index = torch.zeros(17, 17, dtype=torch.int64)
    return found | {key.replace("bias_table", "index"): index.clone() for key in tables}


def names_4(key):
    """As transformers before version 5 has it."""
    inner = "attention.self." if "swin" in key else "attention.attention."
    key = re.sub(r"^(vit|beit)\.layers\.", r"\1.encoder.layer.", key)
    words = {"q": "query", "k": "key", "v": "value"}
    key = re.sub(r"attention\.([qkv])_proj", lambda m: inner + words[m[1]], key)
    key = key.replace("attention.o_proj", "attention.output.dense")
    return key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")


def loaded(folder, model, args):
    return load_backbone(BackboneSpec(model, args, folder / "m.safetensors"))


@pytest.mark.parametrize("old", [False, True], ids=["now", "before 5"])
@pytest.mark.parametrize("case", list(SAME))
def test_the_outputs_are_transformers_own(case, old, tmp_path):
    name, config, model, args = SAME[case]
    theirs = saved(tmp_path, name, config, old=old)
    backbone = loaded(tmp_path, model, args)
    x = images(3)
    tower = theirs.vision_model if name == "CLIPModel" else theirs
    wide = torch.from_numpy(x).double()
    with torch.no_grad():
        found = tower.double()(wide)
    if hasattr(found, "logits"):
        assert backbone.facts.classes == 7
        expected, ours = found.logits, logits_of(backbone.model, x)
    else:
        assert backbone.facts.classes == 0
        expected, model = found.pooler_output, backbone.model.double()
        with torch.no_grad():
            ours = model.forward_head(model.forward_features(wide), pre_logits=True).numpy()
    comparison = compare(expected.numpy(), ours)
    assert not comparison.failures(bound("algebra", "float64")), comparison
    (line,) = backbone.notes
    assert line.startswith("image transform assumed, for want of preprocessor_config.json")


def test_without_a_configuration_a_line_says_what_is_assumed(tmp_path):
    saved(tmp_path, *SAME["vit"][:2])
    (tmp_path / "config.json").unlink()
    line, _ = loaded(tmp_path, *SAME["vit"][2:]).notes
    assert "norm eps 1e-06, 3 heads" in line
    assert line.endswith("assumed")


def changed(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_an_epsilon_that_the_configuration_does_not_say_is_timm_s(tmp_path):
    saved(tmp_path, *SAME["vit"][:2])
    changed(tmp_path, layer_norm_eps=None)
    line, _ = loaded(tmp_path, *SAME["vit"][2:]).notes
    assert line == f"{tmp_path / 'config.json'} says no layer_norm_eps: timm's 1e-06 assumed"


def test_the_epsilon_is_part_of_the_traced_graph_s_key(tmp_path):
    keys = []
    for eps in (1e-6, 0.05):
        saved(tmp_path, SAME["vit"][0], {**SIZES, "layer_norm_eps": eps})
        keys.append(loaded(tmp_path, *SAME["vit"][2:]).traced_with)
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("change", "args", "said"),
    [
        ({"num_attention_heads": 4}, {}, r"config.json: 4 heads, the timm model has 3.*num_heads"),
        ({"hidden_act": "quick_gelu"}, {}, "activation is quick_gelu, the timm model's GELU"),
        ({}, {"global_pool": "avg", "fc_norm": False}, "reads a token, .*global_pool is 'avg'"),
        ({"layer_norm_eps": "1e-6"}, {}, "layer_norm_eps: expected a small number, found '1e-6'"),
        ({"vision_config": None}, {}, "vision_config: expected an object, found None"),
        ({}, {"norm_layer": "groupnorm1"}, "`model_args`: expected LayerNorms.* norm_layer out"),
    ],
)
def test_what_weights_do_not_show_is_compared(change, args, said, tmp_path):
    saved(tmp_path, *SAME["vit"][:2])
    changed(tmp_path, **change)
    with pytest.raises(BackboneError, match=said):
        loaded(tmp_path, "vit_tiny_patch16_224", {**TIMM, **args})


def test_what_timm_has_no_module_for_is_refused(tmp_path):
    """DeiT's distillation token, and its teacher's classifier; a tensor of nobody's; the
    classifier of DINOv2, which reads twice as much."""
    saved(tmp_path, "DeiTForImageClassification", SIZES)
    with pytest.raises(BackboneError, match=r"distillation token.*'reg_tokens': 1"):
        loaded(tmp_path, "deit_tiny_patch16_224", TIMM)
    saved(tmp_path, "DeiTForImageClassificationWithTeacher", SIZES)
    with pytest.raises(BackboneError, match=r"two classifiers, whose answers DeiT averages"):
        loaded(tmp_path, "deit_tiny_patch16_224", {**TIMM, "reg_tokens": 1})
    saved(tmp_path, "ViTForImageClassification", SIZES)
    state = load_file(tmp_path / "m.safetensors")
    save_file(state | {"vit.embeddings.odd": torch.ones(3)}, tmp_path / "m.safetensors")
    with pytest.raises(BackboneError, match=r"nothing for vit\.embeddings\.odd.*transformers:"):
        loaded(tmp_path, "vit_tiny_patch16_224", TIMM)
    saved(tmp_path, "Dinov2ForImageClassification", {**SIZES, "mlp_ratio": 4})
    with pytest.raises(BackboneError, match=r"head.weight \(expected \[7, 48\], found \[7, 96\]"):
        loaded(tmp_path, "vit_small_patch14_dinov2", TIMM)


@pytest.mark.parametrize(
    ("case", "model", "args", "said"),
    [
        ("clip", "vit_base_patch16_clip_224", {"act_layer": "quick_gelu"}, "'final_norm': False"),
        (
            "clip features",
            "vit_base_patch16_clip_224",
            {"global_pool": "avg"},
            "'global_pool': 'token'",
        ),
        ("siglip", "vit_base_patch16_siglip_224", {"act_layer": "gelu_tanh"}, "'fc_norm': False"),
        ("siglip features", "vit_base_patch16_siglip_gap_224", {}, "'global_pool': 'map'"),
        ("siglip", "vit_base_patch16_siglip_gap_224", {}, "activation is gelu_pytorch_tanh"),
        ("clip whole", "vit_base_patch16_clip_224", {}, "activation is quick_gelu"),
    ],
)
def test_a_tower_that_reads_other_tokens_is_refused(case, model, args, said, tmp_path):
    saved(tmp_path, *SAME[case][:2])
    with pytest.raises(BackboneError, match=said):
        loaded(tmp_path, model, {**TIMM, **args})


def tuned(folder, name, config, **changes):
    """PEFT's model on a tower with a classifier, random, and saved beside the tower's weights."""
    peft = pytest.importorskip("peft")
    arguments = {
        "target_modules": ["q_proj", "out_proj", "fc2"],
        "exclude_modules": r".*\.head\..*",
        "modules_to_save": ["classifier"],
    }
    lora = peft.LoraConfig(r=3, **{**arguments, **changes})
    theirs = peft.get_peft_model(saved(folder, name, config), lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder / "lora")
    return theirs


# PEFT 0.21 reads its own adapter_config.json without closing it when it saves.
PEFT_S_OWN = (
    pytest.mark.filterwarnings(r"ignore:unclosed file .*adapter_config\.json:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
)


def by_peft(test):
    """The marks of a test that saves with PEFT."""
    for mark in PEFT_S_OWN:
        test = mark(test)
    return test


@by_peft
@pytest.mark.parametrize("case", ["clip", "siglip"])
def test_an_adapter_of_the_tower_comes_onto_timm_s(case, tmp_path):
    theirs = tuned(tmp_path, *SAME[case][:2])
    backbone = loaded(tmp_path, *SAME[case][2:])
    adapter = import_adapter(tmp_path / "lora", backbone)
    assert "assumed" not in adapter.config.extra["imported_from"]
    assert {site.rpartition(".")[2] for site in adapter.sites} == {"q", "proj", "fc2"}
    x = images(3)
    with torch.no_grad():
        expected = theirs.double()(torch.from_numpy(x).double()).logits.numpy()
    assert_parity(expected, logits_of(attach(backbone.model, adapter), x), "algebra", "float32")


@by_peft
@pytest.mark.parametrize("case", ["vit", "beit", "deit", "clip", "swin"])
@pytest.mark.parametrize(
    "changes",
    [
        {"bias": "lora_only", "target_modules": ["q_proj", "v_proj", "fc1"]},
        {"target_modules": ["q_proj", "classifier"], "modules_to_save": None},
        {"target_modules": "all-linear", "modules_to_save": None},
    ],
    ids=["biases", "classifier", "all-linear"],
)
def test_an_adapter_of_any_of_these_models_comes_onto_timm_s(case, changes, tmp_path):
    """q, k and v apart, of which BEiT has two biases; Swin's stages with what is between them."""
    theirs = tuned(tmp_path, *SAME[case][:2], **{"exclude_modules": None, **changes})
    backbone = loaded(tmp_path, *SAME[case][2:])
    adapter = import_adapter(tmp_path / "lora", backbone)
    x = images(3)
    with torch.no_grad():
        expected = theirs.double()(torch.from_numpy(x).double()).logits.numpy()
    assert_parity(expected, logits_of(attach(backbone.model, adapter), x), "algebra", "float32")


@by_peft
@pytest.mark.parametrize(
    ("case", "args"),
    [
        ("clip", "'global_pool': 'avg', 'final_norm': False"),
        ("siglip", "'global_pool': 'avg', 'fc_norm': False"),
    ],
)
def test_a_classifier_that_read_other_tokens_is_refused(case, args, tmp_path):
    """Trained on transformers' class, brought onto the tower's features as timm pools them."""
    name, config = SAME[case][:2]
    tuned(tmp_path, name, config)
    features = SAME[f"{case} features"]
    saved(tmp_path, *features[:2])
    backbone = loaded(tmp_path, *features[2:])
    with pytest.raises(AdapterError, match=rf"trained on {name}, .*{args}.*saved as {name}"):
        import_adapter(tmp_path / "lora", backbone)


@by_peft
def test_of_a_class_that_is_not_told_a_line_says_what_is_assumed(tmp_path):
    """PEFT writes no auto_mapping where the task is named."""
    tuned(tmp_path, *SAME["clip"][:2])
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_mapping": None}))
    adapter = import_adapter(tmp_path / "lora", loaded(tmp_path, *SAME["clip"][2:]))
    (line,) = adapter.config.extra["imported_from"]["assumed"]
    assert "is not known: assumed" in line
    assert line.endswith("global_pool 'avg' with no norm")


def test_what_a_towers_configuration_leaves_out():
    for name, stated in _TOWER_DEFAULTS.items():
        theirs = transformers.AutoConfig.for_model(name).vision_config
        assert {key: getattr(theirs, key) for key in stated} == stated


def test_the_pooler_that_no_classifier_reads_is_left_out(tmp_path):
    """Weights of a ViTModel, as they are before a fine-tuning."""
    theirs = saved(tmp_path, "ViTModel", {k: v for k, v in SIZES.items() if k != "num_labels"})
    backbone = loaded(tmp_path, "vit_tiny_patch16_224", {**TIMM, "num_classes": 0})
    x = torch.from_numpy(images(2)).double()
    with torch.no_grad():
        expected = theirs.double()(x).last_hidden_state.numpy()
        ours = backbone.model.double().forward_features(x).numpy()
    comparison = compare(expected.reshape(2, -1), ours.reshape(2, -1), "regression")
    assert not comparison.failures(bound("algebra", "float64")), comparison
