"""`hhdeploy adapter import | extract | merge | diff`: what they say and write."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.cli import main
from tests.support import TINY_ARGS, TINY_MODEL, assert_parity


def run(*arguments):
    """Exit code and all that was said, in one line."""
    done = CliRunner().invoke(main, ["adapter", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture
def model(workshop):
    args = json.dumps(TINY_ARGS)
    return ("--model", TINY_MODEL, "--model-args", args, "--checkpoint", workshop.checkpoint)


def test_import_says_what_it_assumed(workshop, model, tmp_path):
    tensors = load_file(workshop.directory("alpha") / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    code, said = run("import", tmp_path / "a.pth", tmp_path / "out", *model)
    assert code == 0
    assert "preprocessing assumed, the model's: 32x32, bicubic" in said
    stated = {"mean": [0.1, 0.2, 0.3], "crop_pct": 1.0}
    again = ("--preprocess", json.dumps(stated), "--overwrite")
    code, said = run("import", tmp_path / "a.pth", tmp_path / "out", *model, *again)
    assert code == 0
    assert "assumed" not in said and "compress" not in said
    code, said = run(
        "import", tmp_path / "a.pth", tmp_path / "out", *model, *again, "--compress-rank", "1"
    )
    assert code == 0
    assert "--compress-rank 1 compressed nothing: no change is dense" in said
    found = load_adapter(tmp_path / "out").config.preprocess
    assert (found.mean, found.crop_pct) == ((0.1, 0.2, 0.3), 1.0)
    assert found.std == workshop.backbone.facts.preprocess.std
    for odd, message in (
        ('{"men": [1]}', "found men"),
        ('{"mean": [1]}', "--preprocess: "),
        ('{"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}', "by 255"),
        ('{"mean": [NaN, 0.5, 0.5]}', "finite"),
    ):
        code, said = run("import", tmp_path / "a.pth", tmp_path / "x", *model, "--preprocess", odd)
        assert code == 2
        assert message in said


def test_weights_that_lie_beside_the_model_are_recorded(workshop, tmp_path):
    """A folder of timm has them, a name of timm would have to be fetched."""
    tensors = load_file(workshop.directory("alpha") / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    folder = tmp_path / "vit"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(workshop.checkpoint.read_bytes())
    config = {"architecture": TINY_MODEL, "model_args": TINY_ARGS}
    config["pretrained_cfg"] = workshop.backbone.model.pretrained_cfg
    (folder / "config.json").write_text(json.dumps(config))
    code, said = run("import", tmp_path / "a.pth", tmp_path / "out", "--model", folder)
    assert code == 0, said
    digest = workshop.backbone.facts.sha256
    assert load_adapter(tmp_path / "out").config.base_sha256 == digest
    named = ("--model", TINY_MODEL, "--model-args", json.dumps(TINY_ARGS))
    code, said = run("import", tmp_path / "a.pth", tmp_path / "b", *named)
    assert "base_sha256 is unknown" in said
    assert load_adapter(tmp_path / "b").config.base_sha256 is None


def test_extract(workshop, model, tmp_path):
    state = load_file(workshop.checkpoint)
    generator = torch.Generator().manual_seed(0)
    state["blocks.0.attn.proj.weight"] += 0.1 * torch.outer(
        torch.randn(48, generator=generator), torch.randn(48, generator=generator)
    )
    state["norm.weight"] *= 1.5
    torch.save(state, tmp_path / "tuned.pth")
    code, said = run("extract", tmp_path / "tuned.pth", tmp_path / "out", *model)
    assert code == 0
    assert "1 sites" in said
    assert "It can be folded (export --fold) and is no side branch: norm.weight" in said
    code, said = run("extract", tmp_path / "none.pth", tmp_path / "x", *model)
    assert code == 1
    assert "none.pth" in said


def test_merge_of_replaced_parameters_takes_the_model(scaled_workshop, model, tmp_path):
    norms = scaled_workshop.directory("norms")
    code, said = run("merge", f"{norms}=0.5", tmp_path / "mixed")
    assert code == 1
    assert "Give the --model, or weights that are 1 together" in said
    said_model = (*model[:2], *model[4:])  # the adapter says the arguments
    code, said = run("merge", f"{norms}=0.5", tmp_path / "mixed", *said_model)
    assert code == 0, said
    assert "3 whole parameters" in said
    whole, half = (load_adapter(path).values for path in (norms, tmp_path / "mixed"))
    own = scaled_workshop.backbone.model.get_parameter("blocks.1.norm2.weight").detach().numpy()
    expected = (own + whole["blocks.1.norm2.weight"]) / 2
    assert_parity(expected, half["blocks.1.norm2.weight"], "algebra", "float32")
    adapter = scaled_workshop.adapters["norms"]
    odd = replace(adapter.config, base_model_args={**adapter.config.base_model_args, "depth": 3})
    save_adapter(replace(adapter, config=odd), tmp_path / "odd")
    parts = (f"{norms}=0.5", f"{tmp_path / 'odd'}=0.6")
    code, said = run("merge", *parts, tmp_path / "x", *said_model)
    assert code == 1
    assert "disagree on base_model_args" in said
    assert "pass --model-args" in said


def test_merge_and_diff(workshop, tmp_path):
    alpha, rival = workshop.directory("alpha"), workshop.directory("rival")
    mixed = tmp_path / "mixed"
    code, said = run("merge", f"{alpha}=0.5", f"{rival}=0.5", mixed)
    assert code == 1
    assert "different classifiers" in said
    assert "--head" in said
    code, _ = run("merge", f"{alpha}=0.5", f"{rival}=0.5", mixed, "--head", alpha)
    assert code == 0
    assert load_adapter(mixed).config.extra["merged_from"] == {str(alpha): 0.5, str(rival): 0.5}
    for odd in ("alpha", "alpha=x", "alpha=nan", "=1"):
        assert run("merge", odd, tmp_path / "x")[0] == 2, odd
    assert run("merge", f"{alpha}=1", f"{alpha}=2", tmp_path / "x")[0] == 2
    assert run("merge", f"{alpha}=1", tmp_path / "x", "--model-args", "{}")[0] == 2
    assert "The adapters are equal." in run("diff", alpha, alpha)[1]
    assert "The adapters differ." in run("diff", alpha, mixed)[1]
    found = json.loads(
        CliRunner().invoke(main, ["adapter", "diff", str(alpha), str(mixed), "--json"]).output
    )
    assert not found["equal"]
    assert {site["site"] for site in found["sites"]} >= {"head", "blocks.0.attn.proj"}


def test_pack_and_unpack(succeed, branches, tmp_path):
    packed, out = tmp_path / "gamma.onnx_adapter", tmp_path / "gamma"
    assert f"Wrote {packed}" in succeed("adapter", "pack", branches, "gamma", packed)
    assert f"Wrote {out}: " in succeed("adapter", "unpack", branches, packed, out)
    # Which is what it says to pass where there is one.
    assert f"Wrote {out}: " in succeed("adapter", "unpack", branches, packed, out, "--overwrite")
    assert "sequential" in succeed("adapter", "inspect", out, "--no-rank")
