"""One adapter that does not belong to the backbone is refused in the same words everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hhdeploy.adapters.bases import check_base, same_model, unbound
from hhdeploy.adapters.checks import check, notes
from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE, AdapterConfig
from hhdeploy.adapters.differing import difference
from hhdeploy.adapters.format import Adapter, SiteTensors, load_adapter, tensors_of
from hhdeploy.adapters.importers import ImportOptions, import_adapter
from hhdeploy.adapters.mixing import merge_adapters
from hhdeploy.backbones.facts import NO_BUFFERS
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.backbones.structure import buffers_sha256
from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.errors import AdapterError, BackboneError, CapacityError, HhdeployError
from hhdeploy.exporting.bundles import export
from hhdeploy.files.tensors import tensor_bytes
from hhdeploy.files.writing import json_bytes
from hhdeploy.runtime.bank import AdapterBank
from hhdeploy.verifying.bundles import verify_against_torch
from tests.support import random_adapter
from tests.workshop import copy_bundle

SITE = "blocks.0.attn.proj"
MASKED = "python:tests.own_models:ruling_out"
DIM = 48


def sites(adapter: Adapter, **changes: SiteTensors | None) -> Adapter:
    """With other tensors at some sites (``__`` for a dot); None takes them away."""
    named = {name.replace("__", "."): tensors for name, tensors in changes.items()}
    merged = {**adapter.sites, **named}
    return replace(adapter, sites={k: t for k, t in merged.items() if t is not None})


def config(adapter: Adapter, **changes: object) -> Adapter:
    return replace(adapter, config=replace(adapter.config, **changes))


def low_rank(out: int, in_: int) -> SiteTensors:
    return SiteTensors(lora_A=np.ones((2, in_), np.float32), lora_B=np.ones((out, 2), np.float32))


def larger(adapter: Adapter) -> Adapter:
    """Made for images of another size than the backbone takes."""
    preprocess = replace(adapter.config.preprocess, input_size=(3, 40, 32))
    return config(adapter, preprocess=preprocess, base_model_args={})


def sequential_at(site: str) -> Callable[[Adapter], Adapter]:
    return lambda adapter: config(
        replace(adapter, sites={site: low_rank(DIM, DIM)}),
        form="sequential",
        target_modules=(site,),
    )


def headless(adapter: Adapter, **changes: object) -> Adapter:
    return config(replace(adapter, head=None), **{"num_classes": None, **changes})


# What is wrong -> how an adapter gets it, and what is said after the adapter's source.
FAULTS: dict[str, tuple[Callable[[Adapter], Adapter], str]] = {
    "another model": (
        lambda a: config(a, base_model="vit_small_patch16_224", base_sha256=None),
        "base_model_name_or_path: adapter 'x' expects vit_small_patch16_224",
    ),
    "other weights": (
        lambda a: config(a, base_sha256="cd" * 32),
        "base_sha256: adapter 'x' was trained on the weights cdcdcdcdcdcd…",
    ),
    "other heads with the same weights": (
        lambda a: config(a, base_model_args={**a.config.base_model_args, "num_heads": 2}),
        "base_model_args: adapter 'x' was trained with num_heads 2, the backbone has 3",
    ),
    "wrong shape": (
        lambda a: sites(a, blocks__0__attn__proj=low_rank(DIM, DIM + 1)),
        f"{SITE}: expected tensors for a 48 x 48 matrix (additive), found 48 x 49.",
    ),
    "site missing": (
        lambda a: sites(a, blocks__0__attn__proj=None),
        f"missing tensor keys for {SITE}: target_modules",
    ),
    "sequential at a third": (
        sequential_at("blocks.0.attn.qkv.q"),
        "blocks.0.attn.qkv.q: the sequential form acts after proj, fc2 only",
    ),
    "head elsewhere": (
        lambda a: replace(a, head=replace(a.head, path="head.fc")),
        "classifier head.fc.weight: expected head.weight",
    ),
    "head of another width": (
        lambda a: replace(a, head=replace(a.head, weight=np.ones((7, DIM + 1), np.float32))),
        "head.weight: expected [classes, 48], found [7, 49].",
    ),
    "classes that nobody has": (
        lambda a: headless(a, num_classes=3, class_names=None),
        "num_classes: expected 5 (the backbone's classifier; the adapter brings none), found 3.",
    ),
    "too few class names": (
        lambda a: headless(a, class_names=("cat", "dog")),
        "class_names: expected 5 names, one per class, found 2.",
    ),
    "another image size": (
        larger,
        "the image sizes disagree: preprocess.input_size is [3, 40, 32], the backbone takes "
        "[3, 32, 32]. Make the backbone of the adapter's size",
    ),
    "target without a site": (
        lambda a: config(a, target_modules=(*a.config.target_modules, "blocks.9.attn.q")),
        "missing tensor keys for blocks.9.attn.q: target_modules",
    ),
}
ENTRANCES = ("export", "export --fold", "add", "session", "attach", "import")
# What an entrance cannot meet: a model in hand does not say its arguments or image size; the
# importers make the configuration themselves, from the backbone and the tensors there are, and know
# no head but at the backbone's place.
UNMET = {
    "attach": {"another image size", "other heads with the same weights"},
    "import": {
        "other heads with the same weights",
        "another model",
        "other weights",
        "site missing",
        "target without a site",
        "head elsewhere",
        "classes that nobody has",
        "too few class names",
    },
}


@pytest.fixture
def enter(workshop, branches, tmp_path) -> Callable[[str, Adapter], str]:
    """Take an adapter through an entrance: what it says, the adapter's own path left out."""
    from hhdeploy.training import attach

    facts = workshop.backbone.facts

    def exported(adapter: Adapter, path: Path, fold: bool = False) -> None:
        options = {"model_args": facts.args, "checkpoint": workshop.checkpoint}
        directory = {"x": written(adapter, path)}
        out = path / "out"
        export(facts.model, directory, out, fold=fold, cache=workshop.cache, **options)

    def added(adapter: Adapter, path: Path) -> None:
        bundle = copy_bundle(branches, path / "bundle")
        add_adapter(bundle, "x", written(adapter, path))

    def loaded(adapter: Adapter, path: Path) -> None:
        AdapterBank(Bundle.open(branches), None).add("x", written(adapter, path))

    def imported(adapter: Adapter, path: Path) -> None:
        torch = pytest.importorskip("torch")
        tensors = {key: torch.from_numpy(value) for key, value in tensors_of(adapter).items()}
        torch.save(tensors, path / "x")
        options = ImportOptions(form=adapter.form, preprocess=adapter.config.preprocess)
        import_adapter(path / "x", workshop.backbone, options)

    ways = {
        "export": exported,
        "export --fold": lambda adapter, path: exported(adapter, path, fold=True),
        "add": added,
        "session": loaded,
        "attach": lambda a, path: attach(workshop.backbone.model, load_adapter(written(a, path))),
        "import": imported,
    }

    def said(entrance: str, adapter: Adapter) -> str:
        path = tmp_path / entrance
        path.mkdir()
        with pytest.raises(HhdeployError) as caught:
            ways[entrance](adapter, path)
        assert isinstance(caught.value, (AdapterError, CapacityError))
        return str(caught.value).removeprefix(f"{path / 'x'}: ")

    return said


