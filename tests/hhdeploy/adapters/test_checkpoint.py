"""`extract_adapter`: a fine-tuned checkpoint as the difference to its backbone."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from hhdeploy.adapters.applying import logits_with, parameters_with
from hhdeploy.adapters.importers import ImportOptions, difference
from hhdeploy.adapters.importers.checkpoint import extract_adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.errors import AdapterError, BackboneError, OptionError
from hhdeploy.files.writing import sha256_of, sha256_of_bytes
from tests.support import MISTAKE, TINY_ARGS, TINY_MODEL, assert_parity, images, tiny_backbone

HF = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 1}
HF |= {"num_attention_heads": 3, "intermediate_size": 80, "num_labels": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The backbone's own checkpoint and its state."""
    file = tmp_path_factory.mktemp("base") / "base.pth"
    torch.save(tiny_backbone(num_classes=5).model.state_dict(), file)
    return BackboneSpec(TINY_MODEL, {**TINY_ARGS}, checkpoint=file)


def tuned(base, change, classes=7):
    """A state that a fine-tuning may leave: ``change`` of it, and another classifier."""
    state = torch.load(base.checkpoint, weights_only=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        change(state, generator)
    state["head.weight"] = torch.randn(classes, 48, generator=generator) * 0.2
    state["head.bias"] = torch.randn(classes, generator=generator)
    return state


def low_rank(state, generator, rank=3):
    """What a merged LoRA leaves, in float32."""
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"):
        out, into = state[name].shape
        b = torch.randn(out, rank, generator=generator) * 0.1
        state[name] += b @ (torch.randn(rank, into, generator=generator) * 0.1)


def everything(state, generator):
    for name, value in state.items():
        state[name] = value + torch.randn(value.shape, generator=generator) * 0.01


def logits(base, file):
    backbone = load_backbone(replace(base, checkpoint=file))
    return logits_with(backbone, {}, images(2))


def check(base, file, adapter, precision="float32"):
    backbone = load_backbone(base)
    found = logits_with(backbone, parameters_with(backbone, adapter), images(2))
    assert_parity(logits(base, file), found, "algebra", precision)
    bare = parameters_with(backbone, replace(adapter, sites={}, values={}))
    without = logits_with(backbone, bare, images(2))
    assert np.abs(without - found).max() > MISTAKE * np.ptp(found)


@pytest.mark.parametrize("change", [low_rank, everything])
def test_differences_are_no_model(tmp_path, base, change):
    """A task vector has the names and the shapes of the model; it came in as its weights."""
    before = torch.load(base.checkpoint, weights_only=True)
    after = tuned(base, change, classes=5)
    torch.save({name: after[name] - value for name, value in before.items()}, tmp_path / "x.pth")
    with pytest.raises(AdapterError, match=r"expected the weights of a model, found .*differences"):
        extract_adapter(tmp_path / "x.pth", base)


@pytest.mark.parametrize("wrapper", ["plain", "ema", "ddp", "parameters"])
def test_a_merged_lora_is_found_again(tmp_path, base, wrapper):
    state = tuned(base, low_rank)
    stored = {
        "plain": state,
        "ema": {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state},
        "ddp": {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        "parameters": OrderedDict((k, torch.nn.Parameter(v)) for k, v in state.items()),
    }[wrapper]
    torch.save(stored, tmp_path / "tuned.pth")
    adapter = extract_adapter(tmp_path / "tuned.pth", base)
    assert not adapter.config.fold_only
    sites = {"blocks.1.mlp.fc2", *(f"blocks.0.attn.qkv.{part}" for part in "qkv")}
    assert set(adapter.sites) == sites
    assert {t.lora_A.shape[0] for t in adapter.sites.values()} == {3}
    assert adapter.config.num_classes == 7
    assert adapter.config.base_sha256 == load_backbone(base).facts.sha256
    check(base, tmp_path / "tuned.pth", adapter)


def test_a_full_fine_tuning_is_folded_or_compressed(tmp_path, base):
    file = tmp_path / "tuned.pth"
    torch.save(tuned(base, everything), file)
    adapter = extract_adapter(file, base)
    assert adapter.config.fold_only
    check(base, file, adapter)
    with pytest.raises(AdapterError, match="cannot be side branches at any rank"):
        extract_adapter(file, base, ImportOptions(compress_rank=8))


def test_a_checkpoint_in_half_precision(tmp_path, base):
    """Rounding changes every weight: that is not a low rank."""
    file = tmp_path / "tuned.pth"
    torch.save({k: v.bfloat16() for k, v in tuned(base, low_rank).items()}, file)
    adapter = extract_adapter(file, base)
    assert adapter.config.fold_only
    check(base, file, adapter)


def test_multiplied_rows_and_columns(tmp_path, base):
    def scale(state, generator):
        rows = 1 + 0.3 * torch.randn(144, generator=generator)
        state["blocks.0.attn.qkv.weight"] *= rows[:, None]
        state["blocks.0.attn.qkv.bias"] *= rows
        columns = 1 + 0.3 * torch.randn(192, generator=generator)
        state["blocks.1.mlp.fc2.weight"] *= columns

    file = tmp_path / "tuned.pth"
    torch.save(tuned(base, scale), file)
    adapter = extract_adapter(file, base)
    assert not adapter.config.fold_only
    assert set(adapter.sites["blocks.1.mlp.fc2"].parts) == {"s_in"}
    assert set(adapter.sites["blocks.0.attn.qkv.k"].parts) == {"s_out", "db"}
    check(base, file, adapter)


# Sizes that nothing else has: 141 x 47, 101 x 47 and 47 x 101.
PRIME = {**TINY_ARGS, "embed_dim": 47, "num_heads": 1, "mlp_ratio": 2.16}
DORA = {"attn.qkv": 2, "mlp.fc1": 3, "mlp.fc2": 5}


@pytest.fixture(scope="module")
def prime(tmp_path_factory):
    file = tmp_path_factory.mktemp("prime") / "base.pth"
    torch.save(tiny_backbone(**PRIME, num_classes=5).model.state_dict(), file)
    return BackboneSpec(TINY_MODEL, PRIME, checkpoint=file)


def merged_dora(state, generator, spread=0.4):
    """m (W + B A) / |W + B A|, in float32 as trainings merge it; some rows have no change."""
    for name, rank in DORA.items():
        weight = state[f"blocks.0.{name}.weight"]
        out, into = weight.shape
        b = torch.randn(out, rank, generator=generator) * (torch.arange(out) % 7 > 0)[:, None]
        moved = weight + b @ torch.randn(rank, into, generator=generator) * 0.02
        length = weight.norm(dim=1, keepdim=True)
        magnitude = length * (1 + spread * torch.rand(out, 1, generator=generator))
        weight.copy_(magnitude * moved / moved.norm(dim=1, keepdim=True))


@pytest.fixture
def dora(tmp_path, prime):
    """A fine-tuned checkpoint with a DoRA in its weights."""
    state = tuned(prime, merged_dora, classes=5)
    for leaf in ("weight", "bias"):
        state[f"head.{leaf}"] = torch.load(prime.checkpoint, weights_only=True)[f"head.{leaf}"]
    torch.save(state, tmp_path / "tuned.pth")
    return tmp_path / "tuned.pth"


def test_a_merged_dora_is_found_again(prime, dora):
    adapter = extract_adapter(dora, prime)
    assert not adapter.config.fold_only
    found = {name: (set(site.parts), len(site.lora_A)) for name, site in adapter.sites.items()}
    assert found == {
        **{f"blocks.0.attn.qkv.{part}": ({"s_out"}, DORA["attn.qkv"]) for part in "qkv"},
        **{f"blocks.0.{name}": ({"s_out"}, DORA[name]) for name in ("mlp.fc1", "mlp.fc2")},
    }
    assert min(np.ptp(site.s_out) for site in adapter.sites.values()) > 0.1
    check(prime, dora, adapter)


def test_a_wrong_scale_is_none(prime, dora, monkeypatch):
    """One row's costs a rank and stays exact; all rows' leave no low rank, and nothing live."""
    right = difference._row_scale

    def one(change, rank, noise):
        scale = right(change, rank, noise)
        return None if scale is None else scale * (1 + 0.01 * (np.arange(len(scale)) == 3))

    monkeypatch.setattr(difference, "_row_scale", one)
    adapter = extract_adapter(dora, prime)
    assert len(adapter.sites["blocks.0.mlp.fc2"].lora_A) == DORA["mlp.fc2"] + 1
    check(prime, dora, adapter)

    def all_rows(change, rank, noise):
        scale = right(change, rank, noise)
        return None if scale is None else scale * 1.01

    monkeypatch.setattr(difference, "_row_scale", all_rows)
    adapter = extract_adapter(dora, prime)
    assert adapter.config.fold_only
    assert not any(site.s_out is not None for site in adapter.sites.values())
    check(prime, dora, adapter)


@pytest.mark.parametrize(("out", "into"), [(53, 31), (541, 29), (37, 523)])
def test_multiplied_rows_beside_any_product(out, into):
    """What spans the product is said nowhere; a row that is zero has no scale."""
    random = np.random.default_rng(2)
    before = random.standard_normal((out, into)).astype(np.float32).astype(np.float64)
    before[7] = 0.0
    scale = random.uniform(0.2, 3.0, out)
    product = random.standard_normal((out, 4)) @ random.standard_normal((4, into))
    exact = scale[:, None] * before + product
    after = exact.astype(np.float32).astype(np.float64)
    found = difference._site(difference.WeightChange(before, after), ())
    assert found is not None
    assert found["lora_A"].shape == (4, into)
    expected = np.where(np.arange(out) == 7, 1.0, scale)
    np.testing.assert_array_max_ulp(found["s_out"], expected.astype(np.float32), maxulp=2)
    again = found["s_out"][:, None] * before + found["lora_B"] @ found["lora_A"]
    # Less than float32's step at 8; values go to 10 and more.
    assert np.abs(again - exact).max() < np.spacing(np.float32(8))
    noisy = after + 1e-4 * random.standard_normal(after.shape)
    assert difference._site(difference.WeightChange(before, noisy), ()) is None


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_rounding_alone_is_no_change(tmp_path, base, low):
    """The rounding of every weight came in as an adapter that can only be folded."""
    state = torch.load(base.checkpoint, weights_only=True)
    file = tmp_path / "saved.pth"
    torch.save({name: value.to(low) for name, value in state.items()}, file)
    name = str(low).removeprefix("torch.")
    with pytest.raises(AdapterError, match=f"is the backbone's, rounded to {name}: .* no change"):
        extract_adapter(file, base)
    state["head.bias"] = state["head.bias"] + 1
    torch.save({name: value.to(low) for name, value in state.items()}, file)
    assert extract_adapter(file, base).head is not None, "more than rounding"


def test_what_is_no_fine_tuning_is_refused(tmp_path, base):
    with pytest.raises(AdapterError, match="every parameter is the backbone's"):
        extract_adapter(base.checkpoint, base)
    state = tuned(base, low_rank)
    del state["norm.weight"]
    torch.save(state, tmp_path / "tuned.pth")
    with pytest.raises(BackboneError, match=r"missing: norm\.weight"):
        extract_adapter(tmp_path / "tuned.pth", base)
    with pytest.raises(AdapterError, match="is a directory"):
        extract_adapter(tmp_path, base)
    with pytest.raises(OptionError, match="`prefix`"):
        extract_adapter(base.checkpoint, base, ImportOptions(prefix="net."))


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_directory_of_transformers(tmp_path, size):
    """Whole or divided; its own processor counts, not one that lies beside it."""
    torch.manual_seed(3)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**HF))
    model.save_pretrained(tmp_path / "base")
    for parameter in model.parameters():
        parameter.data += 0.01
    tuned = tmp_path / "tuned"
    model.save_pretrained(tuned, max_shard_size=size)
    processor = {"image_mean": [0.25] * 3, "image_std": [0.5] * 3, "size": 32}
    processor["image_processor_type"] = "ViTImageProcessor"
    (tuned / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "preprocessor_config.json").write_text("of somebody else")
    spec = BackboneSpec(f"transformers:{tmp_path / 'base'}")
    config = extract_adapter(tuned, spec).config
    told = config.extra["imported_from"]
    files = sorted(tuned.glob("*.safetensors"))
    digests = [sha256_of(file) for file in files]
    assert (len(files) > 1) == (size != "5GB")
    if len(files) == 1:
        assert (told["file"], told["sha256"]) == ("model.safetensors", digests[0])
    else:
        assert told["file"] == "model.safetensors.index.json"
        assert told["sha256"] == sha256_of_bytes(" ".join(digests).encode())
    assert config.preprocess is not None and config.preprocess.mean == (0.25,) * 3
    from_file = extract_adapter(tuned / told["file"], spec)
    assert from_file.config.extra["imported_from"]["sha256"] == told["sha256"]


