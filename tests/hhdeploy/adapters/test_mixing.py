"""Strength and mixtures of adapters, against the training-time model's dense parameters."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.adapters.format import SiteTensors, load_adapter, save_adapter
from hhdeploy.adapters.mixing import at_strength, merge_adapters
from hhdeploy.errors import AdapterError, OptionError
from hhdeploy.training import attach, detach, save
from tests.support import MISTAKE, assert_parity, random_adapter


def with_parts(adapter, *names, seed=0):
    """The adapter with some of s_in, s_out and db at every site."""
    random = np.random.default_rng(seed)
    sites = {}
    for name, site in adapter.sites.items():
        out, into = site.shape
        sizes = {"s_in": into, "s_out": out, "db": out}
        parts = {n: 1 + 0.3 * random.standard_normal(sizes[n]) for n in names}
        sites[name] = replace(site, **{n: p.astype(np.float32) for n, p in parts.items()})
    return replace(adapter, sites=sites)


def dense(backbone, adapter):
    """What the training-time model adds to every parameter but the classifier's."""
    model = backbone.model
    before = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    attach(model, adapter)
    try:
        owners = {n: (n.rpartition(".")[0], n.rpartition(".")[2]) for n in before}
        after = {
            n: getattr(model.get_submodule(owner), leaf).detach().double().numpy()
            for n, (owner, leaf) in owners.items()
            if not n.startswith("head.")
        }
    finally:
        detach(model)
    return {n: value - before[n] for n, value in after.items() if (value != before[n]).any()}


def assert_sum(backbone, chosen, found):
    """What a mixture does, `dense`, is the weighted sum of what its parts do."""
    expected: dict = {}
    for adapter, weight in chosen.values():
        for key, delta in dense(backbone, adapter).items():
            expected[key] = expected.get(key, 0.0) + weight * delta
    assert found.keys() == expected.keys()
    for key, delta in expected.items():
        assert_parity(delta.ravel(), found[key].ravel(), "algebra", "float32")


def adapters(facts):
    return {
        "hta": random_adapter(facts, seed=1, reflection="orthogonal"),
        "lora": random_adapter(facts, targets=("q", "fc1"), r=3, seed=2),
        "scaled": with_parts(random_adapter(facts, targets=("proj", "v"), seed=3), "s_out", "db"),
        "columns": with_parts(random_adapter(facts, targets=("fc2",), seed=4), "s_in"),
        "sequential": random_adapter(facts, form="sequential", targets=("proj", "fc2"), seed=5),
    }


@pytest.mark.parametrize("name", ["hta", "lora", "scaled", "columns", "sequential"])
def test_strength_scales_the_change(tiny, name):
    """What is folded and packed, and the training-time model, each by itself."""
    adapter = adapters(tiny.facts)[name]
    part = at_strength(adapter, 0.7)
    whole, found = dense(tiny, adapter), dense(tiny, part)
    assert whole.keys() == found.keys()
    for key, delta in whole.items():
        assert_parity(0.7 * delta.ravel(), found[key].ravel(), "algebra", "float32")
        assert np.abs(found[key] - delta).max() > MISTAKE
    mixed = dense(tiny, merge_adapters({"part": (part, 1.0)}))
    for key, delta in found.items():
        assert_parity(delta.ravel(), mixed[key].ravel(), "algebra", "float32")
    assert part.head is adapter.head
    assert at_strength(adapter, 1.0) is adapter


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (("hta", "lora", "scaled"), (0.5, 0.3, -0.4)),
        (("hta", "columns"), (1.0, 2.0)),
        (("sequential", "sequential"), (0.5, 0.25)),
    ],
)
def test_a_mixture_is_the_sum(tmp_path, tiny, names, weights):
    parts = adapters(tiny.facts)
    chosen = {f"{i}": (parts[n], w) for i, (n, w) in enumerate(zip(names, weights, strict=True))}
    mixed = merge_adapters(chosen, head="0")
    save_adapter(mixed, tmp_path / "mixed")
    found = dense(tiny, load_adapter(tmp_path / "mixed"))
    assert_sum(tiny, chosen, found)
    assert np.array_equal(mixed.head.weight, parts[names[0]].head.weight)
    assert mixed.config.extra["merged_from"] == {
        "0": weights[0],
        **{str(i): w for i, w in enumerate(weights[1:], 1)},
    }