def written(adapter: Adapter, path: Path) -> Path:
    """The adapter's directory, without the checks of `save_adapter`."""
    (path / "x").mkdir()
    (path / "x" / CONFIG_FILE).write_bytes(json_bytes(adapter.config.to_json()))
    (path / "x" / TENSOR_FILE).write_bytes(tensor_bytes(tensors_of(adapter)))
    return path / "x"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_words_everywhere(enter, workshop, fault):
    make, expected = FAULTS[fault]
    adapter = make(random_adapter(workshop.backbone.facts, seed=31))
    said = {e: enter(e, adapter) for e in ENTRANCES if fault not in UNMET.get(e, ())}
    assert {"export", "add"} <= set(said)
    assert len(set(said.values())) == 1, said
    assert said["add"].startswith(expected)


def test_a_bundle_knows_only_the_sites_that_it_has_branches_for(enter, workshop):
    whole = random_adapter(workshop.backbone.facts, seed=31)
    adapter = sites(whole, blocks__9__attn__proj=low_rank(DIM, DIM))
    ways = ("export", "export --fold", "attach")
    (said,) = {enter(entrance, adapter) for entrance in ways}
    assert said.startswith("tensor keys blocks.9.attn.proj.*: vit_tiny_patch16_224")
    assert "has no such site" in said
    assert "Its sites are blocks.0.attn.qkv.q, " in said
    (said,) = {enter(entrance, adapter) for entrance in ("add", "session")}
    assert "changes blocks.9.attn.proj (additive), which this bundle has no branch for" in said


