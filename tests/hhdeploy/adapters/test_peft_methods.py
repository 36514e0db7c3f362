"""Every kind of PEFT adapter against PEFT's unmerged model: what comes in live, folded, refused."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import peft_random, peft_table
from benchmarks.peft_methods import (
    BOUND,
    TIMM,
    answers,
    arguments_of,
    logits_of,
    range_error,
    timm_vit,
    trained,
    transformers_vit,
)
from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.adapters.importers import ImportOptions, import_adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.errors import AdapterError, OptionError
from tests.support import MISTAKE

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, about training


@pytest.fixture(scope="module")
def vit():
    return timm_vit()[0]


@pytest.fixture(scope="module")
def hf_vit(tmp_path_factory):
    return transformers_vit(tmp_path_factory.mktemp("vit"))


def saved(tmp_path, vit, method, names=TIMM, **changes):
    """A trained adapter on the disk: its folder and the logits of PEFT's unmerged model."""
    arguments = {**arguments_of(method, names), "modules_to_save": [names.head], **changes}
    model = trained(vit, method, arguments)
    model.save_pretrained(str(tmp_path / "peft"))
    return tmp_path / "peft", logits_of(model)


def in_order(value):
    """A parameter's name, the same in every process of a run: a set's order is not."""
    return str(sorted(value) if isinstance(value, set) else value)


@pytest.mark.parametrize(
    ("method", "changes", "parts"),
    [
        ("ADALORA", {}, {"lora_A"}),
        ("LOHA", {}, {"lora_A"}),
        ("MISS", {}, {"lora_A"}),
        ("VERA", {}, {"lora_A"}),
        ("IA3", {}, {"s_out", "db"}),
        ("IA3", {"feedforward_modules": ["mlp.fc2"]}, {"s_out", "db", "s_in"}),
        ("BEFT", {}, {"db"}),
        ("LORA", {"use_dora": True}, {"lora_A", "s_out"}),
        ("LORA", {"init_lora_weights": "pissa"}, {"lora_A"}),
        ("LORA", {"init_lora_weights": "OLoRA"}, {"lora_A"}),
        ("LORA", {"init_lora_weights": "Gaussian"}, {"lora_A"}),
        ("LORA", {"init_lora_weights": "mica"}, {"lora_A"}),
        ("LORA", {"monteclora_config": {}}, {"lora_A"}),
        ("LORA", {"lora_bias": True}, {"lora_A", "db"}),
        ("LORA", {"bias": "lora_only"}, {"lora_A", "db"}),
        ("LORA", {"target_modules": "all-linear", "modules_to_save": None}, {"lora_A"}),
    ],
    ids=in_order,
)
def test_what_is_live(tmp_path, vit, method, changes, parts):
    source, expected = saved(tmp_path, vit, method, **changes)
    adapter = import_adapter(source, vit)
    assert range_error(expected, answers(vit, adapter)) <= BOUND
    assert not adapter.config.fold_only
    assert not adapter.values
    found = {
        name
        for site in adapter.sites.values()
        for name in ("lora_A", "s_in", "s_out", "db")
        if getattr(site, name) is not None
    }
    assert found == parts
    began = str(changes.get("init_lora_weights")).lower() in {"pissa", "olora"}
    lines = [line for line in said_of(adapter) if "first adapter in its model" in line]
    assert len(lines) == began, "a second one began at weights that no file keeps"
    save_adapter(adapter, tmp_path / "out")
    again = load_adapter(tmp_path / "out")
    assert np.array_equal(answers(vit, again), answers(vit, adapter))


@pytest.mark.parametrize(
    ("method", "changes", "values"),
    [
        ("OFT", {}, {"weight"}),
        ("LN_TUNING", {}, {"weight", "bias"}),
        ("LORA", {"bias": "all"}, {"bias"}),
        ("LORA", {"target_modules": ["qkv", "proj"]}, {"weight"}),
        ("HRA", {"target_modules": ["qkv", "proj"]}, {"weight"}),
        ("LORA", {"modules_to_save": ["head", "norm1"]}, {"weight", "bias"}),
    ],
    ids=in_order,
)
def test_what_can_only_be_folded(tmp_path, vit, method, changes, values):
    source, expected = saved(tmp_path, vit, method, **changes)
    adapter = import_adapter(source, vit)
    assert range_error(expected, answers(vit, adapter)) <= BOUND
    assert adapter.config.fold_only
    assert {name.rpartition(".")[2] for name in adapter.values} == values


@pytest.fixture(scope="module")
def swin():
    """Its attention has a table of biases that are no module's ``bias``."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depths": (1, 1), "window_size": 4}
    args = {**shape, "num_heads": (1, 2), "num_classes": 5}
    return load_backbone(
        BackboneSpec("swin_tiny_patch4_window7_224", args, pretrained=False, seed=1)
    )


def saved_before_0_21(folder, backbone, targets, **changes):
    """A folder as PEFT's of before 0.21, which had whatever is called bias trained and saved; the
    logits of its unmerged model."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=targets, bias="all", **changes)
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name or p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    model.save_pretrained(str(folder))
    state = model.state_dict().items()
    biases = {k: t for k, t in state if "bias" in k and "lora_" not in k}
    save_file({**load_file(folder / TENSOR_FILE), **biases}, folder / TENSOR_FILE)
    return logits_of(model)


