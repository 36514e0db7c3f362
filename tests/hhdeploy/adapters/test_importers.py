"""Adapters of PEFT and of .pth files, against PEFT itself."""

from __future__ import annotations

import json
import shutil
import sys
from collections import OrderedDict

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.adapters.importers import ImportOptions, import_adapter, needs_weights
from hhdeploy.adapters.importers.checkpoint import extract_adapter
from hhdeploy.adapters.importers.lora import hra_low_rank, lora_scale
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.cli.adapter_import import command
from hhdeploy.errors import AdapterError, BackboneError
from hhdeploy.training import attach
from tests.support import (
    TINY_ARGS,
    TINY_MODEL,
    assert_caught,
    assert_parity,
    images,
    logits_of,
    random_adapter,
    tiny_backbone,
)
from tests.workshop import run_python

# PEFT 0.21 reads its own adapter_config.json without closing it when it saves.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:unclosed file .*adapter_config\.json:ResourceWarning",
)

ATTENTION_AND_FC1 = r".*(attn\.(qkv|proj)|mlp\.fc1)"
CLASSES = 7


def trained(config, seed=0):
    """PEFT's model of ``config`` on the tiny ViT with a head of 7 classes, all values random."""
    model = tiny_backbone(num_classes=CLASSES).model
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (0.1 if "lora" in name else 0.3))
    return model


def peft_directory(path, config, seed=0):
    """Save a trained PEFT adapter; returns the logits of PEFT's merged model, in float64."""
    model = trained(config, seed)
    model.save_pretrained(path)
    merged = model.double().merge_and_unload()
    return logits_of(merged, images(3))


def imported_logits(path, options=ImportOptions(), backbone=None):  # noqa: B008
    backbone = backbone or tiny_backbone(num_classes=CLASSES)
    adapter = import_adapter(path, backbone, options)
    return adapter, logits_of(attach(backbone.model, adapter), images(3))


def lora(**changes):
    return peft.LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ATTENTION_AND_FC1,
            "modules_to_save": ["head"],
            **changes,
        }
    )


def hra(**changes):
    return peft.HRAConfig(
        **{"r": 4, "target_modules": ATTENTION_AND_FC1, "modules_to_save": ["head"], **changes}
    )


@pytest.mark.parametrize(
    ("stated", "other"),
    [
        (None, False),
        (TINY_MODEL, False),
        ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", False),
        ("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", False),
        ("timm/vit_tiny_patch16_224.dino", True),
        ("vit_small_patch16_224", True),
        ("facebook/dinov2-small", True),
    ],
)
def test_another_name_than_the_backbone_s_is_said(copy, stated, other):
    source = copy("lora")
    file = source / CONFIG_FILE
    config = {**json.loads(file.read_text()), "base_model_name_or_path": stated}
    file.write_text(json.dumps(config))
    adapter = import_adapter(source, tiny_backbone(num_classes=CLASSES))
    lines = adapter.config.extra["imported_from"].get("assumed", [])
    assert [str(stated) in line and adapter.config.base_model in line for line in lines] == (
        [True] if other else []
    )


# -- PEFT, accepted -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"r": 1, "lora_alpha": 1},
        {"rank_pattern": {"fc1": 2, r"blocks.1.attn.qkv": 4}},
        {"alpha_pattern": {r"blocks\.0\..*proj": 11}, "lora_dropout": 0.1},
        {"rank_pattern": {"qkv": 5}, "alpha_pattern": {"qkv": 2}, "use_rslora": True},
        {"target_modules": ["qkv", "fc2"], "init_lora_weights": "gaussian"},
        {"target_modules": ["qkv"], "layers_to_transform": [1], "layers_pattern": "blocks"},
        {"modules_to_save": None},
    ],
    ids=str,
)
def test_lora_is_what_peft_merges(tmp_path, changes):
    expected = peft_directory(tmp_path / "a", lora(**changes))
    adapter, found = imported_logits(tmp_path / "a")
    assert_parity(expected, found, "algebra", "float32")
    plain = logits_of(tiny_backbone(num_classes=CLASSES).model, images(3))
    assert_caught(expected, plain, "folded", "float32")
    assert adapter.config.form == "additive"
    assert all(site.u is None for site in adapter.sites.values())


@pytest.mark.parametrize("gram_schmidt", [False, True])
@pytest.mark.parametrize("r", [2, 4])
def test_hra_is_what_peft_merges(tmp_path, r, gram_schmidt):
    expected = peft_directory(tmp_path / "a", hra(r=r, apply_GS=gram_schmidt))
    adapter, found = imported_logits(tmp_path / "a")
    assert_parity(expected, found, "algebra", "float32")
    assert {s.lora_A.shape[0] for s in adapter.sites.values()} == {r}
    q, v = (adapter.sites[f"blocks.0.attn.qkv.{part}"] for part in "qv")
    assert np.array_equal(q.lora_A, v.lora_A), "the thirds of a fused qkv share R"


def test_hra_with_another_backbone_or_the_other_product_is_caught(tmp_path):
    expected = peft_directory(tmp_path / "a", hra())
    other = tiny_backbone(num_classes=CLASSES)
    with torch.no_grad():
        other.model.get_parameter("blocks.0.attn.proj.weight").mul_(1.1)
    adapter = import_adapter(tmp_path / "a", other)
    mistaken = logits_of(attach(tiny_backbone(num_classes=CLASSES).model, adapter), images(3))
    assert_caught(expected, mistaken, "algebra", "float32")
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(config | {"apply_GS": True}))
    assert_caught(expected, imported_logits(tmp_path / "a")[1], "algebra", "float32")