def test_a_new_adapter_s_targets(workshop, tmp_path):
    """`attach` and `train` make adapters: the words are those for one that is there."""
    from hhdeploy.training import attach

    new = AdapterConfig(workshop.backbone.facts.model, target_modules=("gate",))
    with pytest.raises(AdapterError, match=r"target_modules: 'gate' matches no site of vit_tiny_"):
        attach(workshop.backbone.model, new)
    asked = replace(random_adapter(workshop.backbone.facts), config=new, source="x")
    with pytest.raises(AdapterError, match=r"x: target_modules: 'gate' matches no site of vit_"):
        check("x", asked, workshop.backbone.facts)


def test_an_adapter_that_nothing_binds_is_taken_with_a_line(workshop, branches, tmp_path):
    """Without a digest: sites and sizes, of timm names, are all that there is to compare."""
    adapter = random_adapter(workshop.backbone.facts, seed=31)
    loose = config(adapter, base_model="python:m:f", base_sha256=None)
    line = unbound("x", loose, workshop.backbone.facts)
    assert line is not None
    assert "'x' (python:m:f) has no base_sha256" in line
    named = config(adapter, base_sha256=None)
    assert "'x' (vit_tiny_patch16_224" in str(unbound("x", named, workshop.backbone.facts))
    facts = workshop.backbone.facts
    rounded = config(loose, base_signs=facts.signs)
    for other in (adapter, config(loose, base_sha256=facts.sha256), rounded):
        assert unbound("x", other, facts) is None
    assert unbound("x", rounded, replace(facts, signs="")) is not None  # of an older bundle
    source = written(loose, tmp_path)
    said: list[str] = []
    add_adapter(copy_bundle(branches, tmp_path / "b"), "x", source, progress=said.append)
    assert line in said
    said.clear()
    options = {"checkpoint": workshop.checkpoint, "cache": workshop.cache, "verify": False}
    export(facts.model, {"x": source}, tmp_path / "out", progress=said.append, **options)
    assert line in said
    said.clear()
    verify_against_torch(tmp_path / "b", checkpoint=workshop.checkpoint, progress=said.append)
    assert line in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_an_adapter_of_a_model_in_another_type_is_bound_to_it(workshop, branches, tmp_path, dtype):
    """Rounding its weights changes no sign, and float64 is loaded as float32."""
    import torch

    from hhdeploy.training import attach, save

    facts, paths = workshop.backbone.facts, {"own": tmp_path / "own", "other": tmp_path / "other"}
    for name, path in paths.items():
        model = deepcopy(workshop.backbone.model)
        if name == "other":
            torch.nn.init.normal_(model.get_parameter("blocks.1.mlp.fc1.weight"))
        new = AdapterConfig(facts.model, num_classes=3, base_model_args=facts.args)
        save(attach(model.to(getattr(torch, dtype)), new), path)
    key = "base_sha256" if dtype == "float64" else "base_signs_sha256"
    said = json.loads((paths["own"] / CONFIG_FILE).read_text())
    assert said[key] == {"base_sha256": facts.sha256, "base_signs_sha256": facts.signs}[key]
    own, other = (load_adapter(path) for path in paths.values())
    assert own.config.to_json() == said
    assert unbound("own", own, facts) is None
    bundle = copy_bundle(branches, tmp_path / "b")
    add_adapter(bundle, "own", paths["own"])
    with pytest.raises(AdapterError, match=f"{key}: adapter 'other' was trained on the weights"):
        add_adapter(bundle, "other", paths["other"])
    with pytest.raises(AdapterError, match=key):
        attach(deepcopy(workshop.backbone.model).to(getattr(torch, dtype)), other)
    with pytest.raises(AdapterError, match=f"different backbones: {key}"):
        merge_adapters({"a": (own, 0.5), "b": (other, 0.5)}, "a")
    merged = merge_adapters({"a": (own, 0.5), "b": (own, 0.5)}).config
    assert (merged.base_sha256, merged.base_signs) == (
        own.config.base_sha256,
        own.config.base_signs,
    )


