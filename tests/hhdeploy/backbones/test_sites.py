"""Which Linears carry sites, and what targets select."""

from __future__ import annotations

import pytest

from hhdeploy.backbones.sites import KINDS, linear_spec, select_sites, sites_of, split_target

LINEARS = tuple(
    linear_spec(path, out, in_)
    for path, out, in_ in (
        ("blocks.0.attn.qkv", 21, 5),
        ("blocks.0.attn.proj", 5, 7),
        ("blocks.0.mlp.fc1", 11, 5),
        ("blocks.0.mlp.fc2", 5, 11),
        ("blocks.1.attn.q_proj", 7, 5),
        ("blocks.1.attn.proj", 5, 7),
    )
)


def test_a_fused_qkv_has_three_sites_in_order():
    spec = linear_spec("layers.2.blocks.5.attn.qkv", 21, 5)
    assert [(s.name, s.kind, s.out, s.in_) for s in spec.sites] == [
        ("layers.2.blocks.5.attn.qkv.q", "q", 7, 5),
        ("layers.2.blocks.5.attn.qkv.k", "k", 7, 5),
        ("layers.2.blocks.5.attn.qkv.v", "v", 7, 5),
    ]
    assert (spec.path, spec.out, spec.in_) == ("layers.2.blocks.5.attn.qkv", 21, 5)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("blocks.0.attn.q_proj", "q"),
        ("blocks.0.attn.k_proj", "k"),
        ("blocks.0.attn.v_proj", "v"),
        ("blocks.0.attn.q", "q"),
        ("blocks.0.attn.k", "k"),
        ("blocks.0.attn.v", "v"),
        ("blocks.0.attn.proj", "proj"),
        ("blocks.0.mlp.fc1", "fc1"),
        ("blocks.0.mlp.fc2", "fc2"),
        ("layers.0.blocks.1.mlp.fc2", "fc2"),
    ],
)
def test_a_linear_of_its_own_is_its_site(path, kind):
    (site,) = linear_spec(path, 11, 5).sites
    assert (site.name, site.kind, site.out, site.in_) == (path, kind, 11, 5)


@pytest.mark.parametrize(
    "path",
    [
        "patch_embed.proj",
        "attn_pool.proj",
        "attn_pool.qkv",
        "attn_pool.mlp.fc1",
        "vision_model.head.mlp.fc1",
        "pooler.dense",
        "head",
        "head.fc",
        "proj",
        "blocks.0.mlp.fc1_g",
        "blocks.0.attn.kv",
        "blocks.0.ffns.0.fc1",
        "blocks.0.cross_attn.proj",
        "",
    ],
)
def test_what_no_kind_stands_for(path):
    assert {site.kind for site in linear_spec(path, 12, 5).sites} == {""}


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("vit.layers.3.attention.q_proj", "q"),
        ("vit.layers.3.attention.o_proj", "proj"),
        ("vit.encoder.layer.3.attention.attention.key", "k"),
        ("vit.encoder.layer.3.attention.output.dense", "proj"),
        ("vit.encoder.layer.3.intermediate.dense", "fc1"),
        ("vit.encoder.layer.3.output.dense", "fc2"),
        ("swin.encoder.layers.0.blocks.1.attention.self.value", "v"),
        ("vision_model.encoder.layers.3.self_attn.out_proj", "proj"),
        ("encoder.layers.encoder_layer_3.self_attention.out_proj", "proj"),
        ("encoder.layers.encoder_layer_3.mlp.0", "fc1"),
        ("encoder.layers.encoder_layer_3.mlp.3", "fc2"),
        ("visual.transformer.resblocks.3.attn.out_proj", "proj"),
        ("visual.transformer.resblocks.3.mlp.c_fc", "fc1"),
        ("visual.transformer.resblocks.3.mlp.c_proj", "fc2"),
        ("transformer.encoder.layer.3.attn.query", "q"),
        ("transformer.encoder.layer.3.attn.out", "proj"),
        ("transformer.encoder.layer.3.ffn.fc2", "fc2"),
        ("encoder.layers.3.linear1", "fc1"),
    ],
)
def test_a_kind_is_an_alias_for_the_names_of_every_library(path, kind):
    (site,) = linear_spec(path, 11, 5).sites
    assert (site.name, site.kind) == (path, kind)


@pytest.mark.parametrize(
    ("path", "out", "thirds"),
    [("attn.qkv", 22, True), ("attn.qkv", 21, False), ("in_proj", 42, True)],
)
def test_a_qkv_that_is_not_three_equal_parts_is_one_site(path, out, thirds):
    """``in_proj`` has the rows of an MLP, too, where it is no MultiheadAttention's."""
    (site,) = linear_spec(f"blocks.0.{path}", out, 6, thirds=thirds).sites
    assert (site.name, site.kind, site.out) == (f"blocks.0.{path}", "", out)


def test_a_packed_weight_has_three_sites():
    spec = linear_spec("encoder.layers.0.self_attn.in_proj", 21, 7)
    assert [(s.name.rpartition(".")[2], s.kind, s.out) for s in spec.sites] == [
        ("q", "q", 7),
        ("k", "k", 7),
        ("v", "v", 7),
    ]


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("blocks.0.attn.qkv", [f"blocks.0.attn.qkv.{p}" for p in "qkv"]),
        ("q_proj", ["blocks.1.attn.q_proj"]),
        (r"blocks\.[01]\.mlp\..*", ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]),
        (r".*\.qkv\.[qv]", ["blocks.0.attn.qkv.q", "blocks.0.attn.qkv.v"]),
        ("roj", []),
        ("blocks.[", []),
    ],
)
def test_targets_as_peft_has_them(target, names):
    assert [s.name for s in select_sites(LINEARS, [target])[target]] == names


def test_targets_are_kinds_or_full_names():
    chosen = select_sites(LINEARS, ["proj", "q", "blocks.0.mlp.fc1", "gate"])
    assert {k: [s.name for s in v] for k, v in chosen.items()} == {
        "proj": ["blocks.0.attn.proj", "blocks.1.attn.proj"],
        "q": ["blocks.0.attn.qkv.q", "blocks.1.attn.q_proj"],
        "blocks.0.mlp.fc1": ["blocks.0.mlp.fc1"],
        "gate": [],
    }


def test_sites_keep_the_order_of_the_linears():
    assert list(sites_of(LINEARS)) == [
        "blocks.0.attn.qkv.q",
        "blocks.0.attn.qkv.k",
        "blocks.0.attn.qkv.v",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "blocks.1.attn.q_proj",
        "blocks.1.attn.proj",
    ]
    assert {s.kind for s in sites_of(LINEARS).values()} == set(KINDS)


def test_split_target():
    assert split_target("fc1") == ("fc1", "additive")
    assert split_target("proj:additive") == ("proj", "additive")
    assert split_target("proj:sequential") == ("proj", "sequential")
    with pytest.raises(ValueError, match=r"additive, sequential, found 'parallel'"):
        split_target("proj:parallel")