def test_the_wrong_scale_and_the_wrong_thirds_are_caught(tmp_path):
    expected = peft_directory(tmp_path / "a", lora())
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(config | {"use_rslora": True}))
    assert_caught(expected, imported_logits(tmp_path / "a")[1], "algebra", "float32")
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(config))
    backbone = tiny_backbone(num_classes=CLASSES)
    adapter = import_adapter(tmp_path / "a", backbone)
    sites = dict(adapter.sites)
    name = "blocks.0.attn.qkv"
    sites[f"{name}.q"], sites[f"{name}.v"] = sites[f"{name}.v"], sites[f"{name}.q"]
    swapped = type(adapter)(adapter.config, sites, adapter.head)
    found = logits_of(attach(backbone.model, swapped), images(3))
    assert_caught(expected, found, "algebra", "float32")


def test_what_the_configuration_says(tmp_path):
    peft_directory(tmp_path / "a", lora(use_rslora=True))
    backbone = tiny_backbone(num_classes=CLASSES)
    names = tuple("abcdefg")
    adapter = import_adapter(tmp_path / "a", backbone, ImportOptions(class_names=names))
    config = adapter.config
    assert config.base_model == backbone.facts.model
    assert config.base_model_args == TINY_ARGS | {"num_classes": CLASSES}
    assert config.base_sha256 == backbone.facts.sha256
    assert set(config.target_modules) == {"q", "k", "v", "proj", "fc1"}
    assert (config.num_classes, config.class_names) == (CLASSES, names)
    assert config.preprocess == backbone.facts.preprocess
    origin = config.extra["imported_from"]
    assert origin["peft_type"] == "LORA"
    assert (origin["r"], origin["lora_alpha"], origin["use_rslora"]) == (3, 5, True)
    assert origin["file"] == TENSOR_FILE
    assert origin["preprocess_assumed"]
    assert str(tmp_path) not in json.dumps(config.to_json()), "no path of this machine is kept"


def test_sites_of_some_layers_are_named_in_full(tmp_path):
    changes = {"target_modules": ["qkv"], "layers_to_transform": [1], "layers_pattern": "blocks"}
    peft_directory(tmp_path / "a", lora(**changes))
    adapter = import_adapter(tmp_path / "a", tiny_backbone(num_classes=CLASSES))
    assert adapter.config.target_modules == tuple(f"blocks.1.attn.qkv.{part}" for part in "qkv")


def test_the_result_is_saved_and_loaded(tmp_path):
    peft_directory(tmp_path / "a", lora())
    adapter = import_adapter(tmp_path / "a", tiny_backbone(num_classes=CLASSES))
    save_adapter(adapter, tmp_path / "b")
    again = load_adapter(tmp_path / "b")
    assert again.config == adapter.config
    for name, site in adapter.sites.items():
        assert np.array_equal(again.sites[name].lora_B, site.lora_B)


def test_without_known_weights(tmp_path):
    peft_directory(tmp_path / "a", lora())
    options = ImportOptions(weights_known=False)
    adapter = import_adapter(tmp_path / "a", tiny_backbone(num_classes=CLASSES), options)
    assert adapter.config.base_sha256 is None
    peft_directory(tmp_path / "h", hra())
    with pytest.raises(
        AdapterError, match=r"HRA adapter multiplies the backbone's weights.*`checkpoint`"
    ):
        import_adapter(tmp_path / "h", tiny_backbone(num_classes=CLASSES), options)
    assert [needs_weights(tmp_path / name) for name in "ah"] == [False, True]


def test_a_raw_state_dict_s_modules_to_save_and_an_outer_module(tmp_path):
    """Keys as they are when the ViT is a member of the user's own module."""
    expected = peft_directory(tmp_path / "a", lora())
    old = load_file(tmp_path / "a" / TENSOR_FILE)
    inner = "base_model.model.net."
    renamed = {k.replace("base_model.model.", inner): v for k, v in old.items()}
    for name in ("weight", "bias"):
        renamed[f"{inner}head.modules_to_save.default.{name}"] = renamed.pop(f"{inner}head.{name}")
    save_file(renamed, tmp_path / "a" / TENSOR_FILE)
    _, found = imported_logits(tmp_path / "a", ImportOptions(prefix="net."))
    assert_parity(expected, found, "algebra", "float32")
    _, found = imported_logits(tmp_path / "a")  # told by the names alone
    assert_parity(expected, found, "algebra", "float32")


