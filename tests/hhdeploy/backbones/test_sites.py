"""Which Linears carry sites, and what targets select."""

from __future__ import annotations

import pytest

from hhdeploy.backbones.sites import KINDS, linear_spec, select_sites, sites_of, split_target

LINEARS = tuple(
    spec
    for path, out, in_ in (
        ("blocks.0.attn.qkv", 21, 5),
        ("blocks.0.attn.proj", 5, 7),
        ("blocks.0.mlp.fc1", 11, 5),
        ("blocks.0.mlp.fc2", 5, 11),
        ("blocks.1.attn.q_proj", 7, 5),
        ("blocks.1.attn.proj", 5, 7),
    )
    if (spec := linear_spec(path, out, in_))
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
def test_what_is_never_a_target(path):
    assert linear_spec(path, 12, 5) is None


def test_a_qkv_that_is_not_three_equal_parts_is_no_target():
    assert linear_spec("blocks.0.attn.qkv", 22, 5) is None


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