def test_a_mixture_has_none_of_the_records_of_its_parts(tiny):
    """How one of them was trained, and how good it was, is not so of the sum."""
    said = {"training": {"val_top1": 1.0}, "imported_from": {}, "merged_from": {}}
    said |= {"started_from": {}, "note": "mine"}
    other = random_adapter(tiny.facts, seed=1)
    one = replace(other, config=replace(other.config, extra=said))
    mixed = merge_adapters({"one": (one, -4.0), "other": (other, 3.0)}, "one")
    assert mixed.config.extra == {"note": "mine", "merged_from": {"one": -4.0, "other": 3.0}}


def test_what_is_no_sum_is_refused(tiny):
    parts = adapters(tiny.facts)
    both = with_parts(random_adapter(tiny.facts, targets=("fc2",)), "s_in", "s_out")
    rows = with_parts(random_adapter(tiny.facts, targets=("fc2",)), "s_out")

    def refused(message, *named, head="0"):
        chosen = {str(i): (a, 0.5) for i, a in enumerate(named)}
        with pytest.raises((AdapterError, OptionError), match=message):
            merge_adapters(chosen, head)

    refused("has s_in and s_out, of which one multiplies", both)
    refused("another its output", rows, parts["columns"])
    refused("different forms", parts["hta"], parts["sequential"])
    refused("different classifiers", parts["hta"], parts["lora"], head=None)
    refused("expected one of 0, found 'x'", parts["hta"], head="x")
    other = parts["lora"]
    foreign = replace(other, config=replace(other.config, base_sha256="0" * 64))
    refused("different backbones: base_sha256", parts["hta"], foreign)
    silent = replace(other, config=replace(other.config, base_sha256=None))
    refused("1 and 2 belong to different backbones", silent, parts["hta"], foreign)
    heads = replace(other, config=replace(other.config, base_model_args={"num_heads": 2}))
    more = replace(other, config=replace(other.config, base_model_args={"num_heads": 3}))
    refused("compute otherwise: num_heads is 2 and 3", heads, more)
    one = replace(other, config=replace(other.config, preprocess=None))
    two = replace(other, config=replace(other.config, class_names=tuple("bcadefg")))
    refused("different class names", one, two, head=None)
    trained = replace(other.config.preprocess, crop_pct=0.5)
    cropped = replace(other, config=replace(other.config, preprocess=trained))
    refused("1 and 2 have different preprocessing", one, other, cropped, head=None)
    merged = merge_adapters({"0": (one, 0.5), "1": (other, 0.5)})
    assert merged.head.weight is other.head.weight
    folded = replace(parts["lora"], config=replace(parts["lora"].config, fold_only=True))
    for site in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        values = {f"{site}.weight": np.ones(48, np.float32)}
        refused(
            f"multiplies {site}.weight, which is replaced",
            with_parts(random_adapter(tiny.facts, targets=("q", "k", "v", "fc2")), "s_out"),
            replace(folded, values=values),
        )
    refused("no sum", with_parts(parts["sequential"], "s_out"))
    # M (b + db): the matrix multiplies the shift as well, whose ever it is.
    shifted = with_parts(parts["sequential"], "db")
    refused("has a matrix and db, of which one multiplies the other", shifted)
    only = {name: SiteTensors(db=site.db) for name, site in shifted.sites.items()}
    refused("would multiply another's db", parts["sequential"], replace(shifted, sites=only))
    refused("found none")
    with pytest.raises(AdapterError, match="no sum"):
        at_strength(shifted, 0.5)
    with pytest.raises(AdapterError, match="no sum"):
        at_strength(both, 0.5)


