"""RLRR and ARC files against modules that are built from the papers' equations."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from hhdeploy.adapters.applying import logits_with, parameters_with
from hhdeploy.adapters.importers import ImportOptions, import_adapter
from hhdeploy.errors import AdapterError
from tests.support import (
    assert_caught,
    assert_parity,
    images,
    logits_of,
    random_adapter,
    tiny_backbone,
)
from tests.workshop import ROOT

CLASSES = 6
EXAMPLE = ROOT / "docs" / "key-map.json"


class Rlrr(nn.Module):
    """x (W + W ∘ (line col))ᵀ + b + shift."""

    def __init__(self, weight, bias, generator):
        super().__init__()
        out, into = weight.shape
        self.weight, self.bias = weight, bias
        self.col = 0.3 * torch.randn(1, into, generator=generator)
        self.line = 0.3 * torch.randn(out, 1, generator=generator)
        self.shift = 0.3 * torch.randn(1, out, generator=generator)

    def forward(self, x):
        product = self.line.to(x) @ self.col.to(x)
        weight = self.weight.to(x) * (1 + product)
        return x @ weight.T + self.bias.to(x) + self.shift.to(x)


class Ssf(nn.Module):
    """A norm's output, scaled and shifted."""

    def __init__(self, inner, width, generator):
        super().__init__()
        self.inner = inner
        self.scale = 1 + 0.2 * torch.randn(width, generator=generator)
        self.shift = 0.2 * torch.randn(width, generator=generator)

    def forward(self, x):
        y = self.inner(x)
        shape = (1, -1, 1, 1) if y.ndim == 4 else (-1,)
        return y * self.scale.to(y).view(shape) + self.shift.to(y).view(shape)


class Arc(nn.Module):
    """h + h U diag(s) Uᵀ + b of a norm's output h, as row vectors."""

    def __init__(self, norm, u, generator):
        super().__init__()
        self.norm, self.u = norm, u
        self.s = 0.5 * torch.randn(1, u.shape[1], generator=generator)
        self.b = 0.3 * torch.randn(len(u), generator=generator)

    def forward(self, x):
        h, u = self.norm(x), self.u.to(x)
        return h + (h @ (u * self.s.to(x))) @ u.T + self.b.to(x)


class Fused(nn.Module):
    """Query, key and value of three modules, side by side."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], -1)


def new_head(model, state, key, generator):
    model.head = nn.Linear(48, CLASSES)
    with torch.no_grad():
        for name, p in model.head.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            state[f"{key}.{name}"] = p.detach().clone()


def rlrr(tmp_path, backbone):
    """A file as RLRR saves it, and the trained model's logits."""
    g = torch.Generator().manual_seed(1)
    model = copy.deepcopy(backbone.model)
    state = {}

    def linear(key, weight, bias):
        made = Rlrr(weight.detach(), bias.detach(), g)
        for name, value in (
            ("scale_col", made.col),
            ("scale_line", made.line),
            ("shift_bias", made.shift),
        ):
            state[f"{key}.{name}"] = value
        return made

    def ssf(key, place, inner):
        made = Ssf(inner, 48, g)
        state[f"{key}.ssf_scale_{place}"], state[f"{key}.ssf_shift_{place}"] = (
            made.scale,
            made.shift,
        )
        return made

    for i, block in enumerate(model.blocks):
        key = f"transformer.encoder.layer.{i}"
        qkv = block.attn.qkv
        thirds = zip(("query", "key", "value"), qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True)
        block.attn.qkv = Fused([linear(f"{key}.attn.{n}", w, b) for n, w, b in thirds])
        proj, fc1, fc2 = block.attn.proj, block.mlp.fc1, block.mlp.fc2
        block.attn.proj = linear(f"{key}.attn.out", proj.weight, proj.bias)
        block.mlp.fc1 = linear(f"{key}.ffn.fc1", fc1.weight, fc1.bias)
        block.mlp.fc2 = linear(f"{key}.ffn.fc2", fc2.weight, fc2.bias)
        block.norm1 = ssf(key, "attn_norm", block.norm1)
        block.norm2 = ssf(key, "ffn_norm", block.norm2)
    model.norm = ssf("transformer.encoder", "enc_norm", model.norm)
    model.patch_embed.proj = ssf("transformer.embeddings", "patch", model.patch_embed.proj)
    new_head(model, state, "head", g)
    torch.save(state, tmp_path / "rlrr.pth")
    return tmp_path / "rlrr.pth", logits_of(model, images(3))


