"""Adapters at another strength: exported, folded, added, and verified."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from hhdeploy.adapters.format import Adapter
from hhdeploy.adapters.mixing import at_strength
from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.cli.naming import adapters_and_strengths
from hhdeploy.errors import AdapterError, OptionError
from hhdeploy.runtime import open_session
from hhdeploy.training import attach, detach, extract
from hhdeploy.verifying.bundles import verify_against_torch
from tests.support import assert_caught, assert_parity, images, logits_of
from tests.workshop import Workshop, contents, copy_bundle

STRENGTHS = {"alpha": 0.7, "gamma": -0.5}


def truth(workshop: Workshop, name: str, strength: float) -> np.ndarray:
    """Logits with dense weights between the backbone's and the adapter's, by hand."""
    model = workshop.backbone.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    attach(model, workshop.adapters[name])
    after = {n: model.get_submodule(n.rpartition(".")[0]) for n in before}
    after = {n: getattr(m, n.rpartition(".")[2]).detach().clone() for n, m in after.items()}
    detach(model)
    head = workshop.backbone.facts.classifier
    mixed = {
        n: a if n.startswith(f"{head}.") else before[n] + strength * (a - before[n])
        for n, a in after.items()
    }
    own = copy.deepcopy(model)
    for n, value in mixed.items():
        parent, _, leaf = n.rpartition(".")
        setattr(own.get_submodule(parent), leaf, torch.nn.Parameter(value))
    return logits_of(own, images(3))


@pytest.fixture(scope="module")
def bundle(workshop, tmp_path_factory):
    out = tmp_path_factory.mktemp("strength") / "bundle"
    workshop.export(out, ["alpha", "gamma", "lora"], strengths=STRENGTHS)
    return out


def test_side_branches(workshop, bundle):
    manifest = Bundle.open(bundle).manifest
    assert {a.name: a.strength for a in manifest.adapters} == {**STRENGTHS, "lora": 1.0}
    entries = json.loads((bundle / "hhdeploy.json").read_text())["adapters"]
    assert ["strength" in entry for entry in entries] == [True, True, False]
    with open_session(bundle, device="cpu", threads=1) as session:
        for name, strength in STRENGTHS.items():
            found = session.run(images(3), adapters=[name] * 3)
            found = found[:, : manifest.adapter(name).classes]
            expected = truth(workshop, name, strength)
            assert_parity(expected, found, "branches", "float32")
            assert_caught(truth(workshop, name, 1.0), found, "branches", "float32")


def test_the_files_stay_as_they_came(workshop, bundle):
    for name in STRENGTHS:
        assert contents(bundle / "adapters" / name) == contents(workshop.directory(name))


def test_folded(workshop, tmp_path):
    workshop.export(tmp_path / "b", ["gamma"], fold=True, strengths={"gamma": 0.4})
    with open_session(tmp_path / "b", device="cpu", threads=1) as session:
        assert_parity(truth(workshop, "gamma", 0.4), session.run(images(3)), "folded", "float32")


def test_replaced_parameters_move_by_their_difference(scaled_workshop, tmp_path):
    """Folded, and by the training-time model, which lets go of them again."""
    out = tmp_path / "b"
    result = scaled_workshop.export(out, ["norms"], fold=True, strengths={"norms": 0.4})
    assert result.parity.passed
    assert Bundle.open(out).manifest.adapter("norms").strength == 0.4
    assert contents(out / "adapters" / "norms") == contents(scaled_workshop.directory("norms"))
    expected = truth(scaled_workshop, "norms", 0.4)
    with open_session(out, device="cpu", threads=1) as session:
        found = session.run(images(3))
    assert_parity(expected, found, "folded", "float32")
    assert_caught(truth(scaled_workshop, "norms", 1.0), found, "folded", "float32")
    assert verify_against_torch(out, checkpoint=scaled_workshop.checkpoint).passed

    model, adapter = scaled_workshop.backbone.model, scaled_workshop.adapters["norms"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attach(model, at_strength(adapter, 0.4))
    again = extract(model)
    detach(model)
    for path, value in adapter.values.items():
        assert np.array_equal(again.values[path], value)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_added_and_verified(workshop, bundle, tmp_path):
    own = copy_bundle(bundle, tmp_path / "b")
    add_adapter(own, "half", workshop.directory("rival"), strength=0.5)
    report = verify_against_torch(own, checkpoint=workshop.checkpoint)
    assert report.passed
    assert Bundle.open(own).manifest.adapter("half").verified
    with open_session(own, device="cpu", threads=1) as session:
        found = session.run(images(3), adapters=["half"] * 3)[:, :7]
    assert_parity(truth(workshop, "rival", 0.5), found, "branches", "float32")


def test_training_time_model_scales_by_itself(workshop):
    adapter = at_strength(workshop.adapters["gamma"], 0.3)
    model = workshop.backbone.model
    attach(model, adapter)
    try:
        again = extract(model)
        found = logits_of(model, images(3))
    finally:
        detach(model)
        model.float()
    assert_parity(truth(workshop, "gamma", 0.3), found, "algebra", "float32")
    for name, site in workshop.adapters["gamma"].sites.items():
        assert np.array_equal(again.sites[name].u, site.u)


def test_what_is_refused(workshop, tmp_path):
    with pytest.raises(OptionError, match=r"`strengths`: expected names among alpha, found beta"):
        workshop.export(tmp_path / "b", ["alpha"], strengths={"beta": 0.5})
    with pytest.raises(OptionError, match="expected a finite number, found nan"):
        at_strength(workshop.adapters["alpha"], float("nan"))
    gamma: Adapter = workshop.adapters["gamma"]
    for path in ("blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias"):
        both = Adapter(gamma.config, gamma.sites, None, values={path: np.ones(48, np.float32)})
        with pytest.raises(AdapterError, match=f"proj multiplies {path}, which is replaced"):
            at_strength(both, 0.5)


def test_the_command_line_reads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c@0.5", "d=e@2"):
        (tmp_path / name).mkdir()
    named, strengths = adapters_and_strengths(
        ["a@0.7", "x=b@-1e-1", "y=c@0.5", f"w={tmp_path / 'd=e@2'}", "z=./a@.5", "v=./c@0.5@2"]
    )
    assert strengths == {"a": 0.7, "x": -0.1, "z": 0.5, "v": 2.0}
    read = {"a": "a", "x": "b", "y": "c@0.5", "w": "d=e@2", "z": "a", "v": "c@0.5"}
    assert {name: path.resolve() for name, path in named.items()} == {
        name: tmp_path / path for name, path in read.items()
    }
    assert adapters_and_strengths(["q=a@nine"])[1] == {}