def replacing(adapter, backbone, *paths, seed):
    """The adapter, fold only, with new values of parameters."""
    random = np.random.default_rng(seed)
    known = dict(backbone.model.named_parameters())
    values = {}
    for path in paths:
        noise = 0.2 * random.standard_normal(known[path].shape)
        values[path] = (known[path].detach().numpy() + noise).astype(np.float32)
    config = replace(adapter.config, fold_only=True)
    return replace(adapter, config=config, values=values)


@pytest.mark.parametrize("weights", [(0.7, 0.3, -0.4), (0.5, 0.3, 1.0)])
def test_a_mixture_of_replaced_parameters(tmp_path, tiny, weights):
    """A norm of both, a weight of one beside a product of another, a patch convolution of one."""
    facts, norm, fc1 = tiny.facts, "blocks.0.norm1.weight", "blocks.0.mlp.fc1.weight"
    lora = random_adapter(facts, targets=("q", "fc1"), r=3, seed=2)
    one = replacing(random_adapter(facts, targets=("k",)), tiny, norm, fc1, seed=1)
    other = replacing(
        random_adapter(facts, targets=("k",)), tiny, norm, "patch_embed.proj.weight", seed=2
    )
    chosen = dict(zip("abc", zip((one, other, lora), weights, strict=True), strict=True))
    mixed = merge_adapters(chosen, "a", tiny)
    assert mixed.config.fold_only
    save_adapter(mixed, tmp_path / "mixed")
    found = dense(tiny, load_adapter(tmp_path / "mixed"))
    assert_sum(tiny, chosen, found)
    assert {norm, fc1, "patch_embed.proj.weight"} < found.keys()
    with pytest.raises(AdapterError, match=r"only be folded.*takes the backbone's own.*`model`"):
        merge_adapters(chosen, "a")


def test_weights_that_are_1_together_need_no_backbone(tiny):
    path = "blocks.0.norm1.weight"
    parts = [replacing(random_adapter(tiny.facts), tiny, path, seed=seed) for seed in (1, 2)]
    chosen = {"a": (parts[0], 0.7), "b": (parts[1], 0.3)}
    found = merge_adapters(chosen, "a").values[path]
    wide = 0.7 * parts[0].values[path].astype(float) + 0.3 * parts[1].values[path]
    assert_parity(wide, found, "algebra", "float32")
    half = at_strength(parts[0], 0.5)
    expected = dense(tiny, half)[path]
    value = merge_adapters({"half": (half, 1.0)}, backbone=tiny).values[path]
    own = tiny.model.get_parameter(path).detach().numpy()
    assert_parity(expected, value - own, "algebra", "float32")


def test_values_of_another_shape_or_backbone_are_refused(tiny):
    path = "blocks.0.norm1.weight"
    one, other = (replacing(random_adapter(tiny.facts), tiny, path, seed=s) for s in (1, 2))
    wrong = replace(other, values={path: np.ones((1, 48), np.float32)})
    with pytest.raises(AdapterError, match=r"of one shape, found \(48,\) and \(1, 48\)"):
        merge_adapters({"a": (one, 0.7), "b": (wrong, 0.3)}, "a")
    with pytest.raises(AdapterError, match=r"expected shape \(48,\) of .*, found \(1, 48\)"):
        merge_adapters({"b": (wrong, 0.3)}, backbone=tiny)
    foreign = replace(one, config=replace(one.config, base_sha256="0" * 64))
    with pytest.raises(AdapterError, match="base_sha256"):
        merge_adapters({"a": (foreign, 0.5)}, backbone=tiny)


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (("vit_x", None), ("vit_x.a", None), ("vit_x.a", None)),
        (("vit_x.a", None), ("vit_x", "1" * 64), ("vit_x.a", "1" * 64)),
        # Digests decide, whatever the names are.
        (("vit_x.a", "1" * 64), ("python:m:f", "1" * 64), ("vit_x.a", "1" * 64)),
        (("vit_x.a", None), ("vit_x.b", None), None),
        (("vit_x", None), ("vit_y", "1" * 64), None),
        # Names of other sources have no tags.
        (("python:m:f", None), ("python:m:f.g", None), None),
        (("vit_x.a", "1" * 64), ("vit_x.a", "2" * 64), None),
    ],
)
def test_a_mixture_belongs_to_the_backbone_of_all(tiny, one, other, together):
    adapter = random_adapter(tiny.facts)

    def of(name, digest):
        config = replace(adapter.config, base_model=name, base_sha256=digest)
        return replace(adapter, config=config), 0.5

    if together is None:
        with pytest.raises(AdapterError, match="belong to different backbones"):
            merge_adapters({"a": of(*one), "b": of(*other)})
        return
    config = merge_adapters({"a": of(*one), "b": of(*other)}).config
    assert (config.base_model, config.base_sha256) == together


