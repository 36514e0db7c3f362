"""Bundles with s_in, s_out and db in every precision and every kind of bank, and served."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from hhdeploy import Reserve
from hhdeploy.adapters.format import PARTS, SiteTensors, save_adapter
from hhdeploy.bundle import Bundle, add_adapter, layout
from hhdeploy.calibration.qdq import FORMATS, find_sites, quantised_model
from hhdeploy.calibration.scales import SiteScale
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.errors import CapacityError, ParityError
from hhdeploy.exporters.branches import branched_model
from hhdeploy.plan import plan_branches
from hhdeploy.quantising import CalibrationOptions, calibrate_bundle
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import verify_against_torch
from hhdeploy.verifying.graphs import add_typed_graph
from tests.calibration.conftest import write_pictures
from tests.exporters.synthetic import base_of, graph, random
from tests.parity.ladder import folded_model, run, session
from tests.runtime.serving.servers import running_server
from tests.support import assert_caught, assert_parity, images, random_adapter
from tests.workshop import contents, copy_bundle

NAMES = ("scaled", "ia3", "after", "plain", "scaled", "after")
PROJ = "blocks.0.attn.proj"


# -- precisions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_typed_graphs_are_verified_by_their_twin(scaled, tmp_path, precision):
    bundle = add_typed_graph(copy_bundle(scaled, tmp_path / "bundle"), precision)
    stages = [s for s in bundle.parity()["stages"] if s["precision"] == precision]
    assert {s["adapter"] for s in stages} == {"scaled", "ia3", "after", "plain"}
    assert all(s["passed"] for s in stages)


def test_int8(scaled, scaled_workshop, tmp_path):
    """s_out from 0.2 to 3; no bias is corrected beside an s_out that would not scale it."""
    path = copy_bundle(scaled, tmp_path / "bundle")
    for number, name in enumerate(sorted(set(NAMES))):
        write_pictures(tmp_path / "pictures" / name / "a", 6, number)
    settings = CalibrationSettings(images=16)
    calibrate_bundle(
        path, tmp_path / "pictures", settings, CalibrationOptions(cache=None, threads=1)
    )
    manifest = Bundle.open(path).manifest
    sites = find_sites(
        ir.load(Bundle.open(path).graph("float32")).graph, manifest.backbone.classifier
    )
    branches = {s for b in manifest.layout.branches for s in (b.linear, *b.sites)}
    assert not [n for n, site in sites.items() if n in branches and site.bias is not None]
    transform = manifest.backbone.preprocess
    x = np.stack([transform(image) for image in pictures_of(tmp_path / "pictures", NAMES)])
    truth = scaled_workshop.mixed_truth(NAMES, x, manifest.classes)
    with open_session(path, device="cpu", precision="int8", threads=1) as opened:
        found = opened.run(x, list(NAMES))
        mistaken = opened.run(x, "plain")
    for row, name in enumerate(NAMES):
        own = slice(0, manifest.adapter(name).classes)
        assert_parity(truth[row : row + 1, own], found[row : row + 1, own], "quantised", "int8")
    assert_caught(truth[:, :2], mistaken[:, :2], "quantised", "int8")


def pictures_of(folder, names):
    from PIL import Image

    for i, name in enumerate(names):
        with Image.open(folder / name / "a" / f"{i % 6}.png") as image:
            yield image.convert("RGB")


def gemm():
    """A Linear whose bias stands inside its product, as behind a class token alone."""
    weights = {"w": random(11, 13), "b": random(11), "head_w": random(9, 11), "head_b": random(9)}
    text = """agraph (float[batch, 13] images) => (float[batch, 9] logits) {
        y = Gemm<transB=1>(images, w, b)  logits = Gemm<transB=1>(y, head_w, head_b)
    }"""
    model = graph(text, weights, {"y": PROJ, "logits": "head"})
    return base_of(model, {PROJ: (11, 13)}, 11), weights


@pytest.fixture(scope="module")
def inside():
    """The Gemm's base graph, its weights, an adapter with everything, and the branched graph."""
    base, weights = gemm()
    adapter = random_adapter(base.facts, targets=["proj"], r=2, classes=9, parts=PARTS)
    adapter = replace(adapter, head=None, config=replace(adapter.config, num_classes=9))
    plan = plan_branches(base.facts, {"a": adapter}, Reserve())
    bank = np.stack([np.zeros(plan.layout.size, np.float32), plan.layout.pack("a", adapter)])
    return base, weights, adapter, branched_model(base, plan), bank


def rows(*numbers):
    return np.asarray(numbers, np.int64)


