"""A model whose values float16 cannot hold: the site is named, the rest of the export is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from hhdeploy import verify
from hhdeploy.adapters.format import save_adapter
from hhdeploy.backbones.structure import base_sha256
from hhdeploy.bundle import Bundle
from hhdeploy.cli import main
from hhdeploy.errors import ParityError
from hhdeploy.exporters.precision.overflow import Peak, watched
from hhdeploy.exporters.precision.typed import rounding_twin, typed_model
from hhdeploy.runtime import open_session
from hhdeploy.verifying import reference
from hhdeploy.verifying.graphs import add_typed_graph
from tests.support import TINY_MODEL, images, random_adapter, tiny_backbone
from tests.workshop import Workshop, contents

SITE = "blocks.1.mlp.fc1"


@pytest.fixture(scope="module")
def loud(tmp_path_factory) -> Workshop:
    """One hidden unit of the last block is in the hundred thousands; fc2 hardly listens to it."""
    root = tmp_path_factory.mktemp("loud")
    backbone = tiny_backbone(num_classes=5)
    state = backbone.model.state_dict()
    with torch.no_grad():
        state[f"{SITE}.weight"][0] *= 5e4 / state[f"{SITE}.weight"][0].abs().max()
        state["blocks.1.mlp.fc2.weight"][:, 0] *= 1e-6
    facts = replace(backbone.facts, sha256=base_sha256(backbone.model, backbone.facts.classifier))
    adapters = {
        name: random_adapter(facts, targets=("q", "proj"), classes=classes, seed=1)
        for name, classes in (("loud", 7), ("few", 3))
    }
    workshop = Workshop(root, replace(backbone, facts=facts), adapters)
    save_file({n: t.contiguous() for n, t in state.items()}, workshop.checkpoint)
    for name, adapter in adapters.items():
        save_adapter(adapter, workshop.directory(name))
    return workshop


@pytest.mark.parametrize("fold", [False, True])
def test_the_site_is_named_and_the_float32_graph_kept(loud, tmp_path, fold):
    out = tmp_path / "out"
    with pytest.raises(ParityError) as caught:
        loud.export(out, ("loud",), fold=fold, precisions=["float16", "bfloat16"])
    message = str(caught.value)
    assert f"float16 overflows at {SITE}: a value of " in message
    assert "ends at 65504; use bfloat16" in message
    assert f"{out} was written without it" in message
    assert "report" not in message
    bundle = Bundle.open(out)
    assert set(bundle.manifest.graphs) == {"float32", "bfloat16"}
    assert not list(out.glob("model.float16*"))
    assert set(bundle.manifest.files) == {n for n in contents(out) if n != "hhdeploy.json"}
    assert all(a.verified for a in bundle.manifest.adapters)
    report = json.loads((out / "parity.json").read_text())
    assert report["passed"] is True
    assert {s["precision"] for s in report["stages"]} == {"float32", "bfloat16"}
    assert verify(out).passed
    with open_session(out, device="cpu", threads=1) as session:
        assert session.run(images(2), "loud").shape == (2, 7)


def test_columns_past_an_adapter_s_classes_are_no_overflow(loud, tmp_path):
    """Their biases in the bank are -inf, which comes first."""
    with pytest.raises(ParityError) as caught:
        loud.export(tmp_path / "out", ("loud", "few"), precisions=["float16"])
    for name in ("loud", "few"):
        assert f"adapter {name}: float16 overflows at {SITE}: a value of " in str(caught.value)


def test_what_is_wrong_besides_leaves_no_bundle(loud, tmp_path, monkeypatch):
    """An overflow excuses its own graph alone."""
    truth = reference._training_time_outputs

    def wrong(*given):
        return [1.01 * output for output in truth(*given)]

    monkeypatch.setattr(reference, "_training_time_outputs", wrong)
    out = tmp_path / "out"
    with pytest.raises(ParityError, match="No bundle was written") as caught:
        loud.export(out, ("loud",), precisions=["float16"])
    assert "branches float32" in str(caught.value)
    assert "Please report" in str(caught.value)
    assert not out.exists()


def test_a_graph_that_is_added_later_names_the_site_and_changes_nothing(loud, tmp_path):
    path = loud.export(tmp_path / "out", ("loud",)).path
    before = contents(path)
    with pytest.raises(ParityError, match=f"float16 overflows at {SITE}") as caught:
        add_typed_graph(path, "float16")
    assert "Please report" not in str(caught.value)
    assert contents(path) == before
    assert "bfloat16" in add_typed_graph(path, "bfloat16").manifest.graphs


def test_the_command_exits_with_1_and_leaves_a_bundle(loud, tmp_path):
    out = tmp_path / "out"
    options = ["--checkpoint", loud.checkpoint, "--cache-dir", loud.cache, "--verify-images", 2]
    line = ["export", out, "--model", TINY_MODEL, "--adapter", loud.directory("loud")]
    result = CliRunner().invoke(main, [str(a) for a in (*line, *options, "--precision", "float16")])
    assert result.exit_code == 1
    assert f"float16 overflows at {SITE}" in result.stderr
    assert not isinstance(result.exception, ParityError)
    assert set(Bundle.open(out).manifest.graphs) == {"float32"}


def test_every_rounded_value_is_watched_in_order(small):
    twin = rounding_twin(typed_model(ir.load(Bundle.open(small).graph("float32")), "float16"))
    before = ir.to_proto(twin).SerializeToString()
    model, peaks = watched(twin)
    assert ir.to_proto(twin).SerializeToString() == before
    sites = [peak.site for peak in peaks]
    assert sites.index("blocks.0.mlp.fc1") < sites.index(SITE) < sites.index("blocks.1.mlp.fc2")
    assert [o.name for o in model.graph.outputs] == ["logits", *(p.name for p in peaks)]


@pytest.mark.parametrize(
    ("value", "over"), [(65504.0, False), (65519.0, False), (65520.0, True), (float("inf"), True)]
)
def test_half_a_step_past_the_limit_is_rounded_down(value, over):
    peak = Peak("x", "site", ir.DataType.FLOAT16)
    assert peak.limit == 65504
    assert peak.overflows(value) is over
    assert not Peak("x", "site", ir.DataType.BFLOAT16).overflows(1e38)