@pytest.mark.parametrize("target", ["head", "patch_embed.proj"])
def test_ranks_that_differ_within_a_pair_are_named(tmp_path, target):
    """Of what becomes a new value, where no site's shapes are compared; on a convolution in groups
    PEFT's own pairs are so."""
    peft_directory(tmp_path / "a", lora(target_modules=[target], modules_to_save=None))
    tensors = load_file(tmp_path / "a" / TENSOR_FILE)
    key = f"base_model.model.{target}.lora_B.weight"
    tensors[key] = tensors[key][:, :1].contiguous()
    save_file(tensors, tmp_path / "a" / TENSOR_FILE)
    refused(tmp_path / "a", f"{target}: expected lora_A [r, in] and lora_B [out, r] of one rank")


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize(
    "changes",
    [
        {"alpha_pattern": {"net.blocks.0.attn.qkv": 40}},
        {"alpha_pattern": {"^blocks.0.attn.qkv": 40}},
        {"rank_pattern": {"net.blocks.0.attn.qkv": 5}},
        {"alpha_pattern": {"net.blocks.0.attn.qkv": 40}, "use_dora": True},
        {"target_modules": ["qkv", "fc1"], "layers_to_transform": [1]},
        {"target_modules": r"net\.blocks\.\d\.attn\.qkv"},
        {"exclude_modules": ["net.blocks.0.attn.qkv"]},
    ],
    ids=str,
)
def test_a_configuration_s_names_are_those_of_the_outer_module(tmp_path, changes, prefix):
    """PEFT compares them with whole paths, the member's name before them."""
    outer = torch.nn.Sequential(OrderedDict(net=tiny_backbone(num_classes=CLASSES).model))
    model = peft.get_peft_model(outer, lora(modules_to_save=None, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path / "a")
    expected = logits_of(model.double().merge_and_unload(), images(3))
    _, found = imported_logits(tmp_path / "a", ImportOptions(prefix=prefix))
    assert_parity(expected, found, "algebra", "float32")


@pytest.mark.parametrize("before", ["model.", "base_model.model."])
def test_what_is_before_peft_s_start_is_cut_by_a_prefix(tmp_path, before):
    """A member of Lightning's module, and a model that was wrapped twice."""
    expected = peft_directory(tmp_path / "a", lora())
    old = load_file(tmp_path / "a" / TENSOR_FILE)
    save_file({before + key: value for key, value in old.items()}, tmp_path / "a" / TENSOR_FILE)
    said = rf"start with base_model\.model\. \(once\)\. Cut .* `prefix='{before}'`"
    with pytest.raises(AdapterError, match=said):
        imported_logits(tmp_path / "a")
    _, found = imported_logits(tmp_path / "a", ImportOptions(prefix=before))
    assert_parity(expected, found, "algebra", "float32")


class Two(torch.nn.Module):
    """One training of two encoders of a kind."""

    def __init__(self, rgb, thermal):
        super().__init__()
        self.rgb, self.thermal = rgb, thermal

    def forward(self, x):
        return self.rgb(x) + self.thermal(x)


@pytest.mark.parametrize("saved_whole", [None, ["head"]])
def test_two_encoders_are_not_one(tmp_path, saved_whole):
    """Their tensors have the same numbers of blocks and kinds; a prefix says whose are meant."""
    vits = [tiny_backbone(num_classes=CLASSES).model for _ in range(2)]
    config = lora(target_modules=["attn.proj", "fc1"], modules_to_save=saved_whole)
    model = peft.get_peft_model(Two(*vits), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "a")
    merged = model.double().merge_and_unload()
    said = r"rgb\.head.*`prefix`" if saved_whole else r"rgb\.blocks.*thermal\..*both be .*`prefix`"
    with pytest.raises(AdapterError, match=said):
        imported_logits(tmp_path / "a")
    for name in ("rgb", "thermal"):
        adapter, found = imported_logits(tmp_path / "a", ImportOptions(prefix=f"{name}."))
        expected = logits_of(getattr(merged, name), images(3))
        assert_parity(expected, found, "algebra", "float32")
        (line,) = adapter.config.extra["imported_from"]["assumed"]
        assert f"left out, as they are not in {name}.: " in line


def test_two_encoders_in_a_pth_file(tmp_path, tiny):
    adapter = random_adapter(tiny.facts, targets=("proj",), classes=None)
    pth(tmp_path / "a.pth", adapter, "rgb.")
    one = torch.load(tmp_path / "a.pth", weights_only=True)
    two = {key.replace("rgb.", "thermal."): tensor for key, tensor in one.items()}
    torch.save(one | two, tmp_path / "a.pth")
    for prefix in ("", "rgb."):
        with pytest.raises(AdapterError, match=r"thermal\.blocks.* both be blocks\.0\.attn\.proj"):
            import_adapter(tmp_path / "a.pth", tiny, ImportOptions(prefix=prefix))


def test_an_older_directory_with_a_bin_file(tmp_path):
    expected = peft_directory(tmp_path / "a", lora())
    tensors = load_file(tmp_path / "a" / TENSOR_FILE)
    torch.save(tensors, tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / TENSOR_FILE).unlink()
    assert_parity(expected, imported_logits(tmp_path / "a")[1], "algebra", "float32")


def assumed(adapter):
    return adapter.config.extra["imported_from"].get("assumed", [])


def test_an_adapter_says_which_of_several_weights_it_is_of(tmp_path, tiny, copy):
    """Of a .pth file and of PEFT's older one, as a checkpoint of a model does."""
    said = "weights taken from model_avg of the checkpoint, not from model"
    state = torch.load(pth(tmp_path / "a.pth", random_adapter(tiny.facts)), weights_only=True)
    half = {key: value / 2 for key, value in state.items()}
    torch.save({"model": state, "model_avg": half}, tmp_path / "a.pth")
    options = ImportOptions(form="additive", reflection="unnormalized")
    found = import_adapter(tmp_path / "a.pth", tiny, options)
    assert assumed(found) == [said]
    assert np.array_equal(found.head.bias, half["head.bias"].numpy())
    torch.save({"model": state, "ema": {"shadow_params": list(half.values())}}, tmp_path / "a.pth")
    (line,) = assumed(import_adapter(tmp_path / "a.pth", tiny, options))
    assert line == "weights taken from model of the checkpoint, not from ema.shadow_params"
    source = copy()
    tensors = load_file(source / TENSOR_FILE)
    (source / TENSOR_FILE).unlink()
    torch.save({"model": tensors, "model_avg": tensors}, source / "adapter_model.bin")
    assert assumed(import_adapter(source, tiny_backbone(num_classes=CLASSES))) == [said]


@pytest.mark.parametrize("gram_schmidt", [False, True])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_hra_s_product_against_dense_reflections(r, gram_schmidt):
    u = np.random.default_rng(r).standard_normal((13, r))
    a, c = hra_low_rank(u, gram_schmidt=gram_schmidt)
    expected = np.eye(13)
    if gram_schmidt:
        q, _ = np.linalg.qr(u)
        expected -= 2 * q @ q.T
    else:
        for x in u.T:
            expected = expected @ (np.eye(13) - 2 * np.outer(x, x) / (x @ x))
    assert_parity(expected, np.eye(13) + c @ a, "algebra", "float64")


def test_lora_scale(tmp_path):
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": {"fc1": 9}, "alpha_pattern": {"fc1": 12}}
    rs = config | {"use_rslora": True}
    where = tmp_path / CONFIG_FILE
    assert lora_scale(config, "blocks.0.attn.proj", 4, where) == 1.5
    assert lora_scale(rs, "blocks.0.attn.proj", 4, where) == 3.0
    assert lora_scale(config, "blocks.0.mlp.fc1", 9, where) == pytest.approx(12 / 9)
    assert lora_scale(rs, "blocks.0.mlp.fc1", 9, where) == 4.0


# -- PEFT, refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A LoRA and an HRA directory, saved by PEFT once."""
    root = tmp_path_factory.mktemp("peft")
    trained(lora()).save_pretrained(root / "lora")
    trained(hra()).save_pretrained(root / "hra")
    return root


@pytest.fixture
def copy(saved, tmp_path):
    """``copy(kind, config, tensors)``: a directory with these changes (None removes a key)."""

    def make(kind="lora", config=None, tensors=None):
        target = tmp_path / kind
        shutil.copytree(saved / kind, target, dirs_exist_ok=True)
        content = json.loads((target / CONFIG_FILE).read_text()) | (config or {})
        (target / CONFIG_FILE).write_text(json.dumps(content))
        arrays = load_file(target / TENSOR_FILE) | (tensors or {})
        save_file({k: v for k, v in arrays.items() if v is not None}, target / TENSOR_FILE)
        return target

    return make


def refused(source, *parts, options=ImportOptions(), backbone=None):  # noqa: B008
    with pytest.raises(AdapterError) as caught:
        import_adapter(source, backbone or tiny_backbone(num_classes=CLASSES), options)
    for part in (str(source), *parts):
        assert part in str(caught.value), f"{part!r} is not in {caught.value!s}"


PROJ = "base_model.model.blocks.0.attn.proj"


@pytest.mark.parametrize(
    ("kind", "changes", "parts"),
    [
        ("lora", {"use_dora": True}, ("tensors lack", "lora_magnitude_vector")),
        ("lora", {"bias": "all"}, ("bias is 'all'", "lacks patch_embed.proj.bias")),
        ("lora", {"bias": "lora_only"}, ("lacks blocks.0.attn.qkv.bias",)),
        ("hra", {"bias": "hra_only"}, ("lacks blocks.0.attn.qkv.bias",)),
        ("lora", {"lora_bias": True}, ("tensors lack", "lora_B.bias")),
        ("lora", {"layer_replication": [[0, 1]]}, ("cannot put this LORA adapter", "layers")),
        ("lora", {"target_parameters": ["x"]}, ("target_parameters names 'x'",)),
        ("lora", {"use_invention_of_2030": True}, ("use_invention_of_2030", "A newer PEFT")),
        ("hra", {"use_invention_of_2030": 1}, ("use_invention_of_2030", "A newer PEFT")),
        ("lora", {"megatron_config": {"a": 1}}, ("names code to import",)),
        ("lora", {"init_lora_weights": "pissa_niter_4"}, ("init_lora_weights", "modules_to_save")),
        ("lora", {"init_lora_weights": "loftq"}, ("init_lora_weights", "extract_adapter")),
        ("lora", {"peft_type": "XLORA"}, ("found 'XLORA', which mixes", "merge_adapters()")),
        (
            "lora",
            {"alora_invocation_tokens": [1, 2]},
            ("found [1, 2]: aLoRA acts from", "LoRA itself"),
        ),
        ("lora", {"peft_type": "LOHA"}, ("expected an option of LOHA", "init_lora_weights")),
        ("lora", {"peft_type": None}, ("that is installed, found None", "merge_and_unload")),
        ("lora", {"peft_type": "INVENTED"}, ("found 'INVENTED'", "pip install -U peft")),
        ("lora", {"peft_type": "HTA"}, ("needs no import",)),
        ("lora", {"r": 4}, ("blocks.0.attn", "expected rank 4", "found 3 rows")),
        ("lora", {"rank_pattern": {"fc1": 5}}, ("mlp.fc1: expected rank 5",)),
        ("lora", {"lora_alpha": "5"}, ("lora_alpha: expected a number, found '5'",)),
        ("lora", {"target_modules": [7]}, ("target_modules: expected",)),
        ("lora", {"target_modules": "("}, ("target_modules: expected",)),
        ("lora", {"modules_to_save": ["head", "norm"]}, ("the file lacks norm",)),
        ("lora", {"modules_to_save": None}, ("the file has it", "head.bias")),
        (
            "lora",
            {"target_modules": ["qkv", "attn.proj", "fc1", "fc2"]},
            ("the file lacks blocks.0.mlp.fc2, blocks.1.mlp.fc2",),
        ),
        ("lora", {"target_modules": ["qkv", "fc1"]}, ("does not name", "blocks.0.attn.proj")),
        ("hra", {"exclude_modules": ["fc1"]}, ("does not name", "blocks.0.mlp.fc1")),
    ],
)
def test_configurations_that_are_refused(copy, kind, changes, parts):
    refused(copy(kind, changes), *parts)


@pytest.mark.parametrize(
    ("kind", "changes", "parts"),
    [
        (
            "lora",
            {
                "base_model.model.patch_embed.proj.lora_A.weight": torch.ones(3, 3, 8, 8),
                "base_model.model.patch_embed.proj.lora_B.weight": torch.ones(48, 3, 1, 1),
            },
            ("does not name: patch_embed.proj",),
        ),
        (
            "lora",
            {
                "base_model.model.head.lora_A.weight": torch.ones(3, 48),
                "base_model.model.head.lora_B.weight": torch.ones(7, 3),
            },
            ("does not name: head",),
        ),
        ("lora", {f"{PROJ}.lora_A.weight": None}, ("lora_A and lora_B, found lora_B",)),
        ("lora", {f"{PROJ}.lora_B.bias": torch.ones(48)}, ("blocks.0.attn.proj.lora_B.bias",)),
        ("lora", {f"{PROJ}.lora_magnitude_vector": torch.ones(48)}, ("lora_magnitude_vector",)),
        (
            "lora",
            {"base_model.model.norm.weight": torch.ones(48)},
            ("norm.weight: the file has it",),
        ),
        ("lora", {"head.weight": torch.ones(7, 48)}, ("head.weight", "with save_pretrained of")),
        (
            "lora",
            {f"{PROJ}.lora_B.weight": torch.ones(47, 3)},
            ("blocks.0.attn.proj", "lora_B [48, r]", "[47, 3]"),
        ),
        ("lora", {f"{PROJ}.lora_B.weight": torch.full((48, 3), torch.nan)}, ("finite", "proj")),
        ("lora", {f"{PROJ}.lora_A.weight": torch.ones(0)}, ("lora_A", "ZeRO-3", "state_dict=acc")),
        ("lora", {"base_model.model.head.weight": torch.ones(7, 47)}, ("[classes, 48]",)),
        ("hra", {f"{PROJ}.hra_u": torch.ones(47, 4)}, ("hra_u of shape [48, r]", "[47, 4]")),
        ("hra", {f"{PROJ}.hra_u": torch.zeros(48, 4)}, ("proj.hra_u: column 0 is zero",)),
        ("hra", {f"{PROJ}.lora_A.weight": torch.ones(3, 48)}, ("hra_u of shape",)),
    ],
)
def test_tensors_that_are_refused(copy, kind, changes, parts):
    refused(copy(kind, tensors=changes), TENSOR_FILE, *parts)


def test_dependent_columns_have_no_gram_schmidt(copy):
    column = torch.arange(48.0)[:, None]
    same = {f"{PROJ}.hra_u": column.repeat(1, 4)}
    refused(copy("hra", {"apply_GS": True}, same), "column 1", "depends on the ones before")
    import_adapter(copy("hra", {"apply_GS": False}, same), tiny_backbone(num_classes=CLASSES))


def test_sources_that_are_not_there(tmp_path, copy):
    refused(tmp_path / "none", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CONFIG_FILE, "does not exist")
    directory = copy()
    (directory / TENSOR_FILE).unlink()
    refused(directory, TENSOR_FILE, "does not exist")
    (directory / CONFIG_FILE).write_text("{")
    refused(directory, "is not valid JSON")
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "r": 4}')
    refused(directory, "'r' is there twice")
    (directory / CONFIG_FILE).unlink()
    (directory / CONFIG_FILE).mkdir()
    refused(directory, f"{CONFIG_FILE} cannot be read: it is a directory")