def arc(tmp_path, backbone, second_naming):
    """The whole state dict that ARC saves, in either naming, and the trained model's logits."""
    g = torch.Generator().manual_seed(2)
    model = copy.deepcopy(backbone.model)
    state = {}
    shared = {place: torch.randn(48, 5, generator=g) * 0.2 for place in ("att", "mlp")}
    for place, u in shared.items():
        key = f"left_u_{place}" if second_naming else f"{place}_down_projection"
        state[f"transformer.{key}"] = u
    for i, block in enumerate(model.blocks):
        key = f"transformer.layer.{i}"
        for place, norm in (("att", "norm1"), ("mlp", "norm2")):
            made = Arc(getattr(block, norm), shared[place], g)
            setattr(block, norm, made)
            names = (
                (f"{place}_scale", f"{place}_scale_bias")
                if second_naming
                else (f"{place}_adapter.adapter_rescale", f"{place}_adapter.adapter_bias")
            )
            state |= {f"{key}.{n}": v for n, v in zip(names, (made.s, made.b), strict=True)}
        weights = backbone.model.blocks[i].attn.qkv.weight.chunk(3)
        for name, weight in zip(("query", "key", "value"), weights, strict=True):
            state[f"{key}.attention.{name}.weight"] = weight.detach().clone()
        inner = backbone.model.blocks[i]
        state[f"{key}.attention.value.bias"] = inner.attn.qkv.bias.chunk(3)[2].detach().clone()
        state[f"{key}.mlp_norm.weight"] = inner.norm2.weight.detach().clone()
    state["transformer.embeddings.position_embeddings"] = backbone.model.pos_embed.detach().clone()
    new_head(model, state, "head_mlp.head", g)
    torch.save(state, tmp_path / "arc.pth")
    return tmp_path / "arc.pth", logits_of(model, images(3))


def imported(file, backbone):
    adapter = import_adapter(file, backbone)
    return adapter, logits_with(backbone, parameters_with(backbone, adapter), images(3))


def test_rlrr(tmp_path):
    backbone = tiny_backbone()
    file, expected = rlrr(tmp_path, backbone)
    adapter, found = imported(file, backbone)
    assert_parity(expected, found, "algebra", "float32")
    assert adapter.config.fold_only
    assert adapter.config.preprocess.mean == (0.5, 0.5, 0.5)
    assert (adapter.config.preprocess.crop_mode, adapter.config.preprocess.crop_pct) == (
        "squash",
        1,
    )
    state = torch.load(file, weights_only=True)
    other = {"layer.0.": "layer.1.", "layer.1.": "layer.0."}
    swapped = {
        k: state[next((k.replace(a, b) for a, b in other.items() if a in k), k)] for k in state
    }
    torch.save(swapped, file)
    assert_caught(expected, imported(file, backbone)[1], "algebra", "float32")


@pytest.mark.parametrize("second_naming", [False, True])
def test_arc(tmp_path, second_naming):
    backbone = tiny_backbone()
    file, expected = arc(tmp_path, backbone, second_naming)
    adapter, found = imported(file, backbone)
    assert_parity(expected, found, "algebra", "float32")
    assert not adapter.config.fold_only
    assert adapter.config.target_modules == ("q", "k", "v", "fc1")
    assert {t.lora_A.shape[0] for t in adapter.sites.values()} == {5}
    assert not adapter.config.extra["imported_from"]["preprocess_assumed"]


@pytest.mark.parametrize(
    ("method", "lost", "said"),
    [
        (rlrr, "layer.1.", "in all 2 blocks of vit.*, found no .* of block 1"),
        (rlrr, "layer.0.ffn.fc2.", r"found no ffn\.fc2 of block 0\. Without them"),
        (rlrr, "layer.1.ssf_scale_attn|layer.1.ssf_shift_attn", "found no attn_norm of block 1"),
        (arc, "layer.1.", "found no att of block 1, mlp of block 1"),
        (arc, "layer.0.att_", "found no att of block 0"),
    ],
)
def test_what_one_block_has_all_have(tmp_path, method, lost, said):
    backbone = tiny_backbone()
    file, _ = method(tmp_path, backbone, *([False] if method is arc else []))
    state = torch.load(file, weights_only=True)
    kept = {
        k: v
        for k, v in state.items()
        if not any(part in k for part in lost.split("|")) or not re.search("adapter|scale|shift", k)
    }
    assert 0 < len(kept) < len(state)
    torch.save(kept, file)
    with pytest.raises(AdapterError, match=said):
        import_adapter(file, backbone)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("head", "the file has no head, which RLRR trains"),
        ("ssf_", "no attn_norm, ffn_norm, enc_norm, patch, "),
        ("ssf_scale_enc|ssf_shift_enc", "no enc_norm, "),
    ],
)
def test_what_a_file_has_nowhere_is_said(tmp_path, lost, said):
    backbone = tiny_backbone()
    file, _ = rlrr(tmp_path, backbone)
    whole = torch.load(file, weights_only=True)
    assert "assumed" not in import_adapter(file, backbone).config.extra["imported_from"]
    kept = {k: v for k, v in whole.items() if not any(part in k for part in lost.split("|"))}
    torch.save(kept, file)
    (line,) = import_adapter(file, backbone).config.extra["imported_from"]["assumed"]
    assert said in line
    assert line.endswith("taken as untrained")