@pytest.mark.parametrize(
    ("model", "targets", "biases"),
    [
        ("beit", ["attn.proj", "fc1"], {"q_bias", "v_bias"}),
        ("swin", ["qkv", "fc1"], set()),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=in_order)
def test_biases_by_any_name(tmp_path, request, model, targets, biases, changes):
    backbone = request.getfixturevalue(model)
    expected = saved_before_0_21(tmp_path, backbone, targets, **changes)
    adapter = import_adapter(tmp_path, backbone)
    assert range_error(expected, answers(backbone, adapter)) <= BOUND
    biases = {"bias", "relative_position_bias_table", *biases}
    assert {name.rpartition(".")[2] for name in adapter.values} == biases
    tensors = load_file(tmp_path / TENSOR_FILE)
    lost = [key for key in tensors if "bias" in key and not key.endswith(".bias")][-1]
    del tensors[lost]
    save_file(tensors, tmp_path / TENSOR_FILE)
    with pytest.raises(AdapterError, match=f"lacks {lost.removeprefix('base_model.model.')}"):
        import_adapter(tmp_path, backbone)


def test_a_product_on_a_weight_that_was_trained_too(tmp_path):
    """Swin v2's weights of continuous_position_bias_mlp are biases by their names."""
    import transformers

    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "window_size": 4}
    config = transformers.Swinv2Config(**sizes, depths=[1, 1], num_heads=[2, 3], num_labels=5)
    torch.manual_seed(0)
    transformers.Swinv2ForImageClassification(config).save_pretrained(tmp_path / "swin")
    backbone = load_backbone(BackboneSpec(f"transformers:{tmp_path / 'swin'}"))
    expected = saved_before_0_21(tmp_path / "peft", backbone, r".*bias_mlp\.[02]")
    found = answers(backbone, import_adapter(tmp_path / "peft", backbone))
    assert range_error(expected, found) <= BOUND


def test_biases_that_peft_did_not_save(tmp_path, vit):
    source, _ = saved(tmp_path, vit, "LORA", bias="lora_only")
    tensors = load_file(source / TENSOR_FILE)
    kept = {key: t for key, t in tensors.items() if not key.endswith("base_layer.bias")}
    assert len(kept) < len(tensors)
    save_file(kept, source / TENSOR_FILE)
    with pytest.raises(AdapterError, match=r"lacks blocks\.0\..*PEFT from 0\.7 to 0\.20"):
        import_adapter(source, vit)


@pytest.fixture(scope="module")
def tiny_vit():
    """With BatchNorm in its patches and blocks."""
    shape = {"embed_dims": (8, 8, 8, 8), "depths": (1,) * 4, "num_heads": (1,) * 4}
    args = {**shape, "window_sizes": (7,) * 4, "num_classes": 5}
    return load_backbone(BackboneSpec("tiny_vit_5m_224", args, pretrained=False, seed=1))


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=in_order)
@pytest.mark.parametrize("moved", [False, True])
def test_statistics_of_a_saved_module(tmp_path, tiny_vit, changes, moved):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["bn"], **changes)
    model = peft.get_peft_model(copy.deepcopy(tiny_vit.model), config)
    if moved:
        model.train()
        model(torch.ones(2, 3, 224, 224))
    model.save_pretrained(str(tmp_path))
    if not moved:
        adapter = import_adapter(tmp_path, tiny_vit)
        assert not any("BatchNorm" in line for line in said_of(adapter))
        return
    with pytest.raises(AdapterError, match=r"bn\.num_batches_tracked: expected the backbone's own"):
        import_adapter(tmp_path, tiny_vit)


def test_statistics_that_peft_does_not_save_are_said(tmp_path, tiny_vit):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["qkv"])
    peft.get_peft_model(copy.deepcopy(tiny_vit.model), config).save_pretrained(str(tmp_path))
    assert any("BatchNorm" in line for line in said_of(import_adapter(tmp_path, tiny_vit)))


def test_statistics_that_never_move_are_not_said(tmp_path, tiny_vit):
    import peft
    from timm.layers import freeze_batch_norm_2d

    frozen = replace(tiny_vit, model=freeze_batch_norm_2d(copy.deepcopy(tiny_vit.model)))
    config = peft.LoraConfig(r=2, target_modules=["qkv"])
    peft.get_peft_model(copy.deepcopy(frozen.model), config).save_pretrained(str(tmp_path))
    assert not any("BatchNorm" in line for line in said_of(import_adapter(tmp_path, frozen)))


def said_of(adapter):
    """What the import had to assume."""
    return adapter.config.extra["imported_from"].get("assumed", [])


@pytest.mark.parametrize("method", ["LORA", "MISS"])
@pytest.mark.parametrize(
    ("lost", "changes"),
    [
        ("head.weight", {}),
        ("head.bias", {}),
        ("head.bias", {"bias": "all", "modules_to_save": None}),
    ],
)
def test_half_a_classifier_is_refused(tmp_path, vit, method, lost, changes):
    """The backbone's own other half, of as many classes, would give wrong answers."""
    source, _ = saved(tmp_path, vit, method, **changes)
    tensors = load_file(source / TENSOR_FILE)
    kept = {k: t for k, t in tensors.items() if not k.endswith(lost)}
    assert len(kept) == len(tensors) - 1
    save_file(kept, source / TENSOR_FILE)
    with pytest.raises(AdapterError, match="lacks"):
        import_adapter(source, vit)


@pytest.mark.parametrize("part", ["lora_A", "head.weight"])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=in_order)
def test_whole_numbers_are_no_weights(tmp_path, vit, part, changes):
    """Without the scale by which something quantised them they were taken as they are."""
    source, _ = saved(tmp_path, vit, "LORA", **changes)
    tensors = load_file(source / TENSOR_FILE)
    whole = {k: (t * 9).to(torch.int8) if part in k else t for k, t in tensors.items()}
    save_file(whole, source / TENSOR_FILE)
    with pytest.raises(AdapterError, match=rf"{part}.*: expected a float tensor, found int8, as"):
        import_adapter(source, vit)


def test_no_tensor_is_for_nothing(tmp_path, vit):
    """Each part, left out, is seen by the comparison that the others pass."""
    source, expected = saved(tmp_path, vit, "LORA", use_dora=True, bias="lora_only")
    adapter = import_adapter(source, vit)
    assert range_error(expected, answers(vit, adapter)) <= BOUND
    for part in (("s_out",), ("db",), ("lora_A", "lora_B")):
        less = {n: replace(t, **dict.fromkeys(part)) for n, t in adapter.sites.items()}
        found = answers(vit, replace(adapter, sites=less))
        assert range_error(expected, found) > MISTAKE, part
    assert range_error(expected, answers(vit, replace(adapter, head=None))) > MISTAKE