def test_options_of_pth_files_are_refused_for_peft(copy):
    for options in (
        ImportOptions(form="sequential"),
        ImportOptions(reflection="orthogonal"),
        ImportOptions(lora_scale=2.0),
    ):
        refused(copy(), "are for .pth files", options=options)


def test_class_names_that_do_not_fit(copy):
    options = ImportOptions(class_names=("a", "b"))
    refused(copy(), "expected 2 rows", "found 7", options=options)


# -- .pth ---------------------------------------------------------------------------------------


def pth(path, adapter, prefix="", entry=None, **more):
    """What a research script saves: the trained tensors alone."""
    state = {}
    for name, site in adapter.sites.items():
        for tensor in ("u", "v", "d", "lora_A", "lora_B"):
            state[f"{prefix}{name}.{tensor}"] = torch.from_numpy(getattr(site, tensor))
    if adapter.head is not None:
        state[f"{prefix}head.weight"] = torch.from_numpy(adapter.head.weight)
        state[f"{prefix}head.bias"] = torch.from_numpy(adapter.head.bias)
    state |= more
    torch.save(state if entry is None else {entry: state, "epoch": 3}, path)
    return path


@pytest.mark.parametrize(
    ("start", "classifier"), [("model.", "head"), ("student.net.", "head"), ("", "classifier")]
)
def test_the_classifier_of_a_pth_file_behind_an_outer_module(tmp_path, tiny, start, classifier):
    """As Lightning writes it, and by transformers' name; not beside another classifier."""
    adapter = random_adapter(tiny.facts)
    file = pth(tmp_path / "a.pth", adapter, start)
    state = torch.load(file, weights_only=True)
    renamed = {key.replace("head.", f"{classifier}."): value for key, value in state.items()}
    torch.save(renamed, file)
    found = import_adapter(file, tiny)
    assert found.sites.keys() == adapter.sites.keys()
    assert np.array_equal(found.head.weight, adapter.head.weight)
    assert np.array_equal(found.head.bias, adapter.head.bias)
    torch.save(
        renamed
        | {
            f"{start}classifier.weight": 2 * state[f"{start}head.weight"],
            f"{start}head.weight": state[f"{start}head.weight"],
        },
        file,
    )
    with pytest.raises(AdapterError, match="unknown tensor key"):
        import_adapter(file, tiny)


