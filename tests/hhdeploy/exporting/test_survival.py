"""An adapter that a precision rounds away is named, or refused where nothing is left of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hhdeploy.adapters.format import SiteTensors, save_adapter
from hhdeploy.algebra import SiteDelta
from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.bundle.rounding import _inner, lost_in_float16, share_left
from hhdeploy.errors import CapacityError, PlanError
from hhdeploy.exporters import fold as fold_module
from hhdeploy.exporters.precision import typed
from hhdeploy.exporting.bundles import export
from hhdeploy.verifying.bundles import verify_against_torch
from hhdeploy.verifying.graphs import add_typed_graph
from hhdeploy.verifying.survival import _rounded, check_folded, check_quantised
from tests.support import TINY_MODEL, random_adapter, tiny_backbone
from tests.workshop import other_workshop

ALLOWED = {"allow_no_effect": True}
Q, PROJ = "blocks.0.attn.qkv.q", "blocks.1.attn.proj"


def lora(facts, sizes, seed=3):
    """LoRA with B of a size of its own at every site."""
    adapter = random_adapter(facts, targets=tuple(sizes), r=2, classes=None, seed=seed)
    sites = {
        name: SiteTensors(lora_A=t.lora_A, lora_B=(t.lora_B * sizes[name]).astype(np.float32))
        for name, t in adapter.sites.items()
    }
    return replace(adapter, sites=sites)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory, workshop):
    """A backbone in bfloat16, as half of all checkpoints are, and adapters of all sizes."""
    root = tmp_path_factory.mktemp("coarse")
    backbone = tiny_backbone(num_classes=5)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    facts = replace(backbone.facts, sha256="")
    made = {
        "small": lora(facts, {Q: 1e-5, PROJ: 1e-5}),
        "half": lora(facts, {Q: 1e-5, PROJ: 1.0}),
        "large": lora(facts, {Q: 1.0, PROJ: 1.0}),
    }
    made = {n: replace(a, config=replace(a.config, base_sha256=None)) for n, a in made.items()}
    workshop = replace(other_workshop(root, workshop, made), backbone=backbone)
    checkpoint = root / "coarse.safetensors"
    save_file({n: t.contiguous() for n, t in backbone.model.state_dict().items()}, checkpoint)
    return workshop, checkpoint


def exported(coarse, out, name, precisions=("bfloat16",), **options):
    workshop, checkpoint = coarse
    lines: list[str] = []
    result = export(
        TINY_MODEL,
        {name: workshop.directory(name)},
        out,
        checkpoint=checkpoint,
        cache=workshop.cache,
        precisions=precisions,
        verify_images=1,
        progress=lines.append,
        **options,
    )
    return result, [line for line in lines if "round" in line and "adapter '" in line]


def test_of_a_folded_adapter_nothing_may_be_left(coarse, tmp_path):
    with pytest.raises(PlanError, match=rf"'small': bfloat16 rounds all .*: {Q}, {PROJ}\."):
        exported(coarse, tmp_path / "b", "small", fold=True)
    assert not (tmp_path / "b").exists()
    # In float16 the same weights have finer steps, and in float32 all is there.
    _, lines = exported(coarse, tmp_path / "b", "small", ("bfloat16",), fold=True, **ALLOWED)
    assert [Q in line for line in lines] == [True]
    exported(coarse, tmp_path / "c", "small", (), fold=True)
    with pytest.raises(PlanError, match="bfloat16 rounds all"):
        add_typed_graph(tmp_path / "c", "bfloat16")
    assert list(Bundle.open(tmp_path / "c").manifest.graphs) == ["float32"]


def test_a_lost_site_is_named(coarse, tmp_path, monkeypatch):
    folds = []
    fold = fold_module._folded_weight
    monkeypatch.setattr(
        fold_module, "_folded_weight", lambda *a: (folds.append(a[1].path), fold(*a))[1]
    )
    _, lines = exported(coarse, tmp_path / "b", "half", ("bfloat16", "float16"), fold=True)
    # To check all precisions, and for each of the three graphs.
    assert [folds.count(path) for path in sorted(set(folds))] == [4, 4]
    assert lines == [
        f"adapter 'half': {precision} rounds away its change of {Q}"
        for precision in ("bfloat16", "float16")
    ]


def test_side_branches_are_judged_by_the_logits(coarse, tmp_path, monkeypatch):
    with pytest.raises(
        PlanError, match="'small': bfloat16 rounds all of it away: it moves no logit"
    ):
        exported(coarse, tmp_path / "small", "small")
    _, lines = exported(coarse, tmp_path / "small", "small", **ALLOWED)
    assert ["moves no logit there" in line for line in lines] == [True]
    twins, make = [], typed.rounding_twin
    monkeypatch.setattr(typed, "rounding_twin", lambda graph: (twins.append(graph), make(graph))[1])
    assert not exported(coarse, tmp_path / "large", "large", ("bfloat16", "float16"))[1]
    assert len(twins) == 2, "of each graph one, for parity and for what adapters do"


def test_float16_loses_small_values_of_a_row(coarse, tmp_path):
    workshop, _ = coarse
    tiny = {Q: 1e-9, PROJ: 1e-9}
    facts = replace(workshop.backbone.facts, sha256="")
    adapter = lora(facts, tiny)
    adapter = replace(adapter, config=replace(adapter.config, base_sha256=None))
    save_adapter(adapter, tmp_path / "tiny")
    mixed = lora(facts, {Q: 1e-9, PROJ: 1.0})
    mixed = replace(mixed, config=replace(mixed.config, base_sha256=None))
    save_adapter(mixed, tmp_path / "mixed")
    exported(coarse, tmp_path / "b", "large", ("float16",))
    lines: list[str] = []
    add_adapter(tmp_path / "b", "mixed", tmp_path / "mixed", progress=lines.append)
    assert f"adapter 'mixed': float16 rounds away its change of {Q}" in lines
    with pytest.raises(CapacityError, match=rf"'tiny': float16 rounds all .* {Q}, {PROJ}"):
        add_adapter(tmp_path / "b", "tiny", tmp_path / "tiny")
    assert [a.name for a in Bundle.open(tmp_path / "b").manifest.adapters] == ["large", "mixed"]


def test_every_part_of_a_row_counts(scaled):
    bundle = Bundle.open(scaled)
    layout, row = bundle.manifest.layout, bundle.bank()[1].copy()
    assert lost_in_float16(layout, row)[0] == []
    part = next(p for p in layout.parts if p.endswith("/s_out"))
    layout.views(row)[part][0] *= 1e-9
    lost, count = lost_in_float16(layout, row)
    assert [name.rpartition(".")[2] for name in lost] == ["s_out"]
    assert count > 10


def test_the_inner_product_is_that_of_the_dense_matrices():
    random = np.random.default_rng(5)
    one, other = (
        SiteDelta(*(random.standard_normal(s) for s in ((5,), (7, k), (k, 5)))) for k in (2, 3)
    )
    dense = np.vdot(one.dense(), other.dense())
    np.testing.assert_array_max_ulp(_inner(one, other), dense, maxulp=16)  # other order of sums
    assert abs(one.diag @ other.diag - dense) > 0.01 * abs(dense), "planted"


def test_a_sequential_or_scaled_adapter_is_taken_off_again(scaled_workshop, tmp_path):
    """What the weight was before it is found, so that all of it counts as left."""
    import onnx_ir as ir

    for name in ("after", "ia3"):
        path = scaled_workshop.export(tmp_path / name, (name,), fold=True, verify=False).path
        model = ir.load(path / "model.onnx")
        adapter = scaled_workshop.adapters[name]
        assert check_folded(name, adapter, model, ["int8"]) == []
        weak = replace(adapter, strength=1e-12)
        for precision in ("bfloat16", "int8"):
            with pytest.raises(PlanError, match=f"{precision} rounds all"):
                check_folded(name, weak, model, [precision])
        assert check_folded(name, weak, model, ["int8"], only=()) == [], "they stay float32"


def test_calibration_asks_too(scaled_workshop, scaled, tmp_path):
    def quantised(*low):
        sites = {name: SimpleNamespace(quantised=True) for name in low}
        return SimpleNamespace(precision="int8", sites=sites)

    exam = SimpleNamespace(questions=())
    scaled_workshop.export(
        tmp_path / "b", ("ia3",), fold=True, verify=False, strengths={"ia3": 1e-12}, **ALLOWED
    )
    bundle = Bundle.open(tmp_path / "b")
    with pytest.raises(PlanError, match="int8 rounds all"):
        check_quantised(bundle, quantised("blocks.0.attn.qkv"), exam)
    assert check_quantised(bundle, quantised(), exam) == []
    assert check_quantised(Bundle.open(scaled), quantised(), exam) == []


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantised_weights_have_a_step_a_row(precision):
    values = np.asarray([[127.0, 0.4, 3.2], [1.27, 0.004, 0.032]])
    found = _rounded(values, precision, values)
    np.testing.assert_array_max_ulp(found[0], 100 * found[1], maxulp=2)  # two products in float64
    if precision == "int8":
        assert found[0].tolist() == [127.0, 0.0, 3.0]
    change = np.asarray([[0.0, 0.001, 0.001], [0.0, 0.0, 0.0]])
    left = _rounded(values + change, precision, values) - found
    assert share_left(change[:1], left[:1]) == 0.0, "gone"


def test_what_a_precision_makes_of_a_later_adapter_is_said(coarse, tmp_path):
    """Its rows come beside a graph that is there: parity alone would be as good without it."""
    workshop, checkpoint = coarse
    path, said = exported(coarse, tmp_path / "b", "large")[0].path, []
    add_adapter(path, "small", workshop.directory("small"))
    verify_against_torch(path, checkpoint=checkpoint, verify_images=1, progress=said.append)
    assert ["'small': bfloat16 rounds all of it away" in line for line in said].count(True) == 1
    assert not [line for line in said if "'large'" in line and "round" in line]