def test_parameters_that_are_targets(tmp_path, vit):
    """PEFT renames them once it is on the model."""
    source, expected = saved(
        tmp_path, vit, "LORA", target_modules=[], target_parameters=["mlp.fc1.weight"]
    )
    assert range_error(expected, answers(vit, import_adapter(source, vit))) <= BOUND
    edit(source, target_parameters=["mlp.fc1.weight", "mlp.fc7.weight"])
    with pytest.raises(AdapterError, match=r"fc7"):
        import_adapter(source, vit)


def test_beside_torch_s_own_encoder(tmp_path):
    """Which passes by what stands around its Linears, where nothing is trained."""
    backbone = load_backbone(BackboneSpec("python:tests.own_models:torchs_encoder"))
    changes = {"target_modules": ["linear1"], "use_dora": True, "modules_to_save": None}
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        source, expected = saved(tmp_path, backbone, "LORA", **changes)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert range_error(expected, answers(backbone, import_adapter(source, backbone))) <= BOUND
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture(scope="module")
def beit():
    """Its attention computes with the weight of qkv and biases of its own."""
    shape = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    args = {**shape, "init_values": 0.5}
    return load_backbone(BackboneSpec("beit_base_patch16_224", args, pretrained=False, seed=1))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("LORA", {"init_lora_weights": "pissa"}),
        ("FOURIERFT", {}),
        ("LORA", {"init_lora_weights": False}),
        ("HRA", {"init_weights": False}),
    ],
    ids=in_order,
)
def test_modules_that_the_model_does_not_call(tmp_path, beit, method, changes):
    """PEFT's adapter there does nothing, and merged it does something."""
    source, _ = saved(tmp_path, beit, method, **changes)
    with pytest.raises(AdapterError, match=r"the weight of blocks\.0\.attn\.qkv without calling"):
        import_adapter(source, beit)


def test_beside_modules_that_the_model_does_not_call(tmp_path, beit):
    source, expected = saved(tmp_path, beit, "FOURIERFT", exclude_modules=["attn.qkv"])
    assert range_error(expected, answers(beit, import_adapter(source, beit))) <= BOUND


@pytest.mark.parametrize("index", ["model.safetensors.index.json", f"{TENSOR_FILE}.index.json"])
def test_an_adapter_in_several_files(tmp_path, vit, index):
    """transformers' save_pretrained divides one by max_shard_size."""
    source, expected = saved(tmp_path, vit, "LORA")
    tensors = load_file(source / TENSOR_FILE)
    (source / TENSOR_FILE).unlink()
    files = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: files[i % 2] for i, key in enumerate(sorted(tensors))}
    for file in files:
        save_file({k: t for k, t in tensors.items() if where[k] == file}, source / file)
    (source / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert range_error(expected, answers(vit, import_adapter(source, vit))) <= BOUND
    save_file(tensors, source / files[0])
    with pytest.raises(AdapterError, match=r"another file of .*index\.json has it, too"):
        import_adapter(source, vit)
    (source / files[1]).unlink()
    with pytest.raises(AdapterError, match=rf"{files[1]} does not exist"):
        import_adapter(source, vit)
    (source / index).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(AdapterError, match=r"found model-1\.safetensors"):
        import_adapter(source, vit)
    torch.save(tensors, source / "adapter_model.bin")
    assert range_error(expected, answers(vit, import_adapter(source, vit))) <= BOUND


@pytest.mark.parametrize("init", [True, "orthogonal"])
def test_modules_that_the_model_does_not_call_with_an_adapter_of_nothing(tmp_path, beit, init):
    """No training moves it there."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=init)
    model = peft.get_peft_model(copy.deepcopy(beit.model), config).eval()
    model.save_pretrained(str(tmp_path))
    assert range_error(logits_of(model), answers(beit, import_adapter(tmp_path, beit))) <= BOUND


@pytest.mark.parametrize("weights_known", [True, False])
def test_the_output_of_torch_s_attention_that_nobody_calls(tmp_path, weights_known):
    backbone = load_backbone(BackboneSpec("python:tests.own_models:torchs_encoder"))
    changes = {"target_modules": ["out_proj", "linear1"], "modules_to_save": None}
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        source, expected = saved(tmp_path, backbone, "LORA", **changes, init_lora_weights=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    options = ImportOptions(weights_known=weights_known)
    with pytest.raises(AdapterError, match=r"weight of encoder\.layers\.0\.self_attn\.out_proj, "):
        import_adapter(source, backbone, options)
    tensors = load_file(source / TENSOR_FILE)
    save_file({k: t for k, t in tensors.items() if "out_proj" not in k}, source / TENSOR_FILE)
    edit(source, exclude_modules=["out_proj"])
    adapter = import_adapter(source, backbone, options)
    assert range_error(expected, answers(backbone, adapter)) <= BOUND


@pytest.mark.parametrize(
    ("model", "target", "changes"),
    [
        ("torchs_encoder", "self_attn", {}),
        ("torchs_encoder", "self_attn", {"use_rslora": True, "rank_pattern": {"1.self_attn": 2}}),
        ("torchvision_vit", "self_attention", {"modules_to_save": ["head"]}),
        ("open_clip_vit", "attn", {}),
        ("tokens_first", "self_attn", {}),
        ("encoder", "self_attn", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    ],
    ids=in_order,
)
def test_a_whole_attention_of_torch(tmp_path, model, target, changes):
    """Its packed weight is a parameter, and no Linear's."""
    backbone = load_backbone(
        BackboneSpec(f"python:tests.own_models:{model}", seed=4, input_size=(3, 32, 32))
    )
    # Of open_clip's tower the size of images is not stated.
    changes = {"modules_to_save": None, "target_modules": [target, "linear1", "mlp.0"], **changes}
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        source, expected = saved(tmp_path, backbone, "LORA", **changes)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    adapter = import_adapter(source, backbone)
    assert range_error(expected, answers(backbone, adapter)) <= BOUND
    assert not adapter.config.fold_only
    names = {name.rpartition(".")[2] for name in adapter.sites}
    assert {"q", "k", "v", "out_proj"} <= names
    with pytest.raises(AdapterError, match="without the backbone's weights"):
        import_adapter(source, backbone, ImportOptions(weights_known=False))
    tensors = load_file(source / TENSOR_FILE)
    lost = next(key for key in tensors if "out_proj" in key)
    del tensors[lost]
    save_file(tensors, source / TENSOR_FILE)
    with pytest.raises(AdapterError, match=r"the tensors lack: .*out_proj"):
        import_adapter(source, backbone)


def test_on_a_model_of_transformers(tmp_path, hf_vit):
    vit, names = hf_vit
    source, expected = saved(tmp_path, vit, "LORA", names, use_dora=True)
    adapter = import_adapter(source, vit)
    assert range_error(expected, answers(vit, adapter)) <= BOUND
    assert adapter.config.target_modules == ("q", "k", "v", "proj", "fc1", "fc2")


BEFORE_5 = {
    "vit.layers.": "vit.encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def old(name):
    """A name of transformers' ViT before version 5."""
    for new, was in BEFORE_5.items():
        name = name.replace(new, was)
    return name


@pytest.mark.parametrize("method", ["LORA", "MISS"])
def test_names_of_transformers_before_version_5(tmp_path, hf_vit, method):
    vit, names = hf_vit
    source, expected = saved(tmp_path, vit, method, names)
    tensors = {old(k): v for k, v in load_file(source / TENSOR_FILE).items()}
    save_file(tensors, source / TENSOR_FILE)
    targets = ["query", "key", "value", "dense"]
    edit(source, target_modules=targets)
    adapter = import_adapter(source, vit)
    assert range_error(expected, answers(vit, adapter)) <= BOUND
    edit(source, target_modules=[*targets, "absent"])
    with pytest.raises(AdapterError, match="the file lacks absent"):
        import_adapter(source, vit)


@pytest.mark.parametrize(
    ("targets", "old_targets"),
    [
        (r".*\.([qv]_proj|o_proj|fc[12])", r".*\.(query|value|(output|intermediate)\.dense)"),
        (["q_proj", "v_proj", "o_proj", "fc1", "fc2"], ["query", "value", "dense"]),
        ("all-linear", "all-linear"),
    ],
    ids=["expression", "list", "all-linear"],
)
@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("layers.1.", "vit.layers.1.mlp.fc1"),
        ("v_proj", "attention.v_proj"),
        ("mlp.", "mlp.fc1"),
        ("0.attention.o_proj", "vit.layers.0.attention.o_proj"),
    ],
)
@pytest.mark.parametrize("rename", [str, old])
def test_what_another_implementation_s_names_lack(
    tmp_path, vit, hf_vit, targets, old_targets, lost, named, rename
):
    """transformers' ViT on timm's: what is lost is named, in the words of the file."""
    theirs, names = hf_vit
    source, _ = saved(tmp_path, theirs, "LORA", names, target_modules=targets)
    edit(source, target_modules=old_targets if rename is old else targets)
    tensors = load_file(source / TENSOR_FILE)
    save_file({rename(k): t for k, t in tensors.items()}, source / TENSOR_FILE)
    import_adapter(source, vit)
    kept = {rename(k): t for k, t in tensors.items() if lost not in k}
    save_file(kept, source / TENSOR_FILE)
    with pytest.raises(AdapterError, match=r"target_modules .* names them, the file lacks") as said:
        import_adapter(source, vit)
    assert rename(named) in str(said.value)


