"""Files of arrays as JAX's ViTs were published: through timm's reader, with nothing left unsaid."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.errors import BackboneError
from tests.support import TINY_ARGS, TINY_MODEL

WIDTH, HEADS, DEPTH = 48, 3, 2
ARGS = {**TINY_ARGS, "depth": DEPTH}
SIGLIP = "vit_base_patch16_siglip_224"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(model=TINY_MODEL, **args):
    torch.manual_seed(7)
    return timm.create_model(model, **{"num_classes": 5, **ARGS, **args}).eval()


def attention(found, start, weights, biases):
    """q, k and v as flax has them, a head at a time."""
    for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        found[f"{start}/{name}/kernel"] = weight.T.reshape(WIDTH, HEADS, -1)
        found[f"{start}/{name}/bias"] = bias.reshape(HEADS, -1)


def arrays_of(model, numbers=(1, 3, 2), positions="Transformer/posembed_input/pos_embedding"):
    """Of Google's first files; ``numbers`` of the attention, the MLP and the second norm."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    found = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        positions: state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    if "cls_token" in state:
        found["cls"] = state["cls_token"]
    if "head.weight" in state:
        found |= {"head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}
    for i in range(len(model.blocks)):
        own, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        mha = f"{theirs}/MultiHeadDotProductAttention_{numbers[0]}"
        qkv = (np.split(state[f"{own}.attn.qkv.{leaf}"], 3) for leaf in ("weight", "bias"))
        attention(found, mha, *qkv)
        kernel = state[f"{own}.attn.proj.weight"].T.reshape(HEADS, -1, WIDTH)
        found |= {f"{mha}/out/kernel": kernel, f"{mha}/out/bias": state[f"{own}.attn.proj.bias"]}
        for norm, number in ((1, 0), (2, numbers[2])):
            for leaf, name in (("weight", "scale"), ("bias", "bias")):
                found[f"{theirs}/LayerNorm_{number}/{name}"] = state[f"{own}.norm{norm}.{leaf}"]
        for j in (0, 1):
            dense = f"{theirs}/MlpBlock_{numbers[1]}/Dense_{j}"
            found[f"{dense}/kernel"] = state[f"{own}.mlp.fc{j + 1}.weight"].T
            found[f"{dense}/bias"] = state[f"{own}.mlp.fc{j + 1}.bias"]
    return found


def pooled_arrays_of(model):
    """Of big_vision's SigLIP: two towers, and attention that pools."""
    found = arrays_of(model, (0, 0, 1), "pos_embedding")
    pool = {n: value.numpy() for n, value in model.attn_pool.state_dict().items()}
    mha = "MAPHead_0/MultiHeadDotProductAttention_0"
    weights = (pool["q.weight"], *np.split(pool["kv.weight"], 2))
    attention(found, mha, weights, (pool["q.bias"], *np.split(pool["kv.bias"], 2)))
    found |= {
        f"{mha}/out/kernel": pool["proj.weight"].T.reshape(HEADS, -1, WIDTH),
        f"{mha}/out/bias": pool["proj.bias"],
        "MAPHead_0/probe": pool["latent"],
        "MAPHead_0/LayerNorm_0/scale": pool["norm.weight"],
        "MAPHead_0/LayerNorm_0/bias": pool["norm.bias"],
    }
    for j in (0, 1):
        found[f"MAPHead_0/MlpBlock_0/Dense_{j}/kernel"] = pool[f"mlp.fc{j + 1}.weight"].T
        found[f"MAPHead_0/MlpBlock_0/Dense_{j}/bias"] = pool[f"mlp.fc{j + 1}.bias"]
    texts = {"params/t": np.ones(1, "f4"), "params/txt/head/bias": np.ones(WIDTH, "f4")}
    return {f"params/img/{name}": array for name, array in found.items()} | texts


@pytest.fixture
def load(tmp_path):
    """The backbone of arrays."""

    def loaded(arrays, model=TINY_MODEL, **args):
        np.savez(tmp_path / "w.npz", **arrays)
        return load_backbone(BackboneSpec(model, {**ARGS, **args}, checkpoint=tmp_path / "w.npz"))

    return loaded


def answer(model):
    with torch.no_grad():
        return model(IMAGES)


def features(backbone):
    """The model without its placeholder of a classifier."""
    backbone.model.reset_classifier(0)
    return backbone.model


@pytest.mark.parametrize("start", ["", "opt/target/"])
def test_arrays_of_the_jax_vits(load, start):
    """timm's own reader of .npz files; the head's width is the file's."""
    model = vit()
    arrays = {f"{start}{name}": array for name, array in arrays_of(model).items()}
    beside = {"opt/state/step": np.array(3)} if start else {}
    backbone = load(arrays | beside)
    assert backbone.facts.classes == 5
    assert torch.equal(answer(backbone.model), answer(model))
    assert list(backbone.notes) == [f"left out of the checkpoint: {name}" for name in beside]


def test_the_tower_of_images_of_two(load):
    """The texts' classifier was taken for the images', whose answers were random numbers."""
    model = vit(SIGLIP, num_classes=0)
    backbone = load(pooled_arrays_of(model), SIGLIP)
    assert backbone.facts.classes == 0
    assert torch.equal(
        answer(backbone.model.attn_pool.eval() and features(backbone)), answer(model)
    )
    assert backbone.notes[-1] == "left out of the checkpoint: params/t, params/txt/head/bias"


def test_a_classifier_behind_another_layer_is_left_out_with_it(load):
    """timm's models do not have the layer, and the classifier read others than its features."""
    model = vit()
    layer = {
        "pre_logits/kernel": np.ones((WIDTH, WIDTH), "f4"),
        "pre_logits/bias": np.ones(WIDTH, "f4"),
    }
    backbone = load(arrays_of(model) | layer)
    assert backbone.facts.classes == 0
    model.reset_classifier(0)
    assert torch.equal(answer(features(backbone)), answer(model))
    (line,) = backbone.notes
    assert line.endswith(": head/kernel, head/bias, pre_logits/kernel, pre_logits/bias")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"depth": 1}, "expected 28,709 numbers beside .* found 56,981 in 38 arrays, 2 blocks"),
        ({"num_heads": 4}, "expected 4 heads of attention, found 3"),
        ({"global_pool": "avg"}, r"keys missing: fc_norm\.weight, fc_norm\.bias\. Is it"),
        ({"init_values": 0.1}, r"keys missing: blocks\.0\.ls1\.gamma"),
        ({"depth": 3}, "encoderblock_2"),
    ],
    ids=str,
)
def test_another_model_than_the_file_s_is_refused(load, args, said):
    """timm passes over blocks, makes heads of others, and leaves random what the file lacks."""
    with pytest.raises(BackboneError, match=said):
        load(arrays_of(vit()), **args)