@pytest.mark.parametrize("entry", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("form", "targets"), [("additive", ("q", "v", "fc1")), ("sequential", ("proj", "fc2"))]
)
def test_a_pth_file(tmp_path, tiny, form, targets, prefix, entry):
    adapter = random_adapter(tiny.facts, form=form, reflection="orthogonal", targets=targets, r=2)
    file = pth(tmp_path / "a.pth", adapter, prefix, entry)
    options = ImportOptions(
        form=form, reflection="orthogonal", prefix=prefix, class_names=adapter.config.class_names
    )
    found = import_adapter(file, tiny, options)
    assert found.config.to_json() | {"imported_from": 0} == {
        **adapter.config.to_json(),
        "imported_from": 0,
    }
    for name, site in adapter.sites.items():
        for tensor in ("u", "v", "d", "lora_A", "lora_B"):
            assert np.array_equal(getattr(found.sites[name], tensor), getattr(site, tensor))
    assert np.array_equal(found.head.weight, adapter.head.weight)
    assert found.config.extra["imported_from"]["file"] == "a.pth"
    assert "assumed" not in found.config.extra["imported_from"]  # HTA's own product has no alpha


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ({}, "the reflection unnormalized and the form additive: the file does not say"),
        ({"form": "additive"}, "in the reflection unnormalized: the file does not say"),
        ({"reflection": "orthogonal"}, "in the form additive: the file does not say"),
    ],
)
def test_what_the_vectors_of_a_pth_file_are_taken_for_is_said(tmp_path, tiny, said, taken):
    """As of LoRA's scale: trained otherwise, the numbers would be another adapter's."""
    file = pth(tmp_path / "a.pth", random_adapter(tiny.facts, targets=("proj",)))
    (line,) = assumed(import_adapter(file, tiny, ImportOptions(**said)))
    assert line.startswith("blocks.0.attn.proj.u, … (2 in all) and what belongs to it are taken")
    assert taken in line