@pytest.fixture(scope="module")
def twin(hf_vit, tmp_path_factory):
    """timm's ViT with the weights of transformers'."""
    theirs, folder = hf_vit[0].model, tmp_path_factory.mktemp("twin")
    theirs.save_pretrained(folder)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    return load_backbone(
        BackboneSpec("vit_tiny_patch16_224", args, checkpoint=folder / "model.safetensors")
    )


QV = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("method", "changes", "folded"),
    [
        ("LORA", {"exclude_modules": ["vit.layers.0.attention.q_proj"]}, False),
        ("LORA", {"target_modules": [*QV, "classifier"], "modules_to_save": None}, False),
        ("LORA", {"target_modules": "all-linear", "modules_to_save": None}, False),
        ("LORA", {"bias": "lora_only"}, False),
        ("LORA", {"bias": "all"}, True),
        ("LORA", {"modules_to_save": ["classifier", "layernorm", "layernorm_before"]}, True),
        ("LORA", {"modules_to_save": ["classifier", "k_proj"]}, True),
        ("LORA", {"target_modules": [*QV, "projection"]}, True),
        ("HRA", {"target_modules": [*QV, "o_proj"], "bias": "hra_only"}, False),
        ("LORA", {"target_modules": ["o_proj", "fc1"], "use_dora": True, "bias": "all"}, True),
        ("MISS", {"target_modules": ["fc1"], "modules_to_save": ["layernorm"]}, True),
        ("LN_TUNING", {"target_modules": ["layernorm_before"]}, True),
        ("IA3", {"target_modules": ["o_proj", "fc1"], "feedforward_modules": ["o_proj"]}, False),
    ],
    ids=in_order,
)
@pytest.mark.parametrize("rename", [str, old])
def test_transformers_vit_onto_timm_s(tmp_path, twin, hf_vit, method, changes, folded, rename):
    """Every option of the same function comes in: norms, biases, patches, the classifier."""
    theirs, names = hf_vit
    source, expected = saved(tmp_path, theirs, method, names, **{"target_modules": QV, **changes})
    config = json.loads((source / CONFIG_FILE).read_text())
    tensors = {rename(k): t for k, t in load_file(source / TENSOR_FILE).items()}
    save_file(tensors, source / TENSOR_FILE)
    words = {
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "o_proj": "attention.output.dense",
    }
    words |= {"fc1": "intermediate.dense"}
    if rename is old:
        for key in (
            "target_modules", "exclude_modules", "modules_to_save", "feedforward_modules"
        ):  # fmt: skip
            listed = config.get(key) or []
            edit(source, **{key: [words.get(name, old(name)) for name in listed]})
    adapter = import_adapter(source, twin)
    assert range_error(expected, answers(twin, adapter)) <= BOUND
    assert adapter.config.fold_only == folded


