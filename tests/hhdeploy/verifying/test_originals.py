"""What the bounds of float32 let pass: one number of a weight, and a manifest of another model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from hhdeploy import export, verify, verify_against_torch
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import write_manifest
from hhdeploy.errors import BundleError
from hhdeploy.graph import LINEAR_TAG
from hhdeploy.verifying.originals import _alike, _named, _of_linear, _scaled, check_stated
from tests.hhdeploy.verifying.test_contents import plant
from tests.support import random_adapter
from tests.workshop import copy_bundle


def negate_one(weight: NDArray) -> None:
    """A number has the other sign: a small one, as every one of a model of real size is."""
    flat = weight.reshape(-1)
    sizes = np.abs(flat)
    flat[np.argmin(np.where(sizes > 1e-4 * sizes[np.isfinite(sizes)].max(), sizes, np.inf))] *= -1


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("small", "blocks.1.mlp.fc1.weight_t"),  # a Linear's, told by the node's tag
        ("small", "blocks.0.attn.qkv.k/weight_t"),  # a third of a qkv
        ("small", "branch/blocks.0.attn.qkv/additive/biases"),
        ("small", "patch_embed.proj.weight"),  # of a convolution
        ("small", "pos_embed"),  # what no digest holds
        ("folded", "blocks.0.attn.proj.weight_folded"),
        ("constant", "blocks.1.mlp.fc2.weight_t"),
        ("constant", "adapter_bank"),
    ],
)
def test_one_number_of_a_weight(request, workshop, tmp_path, which, name):
    bundle = copy_bundle(request.getfixturevalue(which), tmp_path / "bundle")
    verify_against_torch(bundle, checkpoint=workshop.checkpoint, verify_images=1)
    plant(bundle, "float32", name, negate_one)
    before = (bundle / "hhdeploy.json").read_bytes()
    with pytest.raises(BundleError, match=rf"expected as weights those of .* others: {name}\."):
        verify_against_torch(bundle, checkpoint=workshop.checkpoint, verify_images=1)
    assert (bundle / "hhdeploy.json").read_bytes() == before
    assert verify(bundle).passed  # without the model nothing tells


BEIT = {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 16}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """Makes a bundle of a network of timm with its statistics and tables drawn, and its
    checkpoint."""
    import timm
    import torch
    from safetensors.torch import save_file

    @functools.cache
    def make(name: str) -> tuple[Path, Path]:
        root, random = tmp_path_factory.mktemp(name), torch.Generator().manual_seed(3)
        args = {"num_classes": 5, **(BEIT if "beit" in name else {})}
        model = timm.create_model(name, **args)
        state = model.state_dict()
        for key, tensor in state.items():
            if key.endswith(("running_mean", "running_var", "bias_table", "q_bias")):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=random))
        save_file(state, root / "model.safetensors")
        arguments = {"checkpoint": root / "model.safetensors", "model_args": args}
        export(name, {}, root / "bundle", fold=True, verify_images=1, cache=None, **arguments)
        return root / "bundle", root / "model.safetensors"

    return make


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("test_resnet", "layer2.0.conv1.weight"),  # which has taken a BatchNorm in
        ("test_resnet", "layer2.0.conv1.weight_bias"),  # which is what the BatchNorm adds
        ("beit_base_patch16_224", "unsqueeze"),  # the biases by relative position
        ("beit_base_patch16_224", "cat_1"),  # q's and v's biases, and zeros between
    ],
)
def test_what_the_tracer_computed(drawn, tmp_path, model, name):
    source, checkpoint = drawn(model)
    bundle = copy_bundle(source, tmp_path / "bundle")
    said: list[str] = []
    options = {"checkpoint": checkpoint, "verify_images": 1, "progress": said.append}
    assert verify_against_torch(bundle, **options).passed
    assert not [line for line in said if "not compared" in line]
    plant(bundle, "float32", name, negate_one)
    with pytest.raises(BundleError, match=rf"those of {model}\S*, found others: {name}\."):
        verify_against_torch(bundle, **options)


def test_a_table_that_is_like_nothing_in_the_model(drawn, tmp_path):
    source, checkpoint = drawn("beit_base_patch16_224")
    bundle = copy_bundle(source, tmp_path / "bundle")

    def scale(table: NDArray) -> None:
        table *= 1.00003

    plant(bundle, "float32", "unsqueeze", scale)
    said: list[str] = []
    options = {"checkpoint": checkpoint, "verify_images": 1, "progress": said.append}
    assert verify_against_torch(bundle, **options).passed
    (line,) = (line for line in said if "not compared" in line)
    assert line.endswith("computes nothing like it: unsqueeze")


def test_a_bias_of_q_k_and_v_that_the_model_has_elsewhere_is_not_known(drawn):
    """BEiT adds it beside the Linear: what an adapter adds is not all of it."""
    _, checkpoint = drawn("beit_base_patch16_224")
    backbone = load_backbone(BackboneSpec("beit_base_patch16_224", BEIT, checkpoint))
    adapter = random_adapter(backbone.facts, targets=("q", "fc1"), parts=("db",))
    right = {name: p.detach().numpy() for name, p in backbone.model.named_parameters()}
    known = {
        linear.path: _of_linear(backbone, adapter, linear, right)[1] is not None
        for linear in backbone.facts.linears
        if linear.path != "head"
    }
    of_block = {f"blocks.0.{path}": True for path in ("attn.proj", "mlp.fc1", "mlp.fc2")}
    assert known == {"blocks.0.attn.qkv": False} | of_block


@pytest.mark.parametrize(
    ("op", "factor", "known"),
    [
        *(("Conv", 1.0, "both"), ("Conv", 1.5, "multiple"), ("Gemm", 1.5, "multiple")),
        # Its filters are not in the first dimension.
        *(("ConvTranspose", 1.0, "both"), ("ConvTranspose", 1.5, "nothing")),
        *(("a Linear", 1.0, "both"), ("a Linear", 1.5, "wrong")),
    ],
)
def test_biases_are_compared_where_no_batchnorm_has_moved_them(op, factor, known):
    random = np.random.default_rng(5)
    weight = random.normal(size=(4, 3) if op in ("Gemm", "a Linear") else (4, 3, 1, 1))
    weight, bias = weight.astype(np.float32), random.normal(size=4).astype(np.float32)
    image = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    values = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name))
        for name, array in (("stem.weight", weight * np.float32(factor)), ("stem.bias", -bias))
    ]
    node = ir.node("Gemm" if op == "a Linear" else op, [image, *values])
    if op == "a Linear":
        node.metadata_props[LINEAR_TAG] = "stem"
    graph = ir.Graph([image], node.outputs, nodes=[node], initializers=values)
    right = {"stem.weight": weight, "stem.bias": bias}
    found = {n: _alike(*both) for name in right for n, *both in _named(graph, name, right)}
    assert (
        found
        == {
            "both": {"stem.weight": True, "stem.bias": False},
            "multiple": {"stem.weight": True},
            "nothing": {},
            "wrong": {"stem.weight": False, "stem.bias": False},
        }[known]
    )


def test_what_is_alike():
    weight = np.asarray([[1.0, 2.0], [0.0, 0.0]])
    assert np.array_equal(_scaled(weight, 3 * weight), 3 * weight), "a filter of zeros too"
    assert _alike(np.asarray([np.nan, 1.0]), np.asarray([np.nan, 1.0]))
    assert not _alike(np.asarray([[1.0, 2.0]]), np.asarray([[1.0, 2.0], [1.0, 2.0]]))


@pytest.mark.parametrize(("key", "wrong"), [("classifier", "blocks.0.mlp.fc1"), ("dim", 7)])
def test_another_classifier(small, workshop, tmp_path, key, wrong):
    bundle = copy_bundle(small, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, replace(manifest, backbone=replace(manifest.backbone, **{key: wrong})))
    match = rf"hhdeploy.json: backbone: {key}: expected .*, as {manifest.backbone.model} has it"
    with pytest.raises(BundleError, match=match):
        verify_against_torch(bundle, checkpoint=workshop.checkpoint, verify_images=1)


def test_what_its_source_may_say_otherwise_elsewhere(workshop, tmp_path):
    """Another version of timm has another transform, files beside a checkpoint other names."""
    bundle = tmp_path / "bundle"
    workshop.export(bundle, (), fold=True, model_args=workshop.backbone.facts.args)
    opened, backbone = Bundle.open(bundle), workshop.backbone
    assert not list(check_stated(opened, backbone))
    facts = backbone.facts
    other = replace(
        facts,
        preprocess=replace(facts.preprocess, crop_pct=0.5),
        meaning=replace(facts.meaning, class_names=("a", "b", "c", "d", "e")),
    )
    told = list(check_stated(opened, replace(backbone, facts=other)))
    assert len(told) == 1  # a bundle that says nothing of names contradicts nobody
    assert "{'crop_pct': 0.5} here, the bundle {'crop_pct': " in told[0]
    names = replace(other.meaning, class_names=("e", "d", "c", "b", "a"))
    named = replace(opened.manifest, backbone=replace(opened.manifest.backbone, meaning=names))
    told = list(check_stated(replace(opened, manifest=named), replace(backbone, facts=other)))
    assert "class_names: " in told[1]