def test_a_pth_file_in_half_precision_and_with_a_scale(tmp_path, tiny):
    adapter = random_adapter(tiny.facts, targets=("proj",), classes=None)
    state = {
        f"{name}.{tensor}": torch.from_numpy(getattr(site, tensor)).bfloat16()
        for name, site in adapter.sites.items()
        for tensor in ("lora_A", "lora_B")
    }
    torch.save(state, tmp_path / "a.pth")
    found = import_adapter(tmp_path / "a.pth", tiny, ImportOptions(lora_scale=0.5))
    for name in adapter.sites:
        assert np.array_equal(
            found.sites[name].lora_B, state[f"{name}.lora_B"].float().numpy() * np.float32(0.5)
        )
        assert found.sites[name].u is None
    origin = found.config.extra["imported_from"]
    assert (origin["lora_scale"], "assumed" in origin) == (0.5, False)
    (line,) = import_adapter(tmp_path / "a.pth", tiny).config.extra["imported_from"]["assumed"]
    assert line.startswith("blocks.0.attn.proj.lora_B, … (2 in all) is taken as it is: the file")


def test_lora_of_a_fused_qkv_in_a_pth_file_is_split(tmp_path, tiny):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 48, generator=generator)
    b = torch.randn(144, 2, generator=generator)
    state = {"blocks.1.attn.qkv.lora_A": a, "blocks.1.attn.qkv.lora_B": b}
    torch.save(state, tmp_path / "a.pth")
    found = import_adapter(tmp_path / "a.pth", tiny)
    for i, part in enumerate("qkv"):
        site = found.sites[f"blocks.1.attn.qkv.{part}"]
        assert np.array_equal(site.lora_B, b[48 * i : 48 * (i + 1)].numpy())
        assert np.array_equal(site.lora_A, a.numpy())


