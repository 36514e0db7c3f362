"""The ViT-S/14 example without its data: weight conversion, splitting, paired comparison."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
timm = pytest.importorskip("timm")
torch = pytest.importorskip("torch")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "vits14"
WIDTH, DEPTH, GRID, PATCH = 6, 2, 5, 3
TINY: dict[str, Any] = {
    "img_size": GRID * PATCH,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": 2,
    "num_classes": 0,
}
# timm's name of a Linear -> Transformers'.
LINEARS = {
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OTHERS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of the example; it leaves neither modules nor paths behind."""
    monkeypatch.syspath_prepend(EXAMPLE)
    known = set(sys.modules)

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield module
    folders = (str(EXAMPLE), str(EXAMPLE.parent / "starter"))
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if str(Path(file).parent) in folders:
            del sys.modules[name]


def tiny_state() -> dict[str, Any]:
    """Random weights under timm's names; every value differs."""
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, **TINY)
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(tuple(tensor.shape)).astype(np.float32)
        for name, tensor in model.state_dict().items()
    }


def as_onnx(state: dict[str, Any]) -> Any:
    """``state`` as Transformers' exporter would leave it: Linears transposed and unnamed."""
    named = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    linears = {}
    for block in range(DEPTH):
        here, there = f"blocks.{block}.", f"encoder.layer.{block}."
        named |= {there + theirs: state[here + ours] for ours, theirs in OTHERS.items()}
        for ours, theirs in LINEARS.items():
            linears[there + theirs] = state[f"{here}{ours}.weight"]
            named[f"{there}{theirs}.bias"] = state[f"{here}{ours}.bias"]
        for i, third in enumerate(("query", "key", "value")):
            rows = slice(i * WIDTH, (i + 1) * WIDTH)
            linears[f"{there}attention.attention.{third}"] = state[f"{here}attn.qkv.weight"][rows]
            named[f"{there}attention.attention.{third}.bias"] = state[f"{here}attn.qkv.bias"][rows]
    arrays = {f"backbone.{name}": array for name, array in named.items()}
    arrays["decoder.final_conv.bias"] = np.zeros(1, np.float32)
    nodes = []
    # Later in the file than their names suggest, as numbers say nothing about modules.
    for number, (module, weight) in enumerate(reversed(linears.items())):
        path, anonymous = "/backbone/" + "/".join(_path(module)), f"onnx::MatMul_{number}"
        arrays[anonymous] = weight.T
        nodes.append(onnx.helper.make_node("MatMul", ["x", anonymous], ["y"], f"{path}/MatMul"))
    position = state["pos_embed"]
    for name, array in (("onnx::Reshape_7", position[:, 1:]), ("onnx::Concat_3", position[:, :1])):
        arrays[name] = array
        nodes.append(
            onnx.helper.make_node("Identity", [name], ["z"], "/backbone/embeddings/Identity")
        )
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], tensors))


def _path(module: str) -> list[str]:
    """``encoder.layer.0.mlp.fc1`` -> encoder, layer.0, mlp, fc1, as the exporter joins them."""
    _, _, block, *rest = module.split(".")
    return ["encoder", f"layer.{block}", *rest]


def test_weights_of_an_onnx_file_get_their_timm_names(load: Any) -> None:
    expected = tiny_state()
    found = load("weights").timm_state(as_onnx(expected))
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), array, err_msg=name)


def test_a_lost_weight_is_noticed(load: Any) -> None:
    model = as_onnx(tiny_state())
    lost = next(node for node in model.graph.node if "fc1" in node.name)
    model.graph.node.remove(lost)
    state = load("weights").timm_state(model)
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model("vit_small_patch14_dinov2", pretrained=False, **TINY).load_state_dict(
            state
        )


def test_no_image_is_on_both_sides(load: Any) -> None:
    tasks = load("tasks")
    rng = np.random.default_rng(1)
    images = rng.integers(0, 3, (400, 1, 3)).astype(np.uint8)  # 27 different ones
    pool = tasks.Part(images, np.arange(400))
    train, test = tasks.split(tasks.Pools(pool, None, ()), 11, 7)
    keys = [image.tobytes() for part in (train, test) for image in part.images]
    assert (len(train.labels), len(test.labels)) == (11, 7)
    assert len(set(keys)) == 18
    for part in (train, test):
        np.testing.assert_array_equal(images[part.labels], part.images)


def test_test_images_that_the_training_pool_has_are_dropped(load: Any) -> None:
    tasks = load("tasks")
    images = np.arange(13, dtype=np.uint8).reshape(13, 1, 1)
    first = tasks.Part(images[:5], np.arange(5))
    train, test = tasks.split(tasks.Pools(first, tasks.Part(images, np.arange(13)), ()), 2, 100)
    # Also those of the pool that training did not draw.
    assert len(train.labels) == 2
    assert sorted(test.labels) == list(range(5, 13))


def test_the_paired_comparison_counts_what_only_one_gets_right(load: Any) -> None:
    report = load("report")
    one = {"labels": [0, 1, 2, 3, 4, 5], "predictions": [0, 1, 2, 3, 0, 0]}
    other = {"labels": [0, 1, 2, 3, 4, 5], "predictions": [0, 0, 0, 0, 4, 0]}
    assert report.paired(one, other) == {"only_first": 3, "only_second": 1, "p": 0.62}
    assert report.sign_test(5, 5) == 1.0
    assert report.sign_test(0, 8) == pytest.approx(2 / 256)
    assert report.sign_test(0, 0) == 1.0