@pytest.mark.parametrize("which", [PARTS, ("s_out",), ("db",), ("s_in",)])
def test_s_out_leaves_a_bias_alone_that_is_inside_the_product(which):
    base, weights = gemm()
    adapter = random_adapter(base.facts, targets=["proj"], r=2, classes=None, parts=which)
    plan = plan_branches(base.facts, {"a": adapter}, Reserve())
    bank = np.stack([np.zeros(plan.layout.size, np.float32), plan.layout.pack("a", adapter)])
    x = random(4, 13)
    site = adapter.sites[PROJ]
    w = weights["w"].astype(np.float64)
    parts = {"s_in": np.ones(13), "s_out": np.ones(11), "db": np.zeros(11), **site.parts}
    y = parts["s_out"] * ((x * parts["s_in"]) @ w.T) + x @ adapter.delta(PROJ).dense().T
    expected = (y + weights["b"] + parts["db"]) @ weights["head_w"].T + weights["head_b"]
    with session(branched_model(base, plan)) as branched, session(base.model) as bare:
        found = run(branched, x, adapter_ids=rows(1, 1, 1, 1), adapter_bank=bank)
        zero = run(branched, x, adapter_ids=rows(0, 0, 0, 0), adapter_bank=bank)
        assert zero.tobytes() == run(bare, x).tobytes()
    assert_parity(expected, found, "branches", "float32")
    with session(folded_model(base, adapter)) as folded:
        assert_parity(expected, run(folded, x), "folded", "float32")


def test_a_corrected_bias_is_scaled_with_the_product(inside):
    """What INT8 loses, the correction gives back before s_out: as if the product had never lost."""
    _, weights, adapter, model, bank = inside
    x, shift = random(5, 13), random(11, seed=9)
    absmax = float(np.max(np.abs(x)) * 3)
    found = {}
    for name, bias in (("plain", None), ("corrected", weights["b"] + shift)):
        written = quantised_model(
            model, {PROJ: SiteScale(absmax, bias=bias)}, FORMATS["int8"], "head"
        )
        with session(written) as quantised:
            for row in (0, 1):
                ids = np.full(len(x), row, np.int64)
                found[name, row] = run(quantised, x, adapter_ids=ids, adapter_bank=bank)
    s_out = adapter.sites[PROJ].s_out.astype(np.float64)
    for row, scale in ((0, np.ones(11)), (1, s_out)):
        moved = found["corrected", row].astype(np.float64) - found["plain", row]
        expected = np.tile(weights["head_w"] @ (scale * shift), (len(x), 1))
        assert_parity(expected, moved, "branches", "float32")
    unscaled = np.tile(weights["head_w"].astype(np.float64) @ shift, (len(x), 1))
    moved = found["corrected", 1].astype(np.float64) - found["plain", 1]
    assert_caught(unscaled, moved, "branches", "float32")


# -- banks ----------------------------------------------------------------------------------------


def test_a_bank_in_the_graph(scaled_workshop, tmp_path):
    names = ("scaled", "ia3", "after")
    path = scaled_workshop.export(tmp_path / "out", names, bank_as_constant=True).path
    x = images(3)
    with open_session(path, device="cpu", threads=1) as opened:
        found = opened.run(x, list(names))
    assert_parity(scaled_workshop.mixed_truth(names, x, 7), found, "branches", "float32")


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_an_open_session_takes_and_replaces_adapters(scaled, scaled_workshop, device):
    if device == "openvino":
        pytest.importorskip("openvino")
    x = images(3)
    with open_session(scaled, device=device, threads=1) as opened:
        opened.adapters.add("late", scaled_workshop.adapters["after"])
        opened.adapters.remove("ia3")
        opened.adapters.add("plain", scaled_workshop.adapters["scaled"], replace_existing=True)
        found = opened.run(x, ["late", "plain", "scaled"])
    truth = scaled_workshop.mixed_truth(("after", "scaled", "scaled"), x, 7)
    assert_parity(truth, found[:, :7], "branches", "float32")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_size_is_not_added(scaled, scaled_workshop, tmp_path, part):
    path = copy_bundle(scaled, tmp_path / "bundle")
    before = contents(path)
    adapter = scaled_workshop.adapters["scaled"]
    name = "blocks.0.mlp.fc1"
    size = getattr(adapter.sites[name], part).size
    wrong = SiteTensors(**{part: np.ones(size + 1, np.float32)})  # no matrix tells its size
    save_adapter(replace(adapter, sites={**adapter.sites, name: wrong}), tmp_path / "late")
    with pytest.raises(CapacityError, match=rf"'late': {name}\.{part} has {size + 1} .* {size}\."):
        add_adapter(path, "late", tmp_path / "late")
    assert contents(path) == before


def test_another_strength_is_the_training_side_s(scaled, scaled_workshop, tmp_path, monkeypatch):
    """And rows with parts at their full strength, as earlier versions wrote them, are seen."""

    def verified(path):
        add_adapter(path, "late", scaled_workshop.directory("ia3"), strength=0.5)
        verify_against_torch(path, checkpoint=scaled_workshop.checkpoint, verify_images=1)

    verified(copy_bundle(scaled, tmp_path / "right"))
    pack = layout._pack_parts
    monkeypatch.setattr(
        layout, "_pack_parts", lambda n, a, *rest: pack(n, replace(a, strength=1.0), *rest)
    )
    with pytest.raises(ParityError, match="late"):
        verified(copy_bundle(scaled, tmp_path / "wrong"))


def test_served(scaled, scaled_workshop, tmp_path):
    x = images(2)
    with running_server(scaled, tmp_path / "log", "--model-name", "m") as server:
        for name in ("scaled", "ia3", "after"):
            status, found = server.logits("m", name, x)
            assert status == 200, found
            assert_parity(scaled_workshop.truth(name, x), found, "branches", "float32")
