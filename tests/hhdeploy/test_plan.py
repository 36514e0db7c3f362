"""Adapters against a backbone and against each other; names; reserved room."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.adapters.checks import check, check_name
from hhdeploy.adapters.format import Adapter, SiteTensors
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.sites import linear_spec
from hhdeploy.errors import AdapterError, OptionError, PlanError
from hhdeploy.plan import Reserve, plan_branches
from hhdeploy.preprocess import Preprocess
from tests.support import random_adapter

# Unequal primes, no torch: the facts of a model that does not exist.
DIM, HIDDEN, CLASSES = 13, 17, 5


def facts_of(depth=2, classes=CLASSES):
    shapes = (
        ("attn.qkv", 3 * DIM, DIM),
        ("attn.proj", DIM, DIM),
        ("mlp.fc1", HIDDEN, DIM),
        ("mlp.fc2", DIM, HIDDEN),
    )
    linears = tuple(
        spec
        for i in range(depth)
        for name, out, in_ in shapes
        if (spec := linear_spec(f"blocks.{i}.{name}", out, in_))
    )
    preprocess = Preprocess((3, 32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return BackboneFacts("vit_x.tag", {}, "ab" * 32, linears, "head", DIM, classes, preprocess)


FACTS = facts_of()


def adapter_of(**changes):
    """A valid adapter whose configuration has ``changes``; its source is ``somewhere``."""
    adapter = replace(random_adapter(FACTS), source="somewhere")
    return replace(adapter, config=replace(adapter.config, **changes))


def refused(adapter, *parts, facts=FACTS, error=AdapterError):
    with pytest.raises(error) as caught:
        check("mine", adapter, facts)
    for part in ("somewhere", *parts):
        assert part in str(caught.value), f"{part!r} is not in {caught.value!s}"


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "digits", "v1.2_final-x", "9lives", "x" * 128])
def test_good_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-x", "_x", "a/b", "a b", "a\n", "../a", "é", "x" * 129, "a=b"]
)
def test_bad_names(name):
    with pytest.raises(PlanError, match=r"(?s)expected letters, digits.*such a name\.$") as caught:
        check_name(name)
    assert "=DIR" not in str(caught.value)  # also who uploads an adapter reads this


def test_the_backbone_s_name_is_reserved():
    with pytest.raises(PlanError, match="'backbone' is reserved"):
        check_name("backbone")
    with pytest.raises(PlanError, match="reserved"):
        plan_branches(FACTS, {"backbone": random_adapter(FACTS)}, Reserve())


# -- one adapter --------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["vit_x", "vit_x.tag"])
def test_good_adapters(base):
    check("mine", adapter_of(base_model=base), FACTS)
    check("mine", adapter_of(base_sha256=None), FACTS)
    check("mine", adapter_of(preprocess=None), FACTS)
    sequential = random_adapter(FACTS, form="sequential", targets=("proj", "fc2"))
    check("mine", sequential, FACTS)


def test_mean_and_std_may_differ():
    other = Preprocess((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 1.0, "squash")
    check("mine", adapter_of(preprocess=other), FACTS)


@pytest.mark.parametrize("base", ["vit_y", "vit_x.other", "vit_x_s.tag"])
def test_another_model(base):
    unbound = adapter_of(base_model=base, base_sha256=None)
    refused(unbound, "base_model_name_or_path", "'mine'", base, "vit_x.tag")
    # The digest says whose weights they are, whatever they are called.
    check("mine", adapter_of(base_model=base), FACTS)


def test_a_name_that_is_not_timm_s_says_nothing():
    unbound = adapter_of(base_model="transformers:google/vit.base", base_sha256=None)
    check("mine", unbound, FACTS)
    named = replace(FACTS, model="python:models:vit")
    check("mine", adapter_of(base_model="vit_y", base_sha256=None), named)


def test_another_base_sha256():
    refused(
        adapter_of(base_sha256="cd" * 32),
        "base_sha256",
        "cdcdcdcdcdcd…",
        "abababababab…",
        "`checkpoint`",
    )


def test_an_unknown_site():
    adapter = adapter_of()
    site = adapter.sites["blocks.0.attn.proj"]
    unknown = replace(adapter, sites={**adapter.sites, "blocks.7.attn.proj": site})
    refused(unknown, "blocks.7.attn.proj.*", "no such site", "blocks.0.attn.qkv.q", "(12 in all)")


def test_the_patch_embedding_is_not_proj():
    adapter = adapter_of()
    site = adapter.sites["blocks.0.attn.proj"]
    refused(replace(adapter, sites={**adapter.sites, "patch_embed.proj": site}), "no such site")


def test_a_missing_site():
    adapter = adapter_of()
    sites = {k: v for k, v in adapter.sites.items() if k != "blocks.1.attn.proj"}
    refused(replace(adapter, sites=sites), "missing tensor keys for blocks.1.attn.proj")
    names = tuple(sites)
    named = replace(adapter, sites=sites, config=replace(adapter.config, target_modules=names))
    check("mine", named, FACTS)


def test_a_target_that_matches_nothing():
    refused(adapter_of(target_modules=("proj", "blocks.9.attn.proj")), "'blocks.9.attn.proj'")


def test_wrong_sizes():
    adapter = adapter_of()
    a, b = np.zeros((2, DIM + 1), np.float32), np.zeros((DIM, 2), np.float32)
    sites = {**adapter.sites, "blocks.0.attn.proj": SiteTensors(lora_A=a, lora_B=b)}
    refused(
        replace(adapter, sites=sites), "blocks.0.attn.proj: expected", "13 x 13", "found 13 x 14"
    )


def test_swapped_sides_of_a_site_that_is_not_square():
    adapter = random_adapter(FACTS, targets=("fc1",))
    swapped = {
        name: SiteTensors(s.v, s.u, s.d, s.lora_B.T, s.lora_A.T)
        for name, s in adapter.sites.items()
    }
    refused(replace(adapter, sites=swapped, source="somewhere"), "17 x 13", "found 13 x 17")


def test_a_sequential_site_is_out_x_out():
    additive = random_adapter(FACTS, targets=("fc2",))
    wrong = replace(
        additive, source="somewhere", config=replace(additive.config, form="sequential")
    )
    refused(wrong, "13 x 13 matrix (sequential)", "found 13 x 17")


@pytest.mark.parametrize("site", ["blocks.0.attn.qkv.q", "blocks.0.mlp.fc1"])
def test_the_sequential_form_only_after_proj_and_fc2(site):
    adapter = random_adapter(FACTS, form="sequential", targets=(site,))
    refused(replace(adapter, source="somewhere"), site, "sequential", "proj, fc2")


def test_classifier_path_and_width():
    adapter = adapter_of()
    moved = replace(adapter, head=replace(adapter.head, path="head.fc"))
    refused(moved, "head.fc.weight: expected head.weight")
    wide = replace(adapter.head, weight=np.zeros((7, DIM + 1), np.float32))
    refused(replace(adapter, head=wide), "head.weight: expected [classes, 13]", "[7, 14]")


def test_no_classifier_anywhere():
    headless = replace(adapter_of(), head=None)
    refused(headless, "no classifier", "head.weight", facts=facts_of(classes=0))
    refused(headless, "num_classes: expected 5", "found 7")
    unnamed = adapter_of(num_classes=None, class_names=None)
    check("mine", replace(unnamed, head=None), FACTS)


def test_a_name_for_every_class():
    for classes, adapter in ((7, adapter_of()), (CLASSES, replace(adapter_of(), head=None))):
        config = replace(adapter.config, num_classes=None, class_names=("a", "b"))
        said = f"class_names: expected {classes} names, one per class, found 2"
        refused(replace(adapter, config=config), said)


def test_image_sizes_that_disagree():
    other = replace(FACTS.preprocess, input_size=(3, 48, 32))
    refused(adapter_of(preprocess=other), "image sizes disagree", "[3, 48, 32]", "[3, 32, 32]")


# -- plans --------------------------------------------------------------------------------------


def test_a_plan():
    adapters = {
        "a": random_adapter(FACTS, r=4, classes=3),
        "b": random_adapter(FACTS, r=1, classes=11, targets=("proj", "fc1")),
        "c": random_adapter(FACTS, form="sequential", targets=("proj",), r=0, classes=2),
    }
    plan = plan_branches(FACTS, adapters, Reserve())
    assert plan.names == ("a", "b", "c")
    branches = [
        (b.linear, b.form, len(b.sites), b.out, b.in_, b.rank) for b in plan.layout.branches
    ]
    one = lambda i: [  # noqa: E731
        (f"blocks.{i}.attn.qkv", "additive", 3, DIM, DIM, 6),
        (f"blocks.{i}.attn.proj", "additive", 1, DIM, DIM, 6),
        (f"blocks.{i}.attn.proj", "sequential", 1, DIM, DIM, 2),
        (f"blocks.{i}.mlp.fc1", "additive", 1, HIDDEN, DIM, 3),
    ]
    assert branches == one(0) + one(1)
    assert plan.layout.classes == plan.classes == 11
    assert not plan.layout.backbone_head


def test_an_adapter_without_a_head_keeps_the_backbone_s():
    adapters = {
        "a": random_adapter(FACTS, classes=3),
        "b": replace(random_adapter(FACTS, classes=None)),
    }
    plan = plan_branches(FACTS, adapters, Reserve())
    assert plan.layout.backbone_head
    assert plan.layout.classes == 3
    assert plan.classes == CLASSES


def test_reserved_room():
    reserve = Reserve(max_rank=9, max_classes=19, sites=("fc2:sequential", "fc1"))
    plan = plan_branches(FACTS, {"a": random_adapter(FACTS, targets=("proj",))}, reserve)
    assert {b.rank for b in plan.layout.branches} == {9}
    assert plan.layout.classes == 19
    assert {b.name for b in plan.layout.branches} >= {
        "blocks.1.mlp.fc2/sequential",
        "blocks.1.mlp.fc1/additive",
    }
    (fc2, *_) = [b for b in plan.layout.branches if b.name == "blocks.0.mlp.fc2/sequential"]
    assert (fc2.out, fc2.in_) == (DIM, DIM)


def test_parts_are_where_an_adapter_or_a_reserve_asks():
    def listed(adapters, reserve):
        plan = plan_branches(FACTS, adapters, reserve)
        branches = [b for b in plan.layout.branches if b.linear.startswith("blocks.0.")]
        return [(b.name.removeprefix("blocks.0."), b.rank, b.extras) for b in branches]

    after = random_adapter(FACTS, form="sequential", targets=("proj",), r=2, parts=("db", "s_out"))
    plain = random_adapter(FACTS, targets=("fc1",), r=1, classes=3)
    adapters = {"after": after, "plain": plain}
    assert listed(adapters, Reserve()) == [
        ("attn.proj/additive", 1, ("s_out", "db")),
        ("attn.proj/sequential", 4, ()),
        ("mlp.fc1/additive", 3, ()),
    ]
    assert listed(adapters, Reserve(max_rank=5, parts=("s_in",))) == [
        ("attn.proj/additive", 5, ("s_in", "s_out", "db")),
        ("attn.proj/sequential", 5, ()),
        ("mlp.fc1/additive", 5, ("s_in",)),
    ]
    assert listed({}, Reserve(sites=("fc2:sequential",), parts=("db", "s_in"))) == [
        ("mlp.fc2/additive", 1, ("s_in", "db")),
        ("mlp.fc2/sequential", 3, ()),
    ]


def test_what_can_only_be_folded_is_no_side_branch():
    adapter = random_adapter(FACTS)
    config = replace(adapter.config, fold_only=True)
    values = {"blocks.0.norm1.weight": np.ones(DIM, np.float32)}
    for wrong in (
        replace(adapter, config=config),
        replace(adapter, config=config, values=values, sites={}),
    ):
        with pytest.raises(PlanError, match=r"'a' can only be folded.*`fold=True`"):
            plan_branches(FACTS, {"a": wrong}, Reserve())


@pytest.mark.parametrize("part", ["s_in", "s_out", "db"])
def test_parts_of_another_size(part):
    adapter = random_adapter(FACTS, targets=("fc1",))
    (name, *_) = adapter.sites
    wrong = replace(adapter.sites[name], **{part: np.ones(DIM + HIDDEN, np.float32)})
    with pytest.raises(AdapterError, match=rf"fc1\.{part}: expected .*found {DIM + HIDDEN}"):
        plan_branches(FACTS, {"a": replace(adapter, sites={name: wrong})}, Reserve())


def test_reserved_sites_alone():
    plan = plan_branches(FACTS, {}, Reserve(sites=("proj",)))
    assert [b.rank for b in plan.layout.branches] == [3, 3]
    assert plan.layout.backbone_head
    assert plan.layout.classes == 0


@pytest.mark.parametrize(
    ("reserve", "classes", "message"),
    [
        (Reserve(), CLASSES, "nothing to export"),
        (Reserve(sites=("gate",)), CLASSES, "`sites`: 'gate' matches no site"),
        (Reserve(sites=("q:sequential",)), CLASSES, "`sites`: 'q:sequential'.*proj, fc2"),
        (Reserve(sites=("proj",), keep_backbone_head=True), 0, "`keep_backbone_head`"),
        (Reserve(sites=("proj",)), 0, "no classifier.*`max_classes`"),
    ],
)
def test_plans_that_are_refused(reserve, classes, message):
    with pytest.raises(PlanError, match=message):
        plan_branches(facts_of(classes=classes), {}, reserve)


def test_room_that_no_backbone_has_is_refused_at_once():
    with pytest.raises(OptionError, match="`sites`: form must be one of"):
        Reserve(sites=("fc1", "proj:x"))
    with pytest.raises(OptionError, match="`parts`: expected some of s_in, s_out, db, found gate"):
        Reserve(parts=("gate", "db"))
    for wrong in ({"max_rank": -1}, {"max_classes": -3}):
        with pytest.raises(OptionError, match="expected 0 or more"):
            Reserve(**wrong)


def test_a_backbone_without_sites():
    bare = replace(FACTS, linears=())
    with pytest.raises(PlanError, match=r"zero sites found in vit_x\.tag"):
        plan_branches(bare, {"a": random_adapter(FACTS)}, Reserve())


def test_a_plan_checks_every_adapter():
    wrong = adapter_of(base_sha256="cd" * 32)
    with pytest.raises(AdapterError, match="'second' was trained on"):
        plan_branches(FACTS, {"first": random_adapter(FACTS), "second": wrong}, Reserve())


def test_facts_are_json():
    assert json.loads(json.dumps(FACTS.to_json()))["sha256"] == "ab" * 32


def test_an_adapter_in_memory_has_a_source():
    assert Adapter(adapter_of().config, {}, None).source == "<memory>"