def test_files_hold_no_strength(tiny, tmp_path):
    part = at_strength(random_adapter(tiny.facts), 0.5)
    with pytest.raises(AdapterError, match=r"at 0\.5 of its strength.*merge_adapters"):
        save_adapter(part, tmp_path / "a")
    attach(tiny.model, part)
    try:
        with pytest.raises(AdapterError, match=r"at 0\.5 of its strength"):
            save(tiny.model, tmp_path / "a")
    finally:
        detach(tiny.model)
    assert not (tmp_path / "a").exists()
    save_adapter(merge_adapters({"part": (part, 1.0)}), tmp_path / "a")


def test_what_is_no_adapter_and_weight_is_refused(tiny):
    adapter = random_adapter(tiny.facts)
    for wrong, found in (
        (adapter, "Adapter"),
        ((adapter, "1"), "1"),
        ((adapter, math.nan), "nan"),
        (("a", 1.0), r"\(str, 1.0"),
    ):
        with pytest.raises(OptionError, match=rf"adapter 'a': expected \(adapter, wei.*{found}"):
            merge_adapters({"a": wrong})
    merged = merge_adapters({"a": (adapter, np.float32(0.5))})
    assert json.dumps(merged.config.to_json()["merged_from"]) == '{"a": 0.5}'


@pytest.mark.parametrize("name", ["hta", "scaled", "columns", "sequential"])
@pytest.mark.parametrize("strength", [1e30, -1e30, 1e300])
def test_a_strength_beyond_float32_is_refused(tiny, name, strength):
    adapter = adapters(tiny.facts)[name]
    match = rf"expected at most [\d.]+e.\d+ for .*found {re.escape(f'{strength:g}')}"
    with pytest.raises(OptionError, match=rf"`strength`: {match}"):
        at_strength(adapter, strength)
    with pytest.raises(OptionError, match=rf"the weight of 'a': {match}"):
        merge_adapters({"a": (adapter, strength)})
    with pytest.raises(OptionError, match="the weight of 'a': "):
        merge_adapters({"a": (at_strength(adapter, 1e15), 1e15)})
    assert at_strength(adapter, 1e3).strength == 1e3


@pytest.mark.parametrize("part", ["s_in", "s_out", "db"])
def test_no_part_of_an_adapter_is_beyond_float32(tiny, part):
    """Where there is nothing else."""
    whole = with_parts(random_adapter(tiny.facts), part)
    sites = {name: SiteTensors(**site.parts) for name, site in whole.sites.items()}
    with pytest.raises(OptionError, match="beyond that the answers leave"):
        at_strength(replace(whole, sites=sites), 1e25)


def test_a_backbone_that_is_none_is_refused(tiny):
    adapter = random_adapter(tiny.facts)
    with pytest.raises(OptionError, match="`backbone`: expected what load_backbone gives, found i"):
        merge_adapters({"one": (adapter, 1.0)}, backbone=3)