def test_what_an_older_bundle_took_is_refused_by_torch(workshop, branches, tmp_path):
    """Its manifest has no digest of signs, so that nothing was compared when it was added."""
    bundle = copy_bundle(branches, tmp_path / "b")
    content = json.loads((bundle / "hhdeploy.json").read_text())
    assert content["backbone"].pop("signs_sha256") == workshop.backbone.facts.signs
    (bundle / "hhdeploy.json").write_text(json.dumps(content))
    adapter = random_adapter(workshop.backbone.facts, seed=31)
    source = written(config(adapter, base_sha256=None, base_signs="0" * 64), tmp_path)
    said: list[str] = []
    add_adapter(bundle, "x", source, progress=said.append)
    assert [line for line in said if "has no base_sha256" in line]
    with pytest.raises(
        AdapterError, match="base_signs_sha256: adapter 'x' was trained on the weig"
    ):
        verify_against_torch(bundle, checkpoint=workshop.checkpoint)


def test_assumed_and_other_preprocessing_is_said(workshop, branches, tmp_path):
    facts = workshop.backbone.facts
    adapter = random_adapter(facts, seed=32)
    silent = config(adapter, preprocess=None)
    (line,) = notes("x", silent, facts)
    assert "'x' does not say how its images become inputs: assumed as the backbone's, 32x32" in line
    said: list[str] = []
    add_adapter(
        copy_bundle(branches, tmp_path / "b"), "x", written(silent, tmp_path), progress=said.append
    )
    assert line in said
    assert notes("x", config(adapter, preprocess=facts.preprocess), facts) == []
    other = replace(facts.preprocess, mean=(0.25, 0.5, 0.75))
    (line,) = notes("x", config(adapter, preprocess=other), facts)
    assert "in its own way, 32x32" in line
    assert "mean 0.25, 0.5, 0.75" in line


def test_other_names_and_arguments_of_the_same_weights_are_said(workshop, branches, tmp_path):
    """The digest has no activation, heads or pooling; what changes nothing of these is no line."""
    facts = workshop.backbone.facts
    adapter = random_adapter(facts, seed=33)
    args = dict(facts.args)
    alike = config(adapter, base_model=facts.model.partition(".")[0])
    alike = config(alike, base_model_args={**args, "drop_rate": 0.1, "num_classes": 3})
    assert notes("x", alike, facts) == []
    assert notes("x", config(adapter, base_model="python:m:f"), facts) == []
    for other, said in (
        ({"base_model": "deit_tiny_patch16_224"}, "trained with model 'deit_tiny_patch16_224'; "),
        (
            {"base_model_args": {**args, "global_pool": "avg", "fc_norm": False}},
            "trained with global_pool 'avg', fc_norm False; the backbone says no global_pool, ",
        ),
    ):
        unlike = config(adapter, **other)
        check("x", unlike, facts)
        (line,) = notes("x", unlike, facts)
        assert said in line
        assert line.endswith("whether they compute the same is not known")
    elsewhere = config(unlike, base_sha256="cd" * 32)  # which `check` refuses
    assert not [line for line in notes("x", elsewhere, facts) if "weights are the same" in line]
    lines: list[str] = []
    source = written(unlike, tmp_path)
    add_adapter(copy_bundle(branches, tmp_path / "b"), "x", source, progress=lines.append)
    assert line in lines