def kohyas(start, dots, alpha=3.0, names=("lora_down", "lora_up")):
    """LoRA of two Linears, one of them fused, as kohya's scripts and LyCORIS write it."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for path, out in (("blocks.0.attn.qkv", 144), ("blocks.1.mlp.fc2", 48)):
        owner = start + (path if dots else path.replace(".", "_"))
        width = 192 if path.endswith("fc2") else 48
        state[f"{owner}.{names[0]}.weight"] = torch.randn(2, width, generator=generator)
        state[f"{owner}.{names[1]}.weight"] = torch.randn(out, 2, generator=generator)
        if alpha is not None:
            state[f"{owner}.alpha"] = torch.tensor(alpha)
    return state


@pytest.mark.parametrize("entry", [None, "state_dict"])
@pytest.mark.parametrize(
    ("start", "dots", "prefix"),
    [
        *(("lycoris_", False, ""), ("lora_unet_", False, ""), ("", False, ""), ("", True, "")),
        *(("own_", False, "own_"), ("net.", True, "")),
    ],
)
def test_kohyas_lora_says_its_alpha(tmp_path, tiny, start, dots, prefix, entry):
    state = kohyas(start, dots)
    torch.save(state if entry is None else {entry: state}, tmp_path / "a.pth")
    found = import_adapter(tmp_path / "a.pth", tiny, ImportOptions(prefix=prefix))
    ups = [t.numpy() for key, t in state.items() if "lora_up" in key]
    qkv = [found.sites[f"blocks.0.attn.qkv.{part}"].lora_B for part in "qkv"]
    assert np.array_equal(np.concatenate(qkv), ups[0] * np.float32(1.5))
    assert np.array_equal(found.sites["blocks.1.mlp.fc2"].lora_B, ups[1] * np.float32(1.5))
    assert len(found.sites) == 4
    assert not {"assumed", "lora_scale"} & set(found.config.extra["imported_from"])


@pytest.mark.parametrize("names", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_loras_modules_without_an_alpha_are_taken_as_they_are(tmp_path, tiny, names):
    state = kohyas("", True, alpha=None, names=names)
    torch.save(state, tmp_path / "a.pth")
    found = import_adapter(tmp_path / "a.pth", tiny)
    up = state[f"blocks.1.mlp.fc2.{names[1]}.weight"].numpy()
    assert np.array_equal(found.sites["blocks.1.mlp.fc2"].lora_B, up)
    (line,) = found.config.extra["imported_from"]["assumed"]
    assert "is taken as it is: the file does not hold LoRA's alpha / r" in line


FC2 = "blocks_1_mlp_fc2"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s: s.pop(f"{FC2}.alpha"), {}, r"expected alpha, lora_down, lora_up, .*found lora"),
        (lambda s: s.pop(f"{FC2}.lora_up.weight"), {}, "found alpha, lora_down"),
        (lambda s: s.update({f"{FC2}.alpha": torch.tensor(0.0)}), {}, "one number that is not 0"),
        (lambda s: s.update({f"{FC2}.alpha": torch.ones(2)}), {}, r"found \[1.0, 1.0\]"),
        (lambda s: s.update({f"{FC2}.dora_scale": torch.ones(48, 1)}), {}, "unknown tensor key"),
        (lambda s: None, {"lora_scale": 2.0}, "`lora_scale`: expected none, found 2.0: the file"),
    ],
)
def test_kohyas_lora_that_is_not_whole_is_refused(tmp_path, tiny, change, options, message):
    state = kohyas("", False)
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(AdapterError, match=message):
        import_adapter(tmp_path / "a.pth", tiny, ImportOptions(**options))


def test_an_alpha_of_other_lora_is_no_kohyas(tmp_path, tiny):
    torch.save(kohyas("", True, names=("lora_A", "lora_B")), tmp_path / "a.pth")
    with pytest.raises(AdapterError, match=r"alpha'.*Beside lora_A nobody knows .*`lora_scale`"):
        import_adapter(tmp_path / "a.pth", tiny)


_QKV = "blocks.1.attn.qkv"


def test_loralibs_merged_linear_has_factors_of_its_own_for_q_k_and_v(tmp_path, tiny):
    """Its lora_A has 3 r rows and its lora_B r columns: a convolution of three groups. Of small
    whole numbers, whose products are exact."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randint(-8, 9, (6, 48), generator=generator).float()
    b = torch.randint(-8, 9, (144, 2), generator=generator).float()
    path = tmp_path / "merged.pth"
    torch.save({f"{_QKV}.lora_A": a, f"{_QKV}.lora_B": b}, path)
    adapter = import_adapter(path, tiny)
    change = torch.nn.functional.conv1d(a[None], b[..., None], groups=3)[0].numpy()
    found = [adapter.delta(f"{_QKV}.{part}").dense() for part in "qkv"]
    assert np.array_equal(np.concatenate(found), change)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_merged_linear_of_some_of_the_three_does_not_say_which(tmp_path, tiny, parts):
    path = tmp_path / "merged.pth"
    tensors = {"lora_A": torch.ones(2 * parts, 48), "lora_B": torch.ones(48 * parts, 2)}
    torch.save({f"{_QKV}.{name}": tensor for name, tensor in tensors.items()}, path)
    refused(path, f"loralib's MergedLinear with {parts} of q, k and v", ".q.lora_A", backbone=tiny)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x08" + bytes(7) + b'{"a": 7}', "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_safetensors_file_that_is_none(tmp_path, tiny, content, said):
    file = tmp_path / "a.safetensors"
    save_file({"blocks.0.attn.proj.u": torch.ones(48)}, file)
    file.write_bytes(file.read_bytes()[:-8] if content is None else content)
    refused(file, said, "Expected a safetensors file", backbone=tiny)


class Evil:
    """An object that would run code when unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path, tiny, capsys):
    torch.save({"x": Evil()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "cannot be read", "never loaded", backbone=tiny)
    assert "unpickled" not in capsys.readouterr().out


def test_pth_files_that_are_refused(tmp_path, tiny):
    adapter = random_adapter(tiny.facts, targets=("proj",))
    file = tmp_path / "a.pth"

    def refuse(*parts, options=ImportOptions()):  # noqa: B008
        refused(file, *parts, options=options, backbone=tiny)

    pth(file, adapter, **{"blocks.0.norm1.weight": torch.ones(48)})
    refuse("unknown tensor key 'blocks.0.norm1.weight'", ".lora_A", "head.weight")
    pth(file, adapter, note="hello")
    refuse("note: expected a tensor, found str")
    pth(file, adapter, **{"net.head.weight": torch.ones(5, 48)})
    refuse("unknown tensor key 'net.head.weight'", "`prefix`")
    pth(file, adapter, **{"blocks.9.attn.proj.u": torch.ones(48)})
    refuse("no such module", "blocks.9.attn.proj.u")
    pth(file, adapter, **{"blocks.0.attn.proj.u": torch.ones(48, dtype=torch.int64)})
    refuse("blocks.0.attn.proj.u: expected a float tensor, found int64")
    pth(file, adapter, **{"blocks.0.attn.qkv.u": torch.ones(144)})
    refuse("blocks.0.attn.qkv: expected lora_A and lora_B, found u")
    torch.save([1, 2], file)
    refuse("expected a state dict, found list")
    whole = pth(file, adapter).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refuse("cannot be read")
    file.write_bytes(b"")
    refuse("cannot be read")
    torch.save({}, file)
    refuse("zero sites found")


@pytest.mark.parametrize(
    ("owner", "way"),
    [
        ("blocks.0.attn.proj.parametrizations.weight.0", "call .*remove_parametrizations"),
        ("blocks.0.attn.proj.experts.1", "merge into the weights there"),
        ("patch_embed.proj", "merge into the weights there"),
        ("head", "merge into the weights there"),
    ],
)
def test_tensors_of_no_site_in_a_pth_file_say_what_to_do(tmp_path, tiny, owner, way):
    """Others' LoRA: a module behind the Linear, of a convolution, of the classifier."""
    pair = {f"{owner}.lora_A": torch.ones(2, 48), f"{owner}.lora_B": torch.ones(48, 2)}
    torch.save(pair, tmp_path / "a.pth")
    with pytest.raises(AdapterError, match=rf"{owner}\.lora_A: .* has no such site.*{way}"):
        import_adapter(tmp_path / "a.pth", tiny)


