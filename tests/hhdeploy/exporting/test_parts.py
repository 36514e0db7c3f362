"""Adapters with s_in, s_out, db and values of parameters, from their directories to logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hhdeploy import Reserve, verify
from hhdeploy.adapters.format import PARTS, save_adapter
from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.errors import AdapterError, CapacityError, PlanError
from hhdeploy.exporting.bundles import export
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import verify_against_torch
from tests.support import TINY_MODEL, assert_caught, assert_parity, images
from tests.workshop import Workshop, copy_bundle, other_workshop

QKV = "blocks.0.attn.qkv"


@pytest.fixture(scope="module")
def shop(scaled_workshop) -> Workshop:
    return scaled_workshop


@pytest.fixture(scope="module")
def live(scaled) -> Path:
    return scaled


def check(path, shop, names):
    x = images(len(names))
    with open_session(path, device="cpu", threads=1) as session:
        found = session.run(x, list(names))
    assert_parity(shop.mixed_truth(names, x, found.shape[1]), found, "branches", "float32")


def test_side_branches_are_the_training_time_model(shop, live):
    check(live, shop, ("after", "scaled", "ia3", "plain", "scaled", "after"))
    assert verify(live).passed
    manifest = json.loads((live / "hhdeploy.json").read_text())
    assert manifest["schema_version"] == 2
    parts = {b["linear"] + "/" + b["form"]: b.get("parts") for b in manifest["row"]["branches"]}
    assert parts[f"{QKV}/additive"] == list(PARTS)
    assert parts["blocks.0.mlp.fc2/sequential"] is None


def test_a_bundle_that_needs_no_part_stays_of_the_first_schema(shop, tmp_path):
    path = shop.export(tmp_path / "plain", ("plain",)).path
    text = (path / "hhdeploy.json").read_text()
    assert json.loads(text)["schema_version"] == 1
    assert not [b for b in json.loads(text)["row"]["branches"] if "parts" in b]
    with pytest.raises(CapacityError, match=r"'scaled' has .*s_in.*`parts`"):
        add_adapter(path, "scaled", shop.directory("scaled"))
    assert (path / "hhdeploy.json").read_text() == text


def test_reserved_parts_take_a_later_adapter(shop, tmp_path):
    reserve = Reserve(max_rank=3, max_classes=7, parts=PARTS)
    path = shop.export(tmp_path / "out", ("plain",), reserve=reserve).path
    add_adapter(path, "late", shop.directory("scaled"))
    add_adapter(path, "other", shop.directory("ia3"))
    x = images(3)
    with open_session(path, device="cpu", threads=1) as session:
        found = session.run(x, ["late", "other", "plain"])
    truth = shop.mixed_truth(("scaled", "ia3", "plain"), x, found.shape[1])
    assert_parity(truth, found, "branches", "float32")
    report = verify_against_torch(path, checkpoint=shop.checkpoint, verify_images=2)
    assert report.passed
    assert all(a.verified for a in Bundle.open(path).manifest.adapters)


@pytest.mark.parametrize("name", ["scaled", "ia3", "after", "norms"])
def test_folded(shop, tmp_path, name):
    path = shop.export(tmp_path / name, (name,), fold=True).path
    assert json.loads((path / "hhdeploy.json").read_text())["schema_version"] == 1
    x = images(3)
    with open_session(path, device="cpu", threads=1) as session:
        found = session.run(x, None)
    assert_parity(shop.truth(name, x), found, "folded", "float32")
    assert verify_against_torch(path, checkpoint=shop.checkpoint, verify_images=2).passed


def test_each_value_matters(shop):
    """What `test_folded` compares would show a value that is left out."""
    adapter, x = shop.adapters["norms"], images(3)
    expected = shop.truth("norms", x)
    for name in adapter.values:
        values = {k: v for k, v in adapter.values.items() if k != name}
        forgotten = replace(shop, adapters={"norms": replace(adapter, values=values)})
        assert_caught(expected, forgotten.truth("norms", x), "folded", "float32")


def test_a_fold_only_adapter_is_refused_beside_others(shop, live, tmp_path):
    what = r"'norms' can only be folded: it replaces .*norm2\.weight.*`fold=True`"
    with pytest.raises(PlanError, match=what):
        shop.export(tmp_path / "out", ("norms", "plain"))
    with pytest.raises(PlanError, match=what):
        add_adapter(copy_bundle(live, tmp_path / "live"), "norms", shop.directory("norms"))


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("blocks.7.norm1.weight", (48,), r"no parameter blocks\.7\.norm1\.weight"),
        ("blocks.0.norm1.weight", (47,), r"norm1\.weight\.value: expected shape \[48\].*\[47\]"),
    ],
)
def test_values_that_do_not_fit(shop, tmp_path, path, shape, message, strength):
    wrong = replace(shop.adapters["norms"], values={path: np.ones(shape, np.float32)})
    save_adapter(wrong, tmp_path / "wrong")
    with pytest.raises(AdapterError, match=message):
        export(
            TINY_MODEL,
            {"a": tmp_path / "wrong"},
            tmp_path / "out",
            fold=True,
            strengths={"a": strength},
            checkpoint=shop.checkpoint,
            cache=shop.cache,
        )


def test_thirds_with_different_s_in_are_folded_and_refused_beside_others(shop, tmp_path):
    adapter = shop.adapters["scaled"]
    other = replace(adapter.sites[f"{QKV}.k"], s_in=adapter.sites[f"{QKV}.k"].s_in[::-1].copy())
    changed = replace(adapter, sites={**adapter.sites, f"{QKV}.k": other})
    own = other_workshop(tmp_path, shop, {"thirds": changed})
    with pytest.raises(CapacityError, match=r"s_in of .*qkv\.k.*expected the same.*`fold=True`"):
        own.export(tmp_path / "out", ("thirds",))
    path = own.export(tmp_path / "out", ("thirds",), fold=True).path
    x = images(2)
    with open_session(path, device="cpu", threads=1) as session:
        found = session.run(x, None)
    assert_parity(own.truth("thirds", x), found, "folded", "float32")
    assert_caught(own.truth("thirds", x), shop.truth("scaled", x), "folded", "float32")