@pytest.mark.parametrize("size", [64, 32])
def test_another_geometry_is_asked_for_and_said(load, size):
    arrays = arrays_of(vit(img_size=64))
    line = "weights resampled to another geometry: pos_embed from [1, 65, 48] to [1, 17, 48]"
    assert load(arrays, img_size=size).notes == (() if size == 64 else (line,))


def test_another_geometry_that_nobody_asked_for_is_refused(tmp_path):
    np.savez(tmp_path / "w.npz", **arrays_of(vit()))
    args = {name: ARGS[name] for name in ("depth", "embed_dim", "num_heads")}
    with pytest.raises(BackboneError, match=r"would resample pos_embed from .*, patch_embed\.proj"):
        load_backbone(BackboneSpec(TINY_MODEL, args, checkpoint=tmp_path / "w.npz"))


@pytest.mark.parametrize("model", [TINY_MODEL, "vit_tiny_r_s16_p8_224"])
def test_channels_that_are_fitted_are_said(load, model):
    args = {} if model == TINY_MODEL else {"patch_size": 8}
    whole = vit(model, **args)
    arrays = arrays_of(whole)
    if model != TINY_MODEL:
        stem = {n: p.detach().numpy() for n, p in whole.patch_embed.backbone.named_parameters()}
        arrays["conv_root/kernel"] = stem["conv.weight"].transpose(2, 3, 1, 0)
        arrays["gn_root/scale"], arrays["gn_root/bias"] = stem["norm.weight"], stem["norm.bias"]
    assert load(arrays, model, **args).notes == ()
    lines = load(arrays, model, **args, in_chans=1).notes
    assert lines[0] == "weights of images with 3 channels fitted to 1, as timm does"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.pop("head/bias"), r"found 56,976 in 37 arrays"),
        (lambda a: a.pop("head/kernel"), "does not fit"),
        (lambda a: a.pop("Transformer/encoder_norm/bias"), "does not fit"),
        (lambda a: a.update(more=np.ones(3, "f4")), "found 56,984 in 39 arrays"),
        (lambda a: a.update(cls=a["cls"].astype("i1")), r"of a type that no .*: cls \(int8\)"),
        (lambda a: a.update(cls=a["cls"].astype("f2").view("V2")), "save bfloat16 as float32"),
        (lambda a: a.update(cls=np.array([{"not": "an array"}], dtype=object)), "does not fit"),
    ],
)
def test_half_a_file_and_more_than_one_are_refused(load, change, said):
    arrays = arrays_of(vit())
    change(arrays)
    with pytest.raises(BackboneError, match=said):
        load(arrays)


def test_damaged_files(tmp_path):
    file = tmp_path / "w.npz"
    np.savez(file, **arrays_of(vit()))
    whole = file.read_bytes()
    for content, what in ((b"", "empty"), (whole[:-30], "damaged")):
        file.write_bytes(content)
        with pytest.raises(BackboneError, match=f"cannot be read: ValueError: it is {what}"):
            load_backbone(BackboneSpec(TINY_MODEL, ARGS, checkpoint=file))
