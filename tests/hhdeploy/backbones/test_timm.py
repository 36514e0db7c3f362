"""timm models: creation, checkpoints, digest, facts."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from hhdeploy.backbones.attention import plain_attention
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.sites import sites_of
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.backbones.structure import base_sha256, find_linears, signs_sha256
from hhdeploy.backbones.weights import load_strictly
from hhdeploy.errors import BackboneError, PlanError
from hhdeploy.plan import Reserve, plan_branches
from tests.own_models import ruling_out
from tests.support import (
    TINY_ARGS,
    TINY_MODEL,
    assert_caught,
    assert_parity,
    images,
    logits_of,
    perturb,
    random_adapter,
    tiny_backbone,
    tiny_spec,
)


def with_checkpoint(file, **args):
    return BackboneSpec(TINY_MODEL, TINY_ARGS | args, checkpoint=file)


def checkpoint(path, model, changes=None):
    state = {k: v.clone() for k, v in model.state_dict().items()} | (changes or {})
    save_file({k: v for k, v in state.items() if v is not None}, path)
    return path


# -- creation -----------------------------------------------------------------------------------


def test_facts(tiny_facts):
    assert tiny_facts.model == f"{TINY_MODEL}.augreg_in21k_ft_in1k"
    assert tiny_facts.args == TINY_ARGS
    assert (tiny_facts.classifier, tiny_facts.dim, tiny_facts.classes) == ("head", 48, 1000)
    assert tiny_facts.preprocess.input_size == (3, 32, 32)
    shapes = {s.name: (s.kind, s.out, s.in_) for s in sites_of(tiny_facts.linears).values()}
    assert len(shapes) == 2 * 6
    assert shapes["blocks.1.attn.qkv.k"] == ("k", 48, 48)
    assert shapes["blocks.0.mlp.fc1"] == ("fc1", 192, 48)
    assert shapes["blocks.0.mlp.fc2"] == ("fc2", 48, 192)


def test_the_model_is_frozen_and_seeded(tiny):
    assert not tiny.model.training
    assert not any(p.requires_grad for p in tiny.model.parameters())
    again = load_backbone(tiny_spec())
    assert load_backbone(tiny_spec()).facts == again.facts


def test_creation_leaves_torch_s_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_backbone(tiny_spec())
    assert torch.equal(torch.rand(2), expected)


def test_num_classes_zero_has_a_placeholder_classifier():
    backbone = load_backbone(tiny_spec(num_classes=0))
    assert backbone.facts.classes == 0
    assert backbone.facts.dim == 48
    assert isinstance(backbone.model.get_submodule("head"), nn.Linear)


def test_the_tag_is_kept():
    backbone = load_backbone(tiny_spec(f"{TINY_MODEL}.augreg_in21k", **TINY_ARGS))
    assert backbone.facts.model == f"{TINY_MODEL}.augreg_in21k"


def test_an_unknown_model():
    with pytest.raises(BackboneError, match=r"unknown timm model 'vit_tiny_patch16_225'.*mean vit"):
        load_backbone(BackboneSpec("vit_tiny_patch16_225", pretrained=False))
    with pytest.raises(BackboneError, match=r"unknown timm model 'no_such_model'"):
        load_backbone(BackboneSpec("no_such_model", pretrained=False))


def test_what_is_given_in_the_place_of_a_model_s_name(tmp_path):
    (tmp_path / "tuned.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for model, message in {
        str(tmp_path / "tuned.safetensors"): "that is a file. .* pass the file as `checkpoint`",
        str(tmp_path / "empty"): "Expected a model's directory, as timm or transformers saved it",
        "google/vit-base-patch16-224": "A model of transformers is transformers:DIR_OR_HUB_ID",
        "timm:vit_tiny_patch16_224": "Did you mean vit_tiny_patch16_224.*hf-hub:OWNER/NAME",
        "ViT_tiny_patch16_224": "Did you mean vit_tiny_patch16_224",
        "vit_tiny_patch16_224.augreg": r"no weights 'augreg' of .*224\.augreg_in21k or vit",
    }.items():
        for pretrained in (True, False):
            with pytest.raises(BackboneError, match=message):
                load_backbone(BackboneSpec(model, pretrained=pretrained))


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg_overlay", "cache_dir"])
def test_arguments_that_do_not_shape_the_model(name):
    with pytest.raises(BackboneError, match=rf"arguments {name} are not allowed.*img_size"):
        load_backbone(BackboneSpec(TINY_MODEL, {name: "x"}, pretrained=False))


def test_any_argument_that_timm_takes():
    backbone = load_backbone(tiny_spec(qk_norm=True, proj_bias=False, act_layer="relu"))
    block = backbone.model.get_submodule("blocks.0")
    assert isinstance(block.mlp.act, nn.ReLU)
    assert block.attn.proj.bias is None
    assert isinstance(block.attn.q_norm, nn.LayerNorm)


def test_arguments_that_timm_refuses():
    with pytest.raises(BackboneError, match=r"could not create .*\{'embed_dim': 49"):
        load_backbone(BackboneSpec(TINY_MODEL, {"embed_dim": 49, "depth": 1}, pretrained=False))


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        ((3, 64, 64), r"\{'img_size': 64\}"),
        ((3, 64, 32), r"\{'img_size': \[64, 32\]\}"),
        ((1, 32, 32), r"\{'in_chans': 1\}"),
        ((1, 64, 64), r"\{'img_size': 64, 'in_chans': 1\}"),
        ((3, 999999999, 999999999), r"\{'img_size': 999999999\}"),
    ],
)
def test_an_input_size_that_is_not_the_model_s(asked, advice):
    found = rf"expected \[3, 32, 32\].*found {re.escape(str(list(asked)))}.*model_args={advice}"
    with pytest.raises(BackboneError, match=found):
        load_backbone(replace(tiny_spec(), input_size=asked))


def test_a_model_of_any_size_takes_another_from_a_function():
    with pytest.raises(
        BackboneError, match=r"ConvNeXt takes no img_size, write a function .*pytho"
    ):
        load_backbone(BackboneSpec("test_convnext", pretrained=False, input_size=(3, 96, 128)))


def test_the_advice_of_an_input_size_is_taken():
    asked = (1, 64, 32)
    backbone = load_backbone(replace(tiny_spec(img_size=[64, 32], in_chans=1), input_size=asked))
    assert backbone.facts.preprocess.input_size == asked


def test_no_single_classifier():
    with pytest.raises(BackboneError, match=r"timm names \('head', 'head_dist'\)"):
        load_backbone(
            BackboneSpec("deit_tiny_distilled_patch16_224", {"depth": 1}, pretrained=False)
        )


# -- which Linears ------------------------------------------------------------------------------


def shapes_of(name, **args):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **args)
    return {s.name: (s.kind, s.out, s.in_) for s in sites_of(find_linears(model)).values()}


def test_separate_projections():
    found = shapes_of("eva02_base_patch14_224", depth=1)
    assert {k: v[0] for k, v in found.items()} == {
        "blocks.0.mlp.fc1_g": "",
        "blocks.0.mlp.fc1_x": "",
        "blocks.0.attn.q_proj": "q",
        "blocks.0.attn.k_proj": "k",
        "blocks.0.attn.v_proj": "v",
        "blocks.0.attn.proj": "proj",
        "blocks.0.mlp.fc2": "fc2",
    }


def test_gated_mlp():
    found = shapes_of("eva02_tiny_patch14_224", depth=1)
    out, into = found["blocks.0.mlp.fc1"][1:]
    assert found["blocks.0.mlp.fc2"][2] * 2 == out
    assert into == found["blocks.0.mlp.fc2"][1]


def test_swin_changes_width_with_the_stage():
    found = shapes_of("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=48)
    assert found["layers.0.blocks.0.attn.proj"] == ("proj", 48, 48)
    assert found["layers.1.blocks.0.attn.proj"] == ("proj", 96, 96)


def test_no_kind_stands_for_a_pooling_head():
    found = shapes_of("vit_base_patch16_siglip_224", depth=1)
    assert {k for k in found if k.startswith("attn_pool.")}
    assert {k: v[0] for k, v in found.items() if v[0]} == {
        "blocks.0.attn.qkv.q": "q",
        "blocks.0.attn.qkv.k": "k",
        "blocks.0.attn.qkv.v": "v",
        "blocks.0.attn.proj": "proj",
        "blocks.0.mlp.fc1": "fc1",
        "blocks.0.mlp.fc2": "fc2",
    }


def test_a_parallel_vit_has_the_sites_of_both_branches():
    found = shapes_of("vit_small_patch16_18x2_224", depth=1, embed_dim=48)
    assert [k for k, v in found.items() if v[0] == "proj"] == [
        "blocks.0.attns.0.attn.proj",
        "blocks.0.attns.1.attn.proj",
    ]
    assert len(found) == 2 * 6


def test_a_convolutional_network_has_zero_sites(tiny_facts):
    backbone = load_backbone(BackboneSpec("test_resnet", pretrained=False))
    assert backbone.facts.linears == ()
    with pytest.raises(PlanError, match="zero sites found in test_resnet"):
        plan_branches(backbone.facts, {"a": random_adapter(tiny_facts)}, Reserve())


@pytest.mark.parametrize(
    ("name", "count"), [("vit_base_patch16_224", 184_320), ("vit_large_patch16_224", 491_520)]
)
def test_the_paper_s_parameter_counts(name, count):
    """HTA with r = 1 on q, k, v and proj: 0.18 M and 0.49 M before the heads (NeurIPS 2024)."""
    from hhdeploy.adapters.config import AdapterConfig
    from hhdeploy.training import attach

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    attach(model, AdapterConfig(name, r=1))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


# -- checkpoints --------------------------------------------------------------------------------


def test_a_checkpoint_gives_the_same_model(tmp_path, tiny):
    inputs, digest = images(3), tiny.facts.sha256
    loaded = load_backbone(with_checkpoint(checkpoint(tmp_path / "x.safetensors", tiny.model)))
    assert loaded.facts == tiny.facts
    assert base_sha256(loaded.model, "head") == digest
    expected = logits_of(tiny.model, inputs)
    assert_parity(expected, logits_of(loaded.model, inputs), "algebra", "float64")
    assert_caught(
        expected, logits_of(load_backbone(tiny_spec()).model, inputs), "algebra", "float64"
    )


def test_a_pth_checkpoint(tmp_path, tiny):
    torch.save({"model": tiny.model.state_dict()}, tmp_path / "x.pth")
    assert load_backbone(with_checkpoint(tmp_path / "x.pth")).facts == tiny.facts


def test_a_checkpoint_without_a_classifier(tmp_path, tiny):
    changes = {"head.weight": None, "head.bias": None}
    file = checkpoint(tmp_path / "x.safetensors", tiny.model, changes)
    facts = load_backbone(with_checkpoint(file)).facts
    assert facts.classes == 0
    assert facts.sha256 == tiny.facts.sha256


def test_a_checkpoint_with_other_classes(tmp_path, tiny):
    changes = {"head.weight": torch.ones(7, 48), "head.bias": torch.arange(7.0)}
    file = checkpoint(tmp_path / "x.safetensors", tiny.model, changes)
    backbone = load_backbone(with_checkpoint(file))
    assert backbone.facts.classes == 7
    assert torch.equal(backbone.model.get_submodule("head").bias, torch.arange(7.0))


def test_position_embeddings_are_resampled_to_the_image_size(tmp_path, tiny):
    file = checkpoint(tmp_path / "x.safetensors", tiny.model)
    backbone = load_backbone(with_checkpoint(file, img_size=48))
    assert backbone.facts.preprocess.input_size == (3, 48, 48)
    assert backbone.facts.sha256 == tiny.facts.sha256, "the image size is not part of the digest"
    assert backbone.model.get_parameter("pos_embed").shape == (1, 37, 48)
    assert not torch.equal(
        backbone.model.get_parameter("pos_embed")[:, :17], tiny.model.get_parameter("pos_embed")
    )


def test_what_was_resampled_is_said(tmp_path, tiny):
    file = checkpoint(tmp_path / "x.safetensors", tiny.model)
    (note,) = load_backbone(with_checkpoint(file, img_size=48)).notes
    assert note == (
        "weights resampled to another geometry: pos_embed from [1, 17, 48] to [1, 37, 48]"
    )
    assert load_backbone(with_checkpoint(file)).notes == ()


def test_nothing_is_resampled_that_nobody_asked_for(tmp_path):
    """A file of 112 px, for a model whose images are of 224."""
    small = timm.create_model("vit_tiny_patch16_224", img_size=112, depth=1)
    file = checkpoint(tmp_path / "x.safetensors", small)
    with pytest.raises(BackboneError, match=r"another geometry .*pos_embed from \[1, 50, 192\] to"):
        load_backbone(BackboneSpec("vit_tiny_patch16_224", {"depth": 1}, checkpoint=file))


ASSUMED = "weights of CLIP without their open_clip_config.json: activation {} assumed"


def openai_s(state):
    """CLIP's image tower in OpenAI's names."""
    new = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "norm.": "ln_post."}
    new |= {"blocks.": "transformer.resblocks.", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    new |= {"patch_embed.proj": "conv1", "qkv.": "in_proj_", "attn.proj": "attn.out_proj"}
    new |= {"head.weight": "proj", "norm": "ln_", "ln__pre": "ln_pre"}
    renamed = {}
    for name, value in state.items():
        for timm_s, other in new.items():
            name = name.replace(timm_s, other)
        value = value.T if name == "proj" else value.squeeze()
        renamed[f"visual.{name}"] = value.clone().contiguous()
    del renamed["visual.head.bias"]
    return renamed


def dinov2_s(state):
    """DINOv2's names and positions, of which the first is the class token's."""
    width = state["pos_embed"].shape[-1]
    positions = torch.cat([torch.zeros(1, 1, width), state.pop("pos_embed")], 1)
    mask, registers = torch.zeros(1, width), state.pop("reg_token")
    return state | {"mask_token": mask, "register_tokens": registers, "pos_embed": positions}


@pytest.mark.parametrize(
    ("name", "renamed", "grid"),
    [
        ("vit_base_patch32_clip_224", openai_s, 7),
        ("vit_small_patch14_reg4_dinov2", dinov2_s, 37),
    ],
)
def test_nothing_is_resampled_under_other_names(tmp_path, name, renamed, grid):
    shape = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    side = timm.create_model(name, **shape).patch_embed.patch_size[0]
    classes = 5 if renamed is openai_s else 0
    lines = (ASSUMED.format("GELU"),) if renamed is openai_s else ()
    for size, patch, message in (
        (side * grid, side, ""),
        (side * 3, side, "resample pos_embed .*to "),
        (side * grid // 2, side // 2, r"resample patch_embed\.proj\.weight .*to"),
    ):
        model = timm.create_model(
            name, img_size=size, patch_size=patch, num_classes=classes, **shape
        )
        save_file(renamed(dict(model.state_dict())), tmp_path / "x.safetensors")
        spec = BackboneSpec(name, shape, checkpoint=tmp_path / "x.safetensors")
        if not message:
            assert load_backbone(spec).notes == lines
            continue
        with pytest.raises(BackboneError, match=f"another geometry .*{message}"):
            load_backbone(spec)
        asked = replace(spec, args={**shape, "img_size": side * grid})
        assert load_backbone(asked).notes[0].startswith("weights resampled to another geometry")


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("by", ["OpenAI", "OpenCLIP", "nobody"])
def test_the_activation_of_clip_s_weights(tmp_path, quick, by):
    """QuickGELU or GELU: the weights do not tell, and the answers were others without a word."""
    name, shape = "vit_base_patch32_clip_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}
    state = openai_s(dict(timm.create_model(name, num_classes=5, **shape).state_dict()))
    state |= {"input_resolution": torch.tensor(224)} if by == "OpenAI" else {}
    save_file(state, tmp_path / "x.safetensors")
    stated = {"model_cfg": {"embed_dim": 5, **({"quick_gelu": True} if quick else {})}}
    if by == "OpenCLIP":
        (tmp_path / "open_clip_config.json").write_text(json.dumps(stated))
    theirs = "quick_gelu" if quick or by == "OpenAI" else "gelu"
    for act, own in (("quick_gelu", "QuickGELU"), ("gelu", "GELU")):
        spec = BackboneSpec(
            name, {**shape, "act_layer": act}, checkpoint=tmp_path / "x.safetensors"
        )
        if by == "nobody" or act == theirs:
            assert load_backbone(spec).notes == ((ASSUMED.format(own),) if by == "nobody" else ())
            continue
        said = rf"activation is {theirs}, the timm model's {own}\. .*'act_layer': '{theirs}'"
        with pytest.raises(BackboneError, match=said):
            load_backbone(spec)


def test_statistics_of_batch_norms_are_needed(tmp_path):
    """An average of the parameters alone has none."""
    model = timm.create_model("tiny_vit_5m_224", num_classes=2)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    file = tmp_path / "x.safetensors"
    save_file(parameters, file)
    with pytest.raises(BackboneError, match=r"missing: \S+running_mean"):
        load_backbone(BackboneSpec("tiny_vit_5m_224", checkpoint=file))


@pytest.mark.parametrize(
    ("mask", "message"), [(None, "missing: mask"), (torch.zeros(1), "of another shape: mask")]
)
def test_a_buffer_of_ones_own_is_needed(tmp_path, mask, message):
    """As torch's load_state_dict needs it: the constructor's is not what the checkpoint was."""
    state = ruling_out([5, 6]).state_dict()
    state |= {"mask": mask}
    file = tmp_path / "x.safetensors"
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)
    model, args = "python:tests.own_models:ruling_out", {"classes": [0, 4]}
    with pytest.raises(BackboneError, match=message):
        load_backbone(BackboneSpec(model, args, checkpoint=file, input_size=(3, 32, 32)))


def test_a_table_under_two_names_is_not_needed(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    state = dict(model.state_dict())
    table = torch.arange(4)
    for module in model:
        module.register_buffer("relative_position_index", table)
    load_strictly(model, state, "", BackboneSpec("x", checkpoint=tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.attn.proj.bias": None}, r"missing: blocks\.1\.attn\.proj\.bias"),
        ({"blocks.1.extra.bias": torch.ones(2)}, r"unexpected: blocks\.1\.extra\.bias"),
        (
            {"blocks.0.mlp.fc1.weight": torch.ones(5, 48)},
            r"another shape: blocks\.0\.mlp\.fc1\.weight \(expected \[192, 48\], found \[5, 48\]\)",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path, tiny, changes, message):
    file = checkpoint(tmp_path / "x.safetensors", tiny.model, changes)
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(with_checkpoint(file))
    assert str(file) in str(caught.value)


def test_checkpoints_that_cannot_be_read(tmp_path):
    with pytest.raises(BackboneError, match=r"none\.safetensors does not exist"):
        load_backbone(with_checkpoint(tmp_path / "none.safetensors"))
    (tmp_path / "x.safetensors").write_bytes(b"garbage")
    with pytest.raises(BackboneError, match=r"x\.safetensors cannot be read"):
        load_backbone(with_checkpoint(tmp_path / "x.safetensors"))


# -- digest -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes_digest"),
    [
        ("blocks.1.mlp.fc2.bias", True),
        ("patch_embed.proj.weight", True),
        ("cls_token", True),
        ("norm.weight", True),
        ("head.weight", False),
        ("head.bias", False),
        ("pos_embed", False),
    ],
)
def test_what_the_digest_sees(tiny, name, changes_digest):
    with torch.no_grad():
        tiny.model.get_parameter(name).view(-1)[0] += 1e-3
    assert (base_sha256(tiny.model, "head") != tiny.facts.sha256) == changes_digest


def test_the_digest_sees_the_type_and_not_the_image_size(tiny):
    assert base_sha256(tiny.model.half(), "head") != tiny.facts.sha256
    assert base_sha256(tiny.model, "head") != base_sha256(tiny.model.bfloat16(), "head")


def test_the_digest_of_signs_sees_no_type(tiny):
    digests = {signs_sha256(tiny.model.to(t), "head") for t in (torch.float64, torch.bfloat16)}
    assert digests == {tiny.facts.signs} == {signs_sha256(tiny.model.half(), "head")}
    with torch.no_grad():
        tiny.model.get_parameter("blocks.1.mlp.fc2.weight").view(-1)[0].neg_()
    assert signs_sha256(tiny.model, "head") != tiny.facts.signs


def test_buffers_and_tables_are_not_in_the_digest():
    args = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "img_size": 56}
    backbone = tiny_backbone("swin_tiny_patch4_window7_224", **args)
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    with torch.no_grad():
        backbone.model.get_parameter(table).add_(1.0)
    assert base_sha256(backbone.model, "head.fc") == backbone.facts.sha256
    assert backbone.facts.classifier == "head.fc"


# -- attention ----------------------------------------------------------------------------------


def test_plain_attention_is_for_the_block_only(tiny):
    attention = tiny.model.get_submodule("blocks.0.attn")
    before = attention.fused_attn
    inputs = images(2)
    expected = logits_of(tiny.model, inputs)
    with pytest.raises(RuntimeError, match="planted"), plain_attention(tiny.model):  # noqa: PT012
        assert not attention.fused_attn
        assert_parity(expected, logits_of(tiny.model, inputs), "algebra", "float64")
        raise RuntimeError("planted")
    assert attention.fused_attn == before


def test_perturbing_gives_every_vector_values_that_matter():
    backbone = load_backbone(tiny_spec())
    perturb(backbone.model)
    for name, parameter in backbone.model.named_parameters():
        assert np.ptp(parameter.numpy()) > 0.01, f"{name} hides mistakes"


# -- names and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["timm/", "hf_hub:timm/", "hf-hub:timm/"])
def test_names_of_the_hub(prefix):
    named = load_backbone(tiny_spec(f"{prefix}{TINY_MODEL}.augreg_in21k", **TINY_ARGS))
    assert named.facts == load_backbone(tiny_spec(f"{TINY_MODEL}.augreg_in21k", **TINY_ARGS)).facts


def test_a_folder_of_timm(tmp_path, tiny):
    save_file(tiny.model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": TINY_MODEL,
        "num_classes": 1000,
        "model_args": TINY_ARGS,
        "pretrained_cfg": {**tiny.model.pretrained_cfg, "tag": "mine", "mean": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(BackboneSpec(str(tmp_path)))
    facts = backbone.facts
    assert facts.sha256 == tiny.facts.sha256
    assert (facts.model, facts.classes) == (f"{TINY_MODEL}.mine", 1000)
    assert facts.args == {**TINY_ARGS, "num_classes": 1000}
    assert facts.preprocess.mean == (0.1, 0.2, 0.3)
    assert str(tmp_path) not in json.dumps(facts.to_json())
    config["pretrained_cfg"]["mean"] = [123.7, 116.3, 103.5]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"its pretrained_cfg: .*from 0 to 1, found"):
        load_backbone(BackboneSpec(str(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"has no weights: expected model\.safetensors or"):
        load_backbone(BackboneSpec(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(BackboneError, match=r"timm's architecture.*Pass transformers:"):
        load_backbone(BackboneSpec(str(tmp_path)))


def test_what_is_beside_a_checkpoint_of_timm(tmp_path, tiny):
    """The transform is that of the folder as a model, but for the size, which the model has."""
    save_file(tiny.model.state_dict(), tmp_path / "model.safetensors")
    own = {**tiny.model.pretrained_cfg, "mean": [0.1, 0.2, 0.3], "input_size": [3, 224, 224]}
    for config in ({"pretrained_cfg": own}, own):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": TINY_MODEL, **config}))
        backbone = load_backbone(with_checkpoint(tmp_path / "model.safetensors"))
        assert backbone.facts.preprocess == replace(tiny.facts.preprocess, mean=(0.1, 0.2, 0.3))
        (line,) = backbone.notes
        assert line.startswith("image transform taken from config.json beside the weights: 32x32")
    for content in ("[" * 10**5, "[]", '{"architecture": "other", "pretrained_cfg": 1}'):
        (tmp_path / "config.json").write_text(content)
        backbone = load_backbone(with_checkpoint(tmp_path / "model.safetensors"))
        assert (backbone.facts.preprocess, backbone.notes) == (tiny.facts.preprocess, ())


def test_a_folder_that_is_called_as_a_model_of_timm(tmp_path, monkeypatch, tiny):
    """A bundle of it, say, in the current directory is not the model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / TINY_MODEL).mkdir()
    assert load_backbone(tiny_spec(TINY_MODEL)).facts.model == tiny.facts.model
    (tmp_path / "mine").mkdir()
    with pytest.raises(BackboneError, match=r"mine has no config\.json"):
        load_backbone(BackboneSpec("mine"))