@pytest.mark.parametrize(
    ("more", "as_model"),
    [
        ("vit.layers.0.attention.q_proj.loras.task.lora_A", False),
        ("vit.layers.0.output_adapters.task.down.weight", False),
        ("vit.layers.0.attention.k_proj.scale", False),
        ("vit.prompts", True),
        ("decoder.weight", True),
    ],
)
def test_a_directory_of_transformers_with_more_than_the_model(tmp_path, more, as_model):
    """In a block it is what the answers are made of, beside them perhaps of another task; of a
    fine-tuned model nobody knows, be it a directory or a file."""
    torch.manual_seed(3)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**HF))
    model.save_pretrained(tmp_path / "base")
    state = {n: p.detach() + 0.01 for n, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "tuned", state_dict=state)
    file = tmp_path / "tuned" / "model.safetensors"
    save_file({**state, more: torch.ones(4)}, file, {"format": "pt"})
    spec = BackboneSpec(f"transformers:{tmp_path / 'base'}")
    for tuned in (tmp_path / "tuned", file):
        with pytest.raises(BackboneError, match=f"unexpected: {more}.* these beside it"):
            extract_adapter(tuned, spec)
    whole = BackboneSpec(f"transformers:{tmp_path / 'tuned'}")
    if as_model:
        assert any("has no place for, left out" in note for note in load_backbone(whole).notes)
    else:
        with pytest.raises(BackboneError, match=f"unexpected: {more}.* these beside it"):
            load_backbone(whole)


def test_the_transform_beside_a_checkpoint_of_timm(tmp_path, base):
    torch.save(tuned(base, low_rank), tmp_path / "tuned.pth")
    config = {"architecture": TINY_MODEL, "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.3] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    adapter = extract_adapter(tmp_path / "tuned.pth", base)
    assert adapter.config.preprocess.mean == (0.1,) * 3
    assert not adapter.config.extra["imported_from"]["preprocess_assumed"]
    (tmp_path / "config.json").unlink()
    adapter = extract_adapter(tmp_path / "tuned.pth", base)
    assert adapter.config.extra["imported_from"]["preprocess_assumed"]