def test_a_key_map(tmp_path, tiny):
    """An HTA file of rows under other names, by docs/key-map.json."""
    adapter = random_adapter(tiny.facts, targets=("q", "proj"), r=2, classes=4)
    names = {"u": "right", "v": "left", "d": "diagonal", "lora_A": "down", "lora_B": "up"}
    state = {"step": torch.ones(1)}
    for site, tensors in adapter.sites.items():
        block, kind = site.split(".")[1], site.split(".")[-1]
        for ours, theirs in names.items():
            value = torch.from_numpy(getattr(tensors, ours))
            state[f"encoder.{block}.{kind}_{theirs}"] = (
                value.T if value.ndim == 2 else value
            ).contiguous()
    state["classifier.w"] = torch.from_numpy(adapter.head.weight).T.contiguous()
    state["classifier.b"] = torch.from_numpy(adapter.head.bias)
    torch.save(state, tmp_path / "hta.pth")
    found = import_adapter(tmp_path / "hta.pth", tiny, ImportOptions(key_map=EXAMPLE))
    assert found.sites.keys() == adapter.sites.keys()
    for site, tensors in adapter.sites.items():
        for name in names:
            assert np.array_equal(getattr(found.sites[site], name), getattr(tensors, name)), name
    assert np.array_equal(found.head.weight, adapter.head.weight)
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + EXAMPLE.read_bytes())
    marked = ImportOptions(key_map=tmp_path / "marked.json")
    assert import_adapter(tmp_path / "hta.pth", tiny, marked).sites.keys() == adapter.sites.keys()
    state["encoder.0.odd"] = torch.ones(1)
    torch.save(state, tmp_path / "hta.pth")
    with pytest.raises(AdapterError, match=r"encoder\.0\.odd: no rule of .* matches it"):
        import_adapter(tmp_path / "hta.pth", tiny, ImportOptions(key_map=EXAMPLE))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read"),
        pytest.param("[" * 100_000, "cannot be read", id="deep"),
        ("[]", "expected an object with rules"),
        ('{"rules": []}', "expected a list of rules"),
        ('{"rules": [{"to": "a.u"}]}', "expected rules with key"),
        ('{"rules": [{"key": "a"}]}', "either to or drop"),
        ('{"rules": [{"key": "(", "to": "a.u"}]}', "is no expression"),
        ('{"rules": [{"key": ".*", "to": "a\\\\3.u"}]}', "does not fit its key"),
        ('{"rules": [{"key": ".*", "to": "a.u"}]}', "both mean a.u"),
    ],
)
def test_key_maps_that_are_refused(tmp_path, tiny, content, message):
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x.pth")
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(AdapterError, match=message):
        import_adapter(tmp_path / "x.pth", tiny, ImportOptions(key_map=tmp_path / "map.json"))


def test_what_is_refused(tmp_path):
    backbone = tiny_backbone()
    file, _ = rlrr(tmp_path, backbone)
    whole = torch.load(file, weights_only=True)

    def refuse(message, options=ImportOptions(), **changes):  # noqa: B008
        state = {k: v for k, v in (whole | changes).items() if v is not None}
        torch.save(state, file)
        with pytest.raises(AdapterError, match=message):
            import_adapter(file, backbone, options)

    key = "transformer.encoder.layer.1.attn.out"
    refuse("found no scale_col", **{f"{key}.scale_col": None})
    refuse("do not fit a Linear", **{f"{key}.scale_col": torch.ones(1, 47)})
    refuse(
        "block 9 has a proj",
        **{
            f"{key.replace('1', '9')}.{n}": torch.ones(1)
            for n in ("scale_col", "scale_line", "shift_bias")
        },
    )
    refuse("expected a key of RLRR", odd=torch.ones(1))
    refuse(
        "with 47 values",
        **{
            "transformer.encoder.ssf_scale_enc_norm": torch.ones(47),
            "transformer.encoder.ssf_shift_enc_norm": torch.ones(47),
        },
    )
    refuse("`checkpoint`", ImportOptions(weights_known=False))
    with pytest.raises(AdapterError, match=r"parameter blocks\.0\.attn\.qkv\.bias"):
        import_adapter(rlrr(tmp_path, backbone)[0], tiny_backbone(qkv_bias=False))
    file, _ = arc(tmp_path, backbone, False)
    whole = torch.load(file, weights_only=True)
    refuse(
        "trained on other weights",
        **{"transformer.layer.0.attention.key.weight": torch.ones(48, 48)},
    )
    for key, value in (
        ("transformer.layer.0.attention.query.bias", torch.ones(48)),
        ("transformer.layer.1.mlp_norm.weight", torch.ones(48)),
        ("optimizer.momentum", torch.ones(3)),
    ):
        refuse(rf"{key}: expected keys of ARC, .* nothing reads these", **{key: value})
    refuse("expected transformer.mlp_down_projection", **{"transformer.mlp_down_projection": None})