def test_a_saved_module_right_inside_of_another(tmp_path, hf_vit):
    """``embeddings`` ends patch_embeddings too, of which PEFT saves what no training changed."""
    theirs, names = hf_vit
    model = trained(
        theirs, "LORA", {"target_modules": QV, "modules_to_save": ["embeddings", names.head]}
    )
    source = tmp_path / "peft"
    model.save_pretrained(str(source))
    with pytest.raises(
        AdapterError, match=r"both vit\.embeddings and .*merge_and_unload.*`extract"
    ):
        import_adapter(source, theirs)
    # The whole state of PEFT's model has the trained ones, too.
    state = {k: t.clone() for k, t in model.state_dict().items() if "default" in k.split(".")}
    save_file(state, source / TENSOR_FILE)
    adapter = import_adapter(source, theirs)
    assert range_error(logits_of(model), answers(theirs, adapter)) <= BOUND


@pytest.mark.parametrize("whole", ["vit.embeddings", "vit.layers.0", "patch_embeddings"])
def test_a_module_that_holds_more_than_weights(tmp_path, hf_vit, twin, whole):
    """The classifier's token and the positions in it, say."""
    theirs, names = hf_vit
    given = {"target_modules": ["layers.1.mlp.fc1"], "modules_to_save": [whole, names.head]}
    source, expected = saved(tmp_path, theirs, "LORA", names, **given)
    for backbone in (theirs, twin):
        assert range_error(expected, answers(backbone, import_adapter(source, backbone))) <= BOUND


@pytest.mark.parametrize(
    ("changes", "lost", "named"),
    [
        ({"bias": "lora_only"}, "1.attention.v_proj.base_layer", "blocks.1.attn.qkv.v.bias"),
        ({"bias": "all"}, "1.attention.k_proj", "blocks.1.attn.qkv.k.bias"),
        ({"modules_to_save": ["layernorm_before"]}, "1.layernorm", "layers.1.layernorm_before"),
        ({"modules_to_save": ["layernorm"]}, "layernorm.bias", "vit.layernorm.bias"),
        ({"modules_to_save": ["k_proj"]}, "1.attention.k_proj", "vit.layers.1.attention.k_proj"),
        ({"target_modules": r".*(q_proj|classifier)"}, "classifier", "lacks classifier"),
        ({"target_modules": r".*(q_proj|projection)"}, "projection", "projection"),
    ],
    ids=in_order,
)
def test_what_transformers_names_lack_beside_the_linears(
    tmp_path, twin, hf_vit, changes, lost, named
):
    theirs, names = hf_vit
    given = {"target_modules": QV, "modules_to_save": None, **changes}
    source, _ = saved(tmp_path, theirs, "LORA", names, **given)
    tensors = load_file(source / TENSOR_FILE)
    kept = {k: t for k, t in tensors.items() if lost not in k}
    assert len(kept) < len(tensors)
    save_file(kept, source / TENSOR_FILE)
    with pytest.raises(AdapterError, match=rf"the file lacks .*{named}|{named}"):
        import_adapter(source, twin)


def test_what_has_no_place_in_timm_s_vit(tmp_path, twin, hf_vit):
    theirs, names = hf_vit
    source, _ = saved(tmp_path, theirs, "LORA", names, target_modules=[*QV, "projection"])
    tensors = load_file(source / TENSOR_FILE)
    tensors = {k.replace("patch_embeddings.projection", "tubes"): t for k, t in tensors.items()}
    save_file(tensors, source / TENSOR_FILE)
    with pytest.raises(AdapterError, match=r"vit\.embeddings\.tubes.*transformers:DIR.*`extract_"):
        import_adapter(source, twin)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"exclude_modules": ["layers.1.attention.v_proj"]}, True),
        ({"exclude_modules": r".*\.1\.attention\.v_proj"}, True),
        ({"layers_to_transform": [0]}, False),
        ({"layers_to_transform": [0, 1]}, False),
        ({"target_modules": None}, False),
    ],
    ids=in_order,
)
def test_what_the_configuration_leaves_out_may_be_absent(tmp_path, vit, hf_vit, said, wanted):
    theirs, names = hf_vit
    changes = {"target_modules": ["q_proj", "v_proj"]}
    source, _ = saved(tmp_path, theirs, "LORA", names, **changes)
    tensors = load_file(source / TENSOR_FILE)
    kept = {k: t for k, t in tensors.items() if "1.attention.v_proj" not in k}
    save_file(kept, source / TENSOR_FILE)
    edit(source, **said)
    if wanted:
        assert len(import_adapter(source, vit).sites) == 3
        save_file(tensors, source / TENSOR_FILE)
        lacks = "does not name: vit.layers.1.attention.v_proj"
    else:
        lacks = "the file lacks vit.layers.1.attention.v_proj"
    if said == {"layers_to_transform": [0]}:
        lacks = "does not name: vit.layers.1.attention.q_proj"
    with pytest.raises(AdapterError, match=lacks):
        import_adapter(source, vit)


def test_a_method_that_peft_merges_lacks_a_block_in_another_implementation_s_names(
    tmp_path, vit, hf_vit
):
    theirs, names = hf_vit
    source, _ = saved(tmp_path, theirs, "MISS", names, target_modules=["mlp.fc1"])
    import_adapter(source, vit)
    tensors = load_file(source / TENSOR_FILE)
    kept = {k: t for k, t in tensors.items() if "layers.1." not in k}
    save_file(kept, source / TENSOR_FILE)
    with pytest.raises(AdapterError, match=r"the file lacks vit\.layers\.1\.mlp\.fc1"):
        import_adapter(source, vit)


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_targets_that_name_no_module_are_those_of_all_blocks(tmp_path, vit, targets):
    source, expected = saved(tmp_path, vit, "LORA")
    edit(source, target_modules=targets)
    assert range_error(expected, answers(vit, import_adapter(source, vit))) <= BOUND
    tensors = load_file(source / TENSOR_FILE)
    kept = {k: t for k, t in tensors.items() if "blocks.1.mlp.fc1" not in k}
    save_file(kept, source / TENSOR_FILE)
    with pytest.raises(AdapterError, match=r"the file lacks blocks\.1\.mlp\.fc1\."):
        import_adapter(source, vit)
    edit(source, exclude_modules=["blocks.1.mlp.fc1"])
    import_adapter(source, vit)