def test_another_pooling_is_refused_where_a_classifier_was_trained_on_it(tiny):
    facts = replace(tiny.facts, args={**tiny.facts.args, "global_pool": "token"})
    args = {**facts.args, "global_pool": "avg"}
    adapter = config(random_adapter(facts, seed=34), base_model_args=args)
    with pytest.raises(AdapterError, match="trained with global_pool 'avg', the backbone has 'tok"):
        check("x", adapter, facts)
    check("x", headless(adapter, class_names=None), facts)


@pytest.mark.parametrize(
    ("mine", "theirs", "refused"),
    [
        ("relu", "gelu", True),
        ("gelu_tanh", "gelu", True),
        ("swish", "silu", False),
        ("", "gelu", False),
    ],
)
def test_another_activation_that_both_state_is_refused(tiny, mine, theirs, refused):
    facts = replace(tiny.facts, args={**tiny.facts.args, "act_layer": theirs})
    args = {**facts.args, "act_layer": mine}
    adapter = headless(random_adapter(facts, seed=34), class_names=None, base_model_args=args)
    if not refused:
        check("x", adapter, facts)
        return
    with pytest.raises(AdapterError, match=f"act_layer '{mine}', the backbone has '{theirs}'"):
        check("x", adapter, facts)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("vit_tiny.augreg", "vit_tiny", True),
        ("vit_tiny.augreg", "vit_tiny.augreg", True),
        ("vit_tiny.augreg", "vit_tiny.dino", False),
        ("vit_tiny", "vit_small", False),
        ("transformers:a/b.c", "transformers:a/b", False),
    ],
)
def test_a_tag_counts_where_both_names_have_one(one, other, same):
    assert same_model(one, other) is same_model(other, one) is same


@pytest.mark.parametrize("part", ["s_in", "s_out", "db"])
@pytest.mark.parametrize("form", ["additive", "sequential"])
def test_scales_and_db_have_the_sizes_of_their_linear(tiny_facts, part, form):
    """One value would be taken for all of them."""
    site = "blocks.0.mlp.fc2"
    adapter = random_adapter(tiny_facts, form=form, targets=[site], parts=(part,))
    check("x", adapter, tiny_facts)
    right = getattr(adapter.sites[site], part).size
    for size in {1, 48, 192} - {right}:
        parts = {part: np.ones(size, np.float32)}
        wrong = sites(adapter, blocks__0__mlp__fc2=replace(adapter.sites[site], **parts))
        said = rf"{site}\.{part}: expected {right} values for a 48 x 192 Linear, found {size}\."
        with pytest.raises(AdapterError, match=said):
            check("x", wrong, tiny_facts)


def test_a_kind_that_a_bundle_s_row_tells_no_site_of(tiny_facts):
    """The row cannot say which sites are missing, only that the adapter has none of them."""
    facts = replace(tiny_facts, linears=tuple(x for x in tiny_facts.linears if "mlp" not in x.path))
    adapter = random_adapter(tiny_facts, seed=31)
    check("x", adapter, facts, whole=False)
    lost = config(adapter, target_modules=(*adapter.config.target_modules, "fc1"))
    with pytest.raises(AdapterError, match="missing tensor keys for fc1: target_modules"):
        check("x", lost, facts, whole=False)
    check("x", random_adapter(tiny_facts, targets=("q", "fc1")), facts, whole=False)
    few = replace(facts, linears=tuple(x for x in facts.linears if "qkv" not in x.path))
    check("x", adapter, few, whole=False)