def test_a_head_beside_the_adapter_in_a_pth_file_is_refused(tmp_path, tiny):
    """It was dropped, and the backbone's answered."""
    pair = {"blocks.0.attn.proj.lora_A": torch.ones(2, 48)}
    pair |= {"blocks.0.attn.proj.lora_B": torch.ones(48, 2)}
    head = {"weight": torch.ones(CLASSES, 48), "bias": torch.ones(CLASSES)}
    torch.save({"model": pair, "head": head}, tmp_path / "a.pth")
    with pytest.raises(AdapterError, match=r"it has head beside model\. Parts of one model"):
        import_adapter(tmp_path / "a.pth", tiny)
    torch.save({"model": pair | {f"head.{k}": v for k, v in head.items()}}, tmp_path / "a.pth")
    assert import_adapter(tmp_path / "a.pth", tiny).head is not None


@pytest.mark.parametrize("whole", [False, True])
def test_tensors_of_peft_in_a_pth_file_say_what_they_are(tmp_path, whole):
    """And what the message advises can be done."""
    model = trained(lora())
    state = model.state_dict() if whole else peft.get_peft_model_state_dict(model)
    file = tmp_path / "a.pth"
    torch.save(state, file)
    said = ("of a model that PEFT wraps", "adapter_model.bin", "`extract_adapter()`")
    refused(file, "unknown tensor key", *said)
    refused(file, "unknown tensor key", *said, options=ImportOptions(prefix="base_model.model."))
    own = tiny_backbone(num_classes=CLASSES).model
    torch.save(own.state_dict(), tmp_path / "base.pth")
    base = BackboneSpec(TINY_MODEL, TINY_ARGS, checkpoint=tmp_path / "base.pth")
    with pytest.raises(BackboneError, match=r"does not fit.*PEFT wraps.*merge_and_unload"):
        extract_adapter(file, base)
    if not whole:
        model.save_pretrained(tmp_path / "a")
        (tmp_path / "a" / TENSOR_FILE).unlink()
        shutil.copy(file, tmp_path / "a" / "adapter_model.bin")
        assert len(imported_logits(tmp_path / "a")[0].sites) == 10
    torch.save(model.merge_and_unload().state_dict(), file)
    assert len(extract_adapter(file, base).sites) == 10


@pytest.mark.parametrize(
    ("config", "way"),
    [
        ({"architecture": "lora", "composition_mode": "add"}, "Merge it there (merge_adapter)"),
        ({"architecture": "lora", "composition_mode": "scale"}, "leaves the biases as they were"),
        ({"architecture": "lora", "use_dora": True}, "answers otherwise than the model that was"),
        ({"architecture": "lora", "use_gating": True}, "merges none of it"),
        ({"architecture": None, "mh_adapter": False}, "merges none of it"),
        ({"architecture": "prefix_tuning"}, "merges none of it"),
        ({"architecture": "reft"}, "merges none of it"),
        ({"architecture": "union", "configs": []}, "merges none of it"),
    ],
)
def test_an_adapter_of_adapterhub_says_what_it_is(tmp_path, config, way):
    """Its merge_adapter passes bottlenecks, prefixes and ReFT over without a word."""
    content = {"config": config, "model_type": "vit", "name": "x"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    refused(tmp_path, "expected PEFT's peft_type, found an adapter of AdapterHub", way)


# -- command line -------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments])


def test_the_command(tmp_path, copy):
    arguments = ("--model", TINY_MODEL, "--model-args", json.dumps(TINY_ARGS))
    names = [part for name in "abcdefg" for part in ("--class-name", name)]
    meaning = ("--problem-type", "multi_label_classification")
    done = run(copy(), tmp_path / "out", *arguments, *names, *meaning)
    assert done.exit_code == 0, done.output
    assert "10 sites" in done.output
    assert "7 classes" in done.output
    assert "base_sha256 is unknown" in done.output
    adapter = load_adapter(tmp_path / "out")
    assert adapter.config.base_sha256 is None
    assert adapter.config.class_names == tuple("abcdefg")
    assert adapter.config.problem_type == "multi_label_classification"
    assert run(copy(), tmp_path / "out", *arguments).exit_code == 1
    assert run(copy(), tmp_path / "out", *arguments, "--overwrite").exit_code == 0
    assert load_adapter(tmp_path / "out").config.problem_type is None


def test_the_command_with_a_checkpoint_and_hra(tmp_path, copy):
    backbone = tiny_backbone(num_classes=CLASSES)
    save_file(backbone.model.state_dict(), tmp_path / "base.safetensors")
    arguments = ("--model", TINY_MODEL, "--model-args", json.dumps(TINY_ARGS))
    done = run(
        copy("hra"), tmp_path / "out", *arguments, "--checkpoint", tmp_path / "base.safetensors"
    )
    assert done.exit_code == 0, done.output
    assert "unknown" not in done.output
    found = load_adapter(tmp_path / "out")
    assert found.config.base_sha256 == backbone.facts.sha256
    expected = import_adapter(copy("hra"), backbone)
    for name, site in expected.sites.items():
        assert np.array_equal(found.sites[name].lora_B, site.lora_B)


def test_help_needs_neither_torch_nor_timm_nor_peft():
    code = """
import sys
for name in ("torch", "timm", "peft"):
    sys.modules[name] = None
import hhdeploy.adapters.importers
from hhdeploy.cli.adapter_import import command
command(["-h"])
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "Convert SOURCE" in done.stdout


def test_importing_does_not_need_peft(copy, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert len(import_adapter(copy(), tiny_backbone(num_classes=CLASSES)).sites) == 10