@pytest.mark.parametrize("method", ["LORA", "LOHA"])
def test_a_configuration_without_a_key_for_what_is_excluded(tmp_path, vit, method):
    """PEFT before 0.14 had none, and passed over targets that were saved whole, too."""
    changes = {"use_dora": True} if method == "LORA" else {}
    source, expected = saved(tmp_path, vit, method, target_modules=r".*(qkv|head)", **changes)
    leave_out(source, "exclude_modules")
    assert range_error(expected, answers(vit, import_adapter(source, vit))) <= BOUND


@pytest.mark.parametrize("method", ["RANDLORA", "UNILORA", "BEFT"])
@pytest.mark.parametrize("targets", ["all-linear", ["qkv", "head"]], ids=in_order)
def test_targets_that_were_saved_by_methods_that_exclude_nothing(tmp_path, vit, method, targets):
    """UniLoRA's one vector is for all targets: with the head among them it is another change."""
    changes = {"target_modules": targets, "modules_to_save": ["head", "norm"]}
    source, expected = saved(tmp_path, vit, method, **changes)
    assert range_error(expected, answers(vit, import_adapter(source, vit))) <= BOUND


def leave_out(source, *keys):
    """A configuration as a PEFT wrote it that did not have these keys."""
    content = json.loads((source / CONFIG_FILE).read_text())
    kept = {key: value for key, value in content.items() if key not in keys}
    assert len(kept) == len(content) - len(keys)
    (source / CONFIG_FILE).write_text(json.dumps(kept))


OLD = ("exclude_modules", "peft_version")


@pytest.mark.parametrize("ranks", [{}, {"attn.qkv": 2}], ids=in_order)
def test_lokr_before_it_had_a_scale(tmp_path, vit, ranks):
    """The factor alpha / r came with PEFT 0.14."""
    patterns = {"rank_pattern": ranks, "alpha_pattern": ranks}
    source, expected = saved(tmp_path, vit, "LOKR", r=3, alpha=3, **patterns)
    edit(source, alpha=8, alpha_pattern={"fc1": 5})
    assert range_error(expected, answers(vit, import_adapter(source, vit))) > MISTAKE
    leave_out(source, *OLD)
    adapter = import_adapter(source, vit)
    assert range_error(expected, answers(vit, adapter)) <= BOUND
    assert any("PEFT before 0.14" in line for line in said_of(adapter))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("LOKR", {"r": 3, "alpha": 8}),
        ("LOHA", {"rank_pattern": {"layers.1.mlp.fc1": 2}, "alpha_pattern": {"0.mlp.fc1": 5}}),
        ("FOURIERFT", {"n_frequency_pattern": {r"layers\.1\.mlp\.fc1": 7}}),
    ],
    ids=in_order,
)
def test_another_implementation_s_names_keep_what_is_said_of_modules(
    tmp_path, twin, hf_vit, method, changes
):
    """And the keys that say how old a file is: LoKr lost alpha / r with them."""
    theirs, names = hf_vit
    source, expected = saved(tmp_path, theirs, method, names, target_modules=["mlp.fc1"], **changes)
    assert range_error(expected, answers(twin, import_adapter(source, twin))) <= BOUND