def test_an_adapter_is_bound_to_the_buffers_beside_the_weights(tmp_path):
    """The same weights answer otherwise with other statistics, or another mask."""
    from hhdeploy.training import attach, save

    one, other = (
        load_backbone(
            BackboneSpec(MASKED, {"classes": classes}, pretrained=False, input_size=(3, 32, 32))
        )
        for classes in ([0, 4], [5, 6])
    )
    assert one.facts.sha256 == other.facts.sha256
    new = AdapterConfig(MASKED, target_modules=("q", "v"), base_model_args=one.facts.args)
    model = attach(deepcopy(one.model), new, seed=3)
    save(model, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    assert adapter.config.base_buffers == one.facts.buffers != NO_BUFFERS
    assert unbound("a", adapter, one.facts) is None
    refused = "base_buffers_sha256: adapter 'a' was trained with the buffers"
    with pytest.raises(AdapterError, match=refused):
        attach(deepcopy(other.model), adapter)
    bundle, sources = tmp_path / "b", {"a": tmp_path / "a"}
    same, wrong = {"classes": [0, 4]}, {"classes": [5, 6]}
    sized: dict[str, Any] = {"input_size": (3, 32, 32), "pretrained": False}
    made: dict[str, Any] = {**sized, "verify": False, "cache": tmp_path / "cache"}
    with pytest.raises(AdapterError, match=refused):
        export(MASKED, sources, bundle, model_args=wrong, **made)
    export(MASKED, sources, bundle, model_args=same, **made)
    with pytest.raises(BackboneError, match="was exported with the buffers"):
        verify_against_torch(bundle, model=MASKED, model_args=wrong, **sized)
    theirs = config(adapter, base_buffers=other.facts.buffers)
    with pytest.raises(AdapterError, match="different backbones: base_buffers_sha256"):
        merge_adapters({"a": (adapter, 0.5), "b": (theirs, 0.5)})
    assert merge_adapters({"a": (adapter, 0.5)}).config.base_buffers == one.facts.buffers
    assert list(difference(adapter, theirs).settings) == ["base_buffers_sha256"]


@pytest.mark.parametrize(
    ("own", "backbone", "silent"),
    [
        (None, "1" * 64, "the adapter has no digest"),
        ("1" * 64, "", "the backbone has no digest"),
        (None, NO_BUFFERS, None),
        (NO_BUFFERS, "", None),
        (None, "", None),
        ("1" * 64, "1" * 64, None),
    ],
)
def test_buffers_that_one_side_does_not_know_are_told_of(workshop, own, backbone, silent):
    """Adapters and bundles of earlier versions have no digest of them, most models no buffer."""
    facts = replace(workshop.backbone.facts, buffers=backbone)
    adapter = config(random_adapter(facts, seed=31), base_buffers=own)
    check_base("x", adapter, facts)
    line = unbound("x", adapter, facts)
    assert (line is None) == (silent is None)
    assert silent is None or silent in str(line)


def test_the_digest_of_buffers_is_of_what_decides_the_answers():
    """Not how many batches were seen, nor what code makes anew, nor the classifier's."""
    import torch
    from torch import nn

    def model() -> nn.Module:
        body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        body.register_buffer("table", torch.ones(3), persistent=False)
        return body

    known = buffers_sha256(model(), "2")
    assert known != NO_BUFFERS == buffers_sha256(nn.Linear(4, 4), "")
    alike = model()
    alike[1].num_batches_tracked += 5  # type: ignore[index, union-attr, operator]
    alike.register_buffer("position_ids", torch.arange(9))
    alike.table *= 2  # type: ignore[operator]
    alike[2].register_buffer("own", torch.ones(2))  # type: ignore[index, union-attr]
    assert buffers_sha256(alike.double(), "2") == known
    moved = model()
    moved[1].running_mean[2] = 1e-6  # type: ignore[index, union-attr]
    assert buffers_sha256(moved, "2") != known