def test_blocks_with_one_name_more_before_them(tmp_path):
    """DINOv3's, since version 5 of transformers; its embeddings have none."""
    import peft
    import transformers

    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 24}
    config = transformers.DINOv3ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path / "dinov3")
    backbone = load_backbone(BackboneSpec(f"transformers:{tmp_path / 'dinov3'}"))
    targets = ["q_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=targets, bias="all", init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(backbone.model), lora)
    with torch.no_grad():
        model.get_parameter("base_model.model.embeddings.patch_embeddings.bias").add_(1)
    model.save_pretrained(tmp_path / "peft")
    expected = answers(backbone, import_adapter(tmp_path / "peft", backbone))
    file = tmp_path / "peft" / TENSOR_FILE
    tensors = {k.replace(".model.model.", ".model."): t for k, t in load_file(file).items()}
    save_file(tensors, file)
    found = import_adapter(tmp_path / "peft", backbone)
    assert any("patch_embeddings" in name for name in found.values)
    assert np.array_equal(expected, answers(backbone, found))


def test_adalora_that_gave_ranks_away(tmp_path, twin, hf_vit):
    """As it is saved after its training: a rank for each module, of some none at all."""
    theirs, names = hf_vit
    arguments = {**arguments_of("ADALORA", names), "target_modules": ["mlp.fc1"], "init_r": 3}
    model = trained(theirs, "ADALORA", {**arguments, "modules_to_save": [names.head]})
    left = {0: [True, False, True], 1: [False] * 3}
    masks = {f"vit.layers.{i}.mlp.fc1.lora_E": mask for i, mask in left.items()}
    for name, mask in masks.items():
        model.get_parameter(f"base_model.model.{name}.default").data *= torch.tensor(mask)[:, None]
    model.peft_config["default"].rank_pattern = masks
    expected = logits_of(model)
    model.save_pretrained(str(tmp_path / "peft"))
    for backbone in (theirs, twin):
        found = answers(backbone, import_adapter(tmp_path / "peft", backbone))
        assert range_error(expected, found) <= BOUND


@pytest.mark.parametrize(
    ("changes", "folded"),
    [
        ({}, False),
        ({"r": 5}, False),  # the input's width is no multiple of it
        ({"init_weights": "bat", "r": 4, "target_modules": ["qkv"]}, True),
    ],
    ids=in_order,
)
def test_bone(tmp_path, vit, changes, folded):
    """As PEFT 0.14 to 0.17 wrote it: MiSS under another name, with less options."""
    source, expected = saved(tmp_path, vit, "MISS", **changes)
    leave_out(source, "mini_r", "miss_dropout")
    edit(source, peft_type="BONE")
    tensors = load_file(source / TENSOR_FILE)
    renamed = {key.replace("miss_block", "bone_block"): t for key, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, source / TENSOR_FILE)
    adapter = import_adapter(source, vit)
    assert range_error(expected, answers(vit, adapter)) <= BOUND
    assert adapter.config.fold_only == folded
    assert adapter.config.extra["imported_from"]["peft_type"] == "BONE"


CONVOLUTION = {"target_modules": ["qkv", "patch_embed.proj"]}


def test_a_convolution_whose_image_is_turned(tmp_path, vit):
    source, _ = saved(tmp_path, vit, "OFT", **CONVOLUTION)
    with pytest.raises(AdapterError, match=r"OFT of the convolution patch_embed\.proj: .*BOFT"):
        import_adapter(source, vit)


@pytest.mark.parametrize(
    ("method", "changes", "refused"),
    [
        ("OFT", {}, "OFT of PEFT 0.18"),
        ("OFT", {"use_cayley_neumann": False}, None),
        ("BOFT", {}, None),
        ("BOFT", CONVOLUTION, "BOFT of PEFT 0.14"),
    ],
    ids=in_order,
)
def test_methods_that_peft_changed(tmp_path, vit, method, changes, refused):
    source, expected = saved(tmp_path, vit, method, **changes)
    assert range_error(expected, answers(vit, import_adapter(source, vit))) <= BOUND
    leave_out(source, *OLD)
    if refused is None:
        assert range_error(expected, answers(vit, import_adapter(source, vit))) <= BOUND
        return
    with pytest.raises(AdapterError, match=rf"{refused} or newer.*`extract_adapter"):
        import_adapter(source, vit)


def edit(source, **values):
    content = json.loads((source / CONFIG_FILE).read_text())
    (source / CONFIG_FILE).write_text(json.dumps({**content, **values}))


def test_an_outer_module_s_name_and_another_head(tmp_path, vit):
    """The ViT is a member of the user's module, whose classifier has a name of its own."""
    source, expected = saved(tmp_path, vit, "ADALORA")
    tensors = {}
    for key, value in load_file(source / TENSOR_FILE).items():
        inner = key.removeprefix("base_model.model.")
        own = inner.replace("head.", "fc.") if inner.startswith("head.") else f"net.{inner}"
        tensors[f"base_model.model.{own}"] = value
    save_file(tensors, source / TENSOR_FILE)
    edit(source, modules_to_save=["fc"])
    assert range_error(expected, answers(vit, import_adapter(source, vit))) <= BOUND


def test_compressed(tmp_path, vit):
    source, expected = saved(tmp_path, vit, "OFT", oft_block_size=4)
    with pytest.raises(AdapterError, match=r"at rank 1 .*most at blocks\..*`accept_error`"):
        import_adapter(source, vit, ImportOptions(compress_rank=1))
    whole = import_adapter(source, vit, ImportOptions(compress_rank=64))
    assert not whole.config.fold_only
    assert range_error(expected, answers(vit, whole)) <= BOUND
    options = ImportOptions(compress_rank=16, accept_error=1.0)
    adapter = import_adapter(source, vit, options)
    assert {t.lora_A.shape[0] for t in adapter.sites.values()} == {16}
    stated = adapter.config.compressed
    assert stated.rank == 16
    assert stated.worst_site in adapter.sites
    assert 1e-3 < stated.max_range_error < 0.5
    save_adapter(adapter, tmp_path / "out")
    assert load_adapter(tmp_path / "out").config.compressed == stated
    with pytest.raises(OptionError, match="expected 1 or more"):
        import_adapter(source, vit, ImportOptions(compress_rank=0))


def test_norms_cannot_be_compressed(tmp_path, vit):
    source, _ = saved(tmp_path, vit, "LN_TUNING")
    with pytest.raises(AdapterError, match=r"norm1\.weight.*cannot be side branches at any rank"):
        import_adapter(source, vit, ImportOptions(compress_rank=4))


@pytest.mark.parametrize("method", ["LILY", "PREFIX_TUNING", "XLORA"])
def test_what_depends_on_the_input_is_refused(tmp_path, vit, method):
    said = peft_table.outcome(method, vit, TIMM, tmp_path)
    assert said["as"] == "refused", said


def test_several_adapters_in_one_folder(tmp_path, vit):
    model = trained(vit, "LORA", arguments_of("LORA", TIMM))
    model.add_adapter("second", model.peft_config["default"])
    model.save_pretrained(str(tmp_path / "all"), selected_adapters=["second"])
    with pytest.raises(AdapterError, match=r"holds the adapters second: give one"):
        import_adapter(tmp_path / "all", vit)
    assert import_adapter(tmp_path / "all" / "second", vit).sites


def of_two(tmp_path, vit, method, **changes):
    """A folder with all that two adapters of one model train; name -> PEFT's logits with it."""
    arguments = {**arguments_of(method, TIMM), "modules_to_save": ["head", "norm"], **changes}
    model = trained(vit, method, arguments)
    model.add_adapter("cars", model.peft_config["default"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".cars" in name and p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) * 0.1)
    expected = {}
    for name in ("cars", "default"):
        model.set_adapter(name)
        expected[name] = logits_of(model)
    model.save_pretrained(str(tmp_path / "peft"), selected_adapters=["default"])
    own = {"default", "cars"}
    tensors = {k: t for k, t in model.state_dict().items() if own.intersection(k.split("."))}
    save_file({k: t.clone() for k, t in tensors.items()}, tmp_path / "peft" / TENSOR_FILE)
    return tmp_path / "peft", expected


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("LORA", {}),
        ("LORA", {"use_dora": True}),
        ("HRA", {}),
        ("LOHA", {}),
        ("IA3", {}),
        ("OFT", {}),
        ("MISS", {}),
        ("LN_TUNING", {"modules_to_save": ["head"]}),
    ],
    ids=in_order,
)
def test_several_adapters_in_one_file(tmp_path, vit, method, changes):
    """The one that is named, with its own head and norm: the last one's come in with none."""
    source, expected = of_two(tmp_path, vit, method, **changes)
    for name, logits in expected.items():
        adapter = import_adapter(source, vit, ImportOptions(adapter_name=name))
        assert range_error(logits, answers(vit, adapter)) <= BOUND
    assert range_error(expected["default"], expected["cars"]) > MISTAKE
    with pytest.raises(AdapterError, match=r"the adapters cars, default: say .*`adapter_name`"):
        import_adapter(source, vit)
    with pytest.raises(AdapterError, match=r"found 'planes'\. It holds the adapters cars, default"):
        import_adapter(source, vit, ImportOptions(adapter_name="planes"))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("PSOFT", r"names of adapters in them \(cars, default\)"),
        ("DEFT", r"names of adapters in them \(cars, default\)"),
        ("VERA", r"the tensors have, the configuration does not name: .*\.vera_A"),
    ],
)
def test_several_adapters_of_methods_whose_names_nobody_can_tell(tmp_path, vit, method, reason):
    source, _ = of_two(tmp_path, vit, method)
    options = ImportOptions(adapter_name="cars")
    with pytest.raises(AdapterError, match=rf"{reason}.*selected_adapters=\['NAME'\]\)\."):
        import_adapter(source, vit, options)


def test_heads_of_several_adapters_beside_one(tmp_path, vit):
    source, expected = of_two(tmp_path, vit, "LORA", modules_to_save=["head"])
    tensors = load_file(source / TENSOR_FILE)
    one = {k: t for k, t in tensors.items() if ".cars." not in k or ".head." in k}
    assert len(one) < len(tensors)
    save_file(one, source / TENSOR_FILE)
    with pytest.raises(AdapterError, match="holds the adapters cars, default"):
        import_adapter(source, vit)
    adapter = import_adapter(source, vit, ImportOptions(adapter_name="default"))
    assert range_error(expected["default"], answers(vit, adapter)) <= BOUND


def test_the_name_of_the_only_adapter(tmp_path, vit):
    source, _ = saved(tmp_path, vit, "LORA")
    with pytest.raises(AdapterError, match=r"does not name: leave `adapter_name` out"):
        import_adapter(source, vit, ImportOptions(adapter_name="default"))


@pytest.mark.parametrize("first", ["own", "trained"])
def test_a_parameter_that_is_there_twice(tmp_path, vit, first):
    """The backbone's own head beside the trained one, or a tensor with and without a name."""
    source, _ = saved(tmp_path, vit, "LORA")
    tensors = load_file(source / TENSOR_FILE)
    head = "base_model.model.head"
    own = {f"{head}.{leaf}": vit.model.get_parameter(f"head.{leaf}") for leaf in ("weight", "bias")}
    new = {
        f"{head}.modules_to_save.default.{leaf}": tensors.pop(f"{head}.{leaf}")
        for leaf in ("weight", "bias")
    }
    both = {**own, **new} if first == "own" else {**new, **own}
    (source / TENSOR_FILE).unlink()
    torch.save({**tensors, **both}, source / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"one tensor for head\.weight, found two"):
        import_adapter(source, vit)
    key = next(k for k in tensors if k.endswith(".lora_A.weight"))
    again = {key.replace("lora_A.", "lora_A.default."): tensors[key]}
    torch.save({**tensors, **new, **again}, source / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"one tensor for .*lora_A\.weight, found two"):
        import_adapter(source, vit)


def test_a_processor_beside_the_adapter(tmp_path, vit):
    source, _ = saved(tmp_path, vit, "LORA")
    assert import_adapter(source, vit).config.extra["imported_from"]["preprocess_assumed"]
    stated = {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}
    (source / "preprocessor_config.json").write_text(
        json.dumps({**stated, "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 255})
    )
    adapter = import_adapter(source, vit)
    assert not adapter.config.extra["imported_from"]["preprocess_assumed"]
    found = adapter.config.preprocess
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (found.interpolation, found.crop_mode, found.crop_pct) == ("bicubic", "squash", 1.0)
    given = replace(found, mean=(0.5, 0.5, 0.5))
    assert import_adapter(source, vit, ImportOptions(preprocess=given)).config.preprocess == given
    (source / "preprocessor_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="expected a JSON object, found list"):
        import_adapter(source, vit)
    for wrong in ({"size": {"shortest_edge": 0}}, {"resample": 9}, {"size": [32]}):
        (source / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **wrong})
        )
        with pytest.raises(AdapterError, match=r"cannot be read: .*`preprocess`"):
            import_adapter(source, vit)
    assert import_adapter(source, vit, ImportOptions(preprocess=given)).config.preprocess == given


def test_code_named_by_a_file_does_not_run(tmp_path, vit, capsys):
    """auto_mapping and base_model_name_or_path lead nowhere; an import by name is refused."""
    source, expected = saved(tmp_path, vit, "MISS")
    edit(
        source,
        auto_mapping={"base_model_class": "Evil", "parent_library": "antigravity"},
        base_model_name_or_path="someone/else",
    )
    assert range_error(expected, answers(vit, import_adapter(source, vit))) <= BOUND
    torch.save({"x": _Evil()}, source / "adapter_model.bin")
    (source / TENSOR_FILE).unlink()
    with pytest.raises(AdapterError, match="never loaded"):
        import_adapter(source, vit)
    assert "unpickled" not in capsys.readouterr().out


class _Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_random_adapters_whole_and_damaged(tmp_path, capsys):
    found = peft_random.run(12, 3, tmp_path)
    assert not found["wrong"], capsys.readouterr().out
    assert Counter(found)["damaged: refused"] >= 2


def test_an_importer_that_compares_nothing_is_seen(tmp_path, monkeypatch):
    """The random draws find what they are for."""
    from hhdeploy.adapters.importers import merging, peft, saved

    for module, check in (
        (peft, "compare_targets"),
        (saved, "_check_saved"),
        (merging, "_compare"),
    ):
        monkeypatch.setattr(module, check, lambda *_: None)
    monkeypatch.setattr(peft_random, "HARMLESS", ())
    monkeypatch.setattr(peft_random, "DAMAGES", (peft_random.lost_module,) * 9)
    found = peft_random.run(4, 0, tmp_path)
    assert any("wrong in silence" in line for line in found["wrong"]), found
