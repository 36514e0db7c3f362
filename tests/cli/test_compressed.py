"""What a compressed adapter lost goes with it: into the bundle, and onto every page about it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hhdeploy.adapters.config import CONFIG_FILE, Compression
from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.adapters.mixing import merge_adapters
from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.errors import AdapterError
from tests.support import TINY_MODEL

LOST = Compression(5, 0.0123, "blocks.1.mlp.fc1")
SAID = (
    "lora is compressed to rank 5: its logits differ from the original's by 1.2e-02 of their "
    "range, most at blocks.1.mlp.fc1"
)


@pytest.fixture
def lossy(workshop, tmp_path):
    adapter = workshop.adapters["lora"]
    adapter = replace(adapter, config=replace(adapter.config, compressed=LOST))
    save_adapter(adapter, tmp_path / "lora")
    return tmp_path / "lora"


def test_everything_about_a_bundle_says_it(workshop, lossy, tmp_path, succeed, succeed_json):
    out = tmp_path / "b"
    text = succeed(
        "export", "--model", TINY_MODEL, "--checkpoint", workshop.checkpoint, "--verify-images", 1,
        "--cache-dir", workshop.cache, "--adapter", lossy, "--adapter", workshop.directory("alpha"),
        out,
    )  # fmt: skip
    for found in (text, succeed("adapter", "list", out), succeed("verify", out)):
        assert found.count("compressed") == 1
        assert SAID in " ".join(found.split())
    entries = {entry["name"]: entry for entry in succeed_json("adapter", "list", out)}
    assert entries["lora"]["compressed"] == LOST.to_json()
    assert "compressed" not in entries["alpha"]
    assert "compressed to rank 5" in " ".join(succeed("adapter", "inspect", lossy).split())


def test_added_and_mixed(small, lossy, tmp_path):
    from tests.workshop import copy_bundle

    adapter = load_adapter(lossy)
    assert adapter.config.compressed == LOST
    mixed = merge_adapters({"a": (adapter, 0.5), "b": (replace(adapter, source="b"), 0.5)})
    assert mixed.config.compressed == LOST
    worse = replace(LOST, max_range_error=0.5)
    other = replace(adapter, config=replace(adapter.config, compressed=worse))
    assert merge_adapters({"a": (adapter, 1), "b": (other, 1)}).config.compressed == worse
    bundle = copy_bundle(small, tmp_path / "b")
    alpha = load_adapter(bundle / "adapters" / "alpha")
    save_adapter(replace(alpha, config=replace(alpha.config, compressed=LOST)), tmp_path / "again")
    assert add_adapter(bundle, "again", tmp_path / "again").compressed == LOST
    assert Bundle.open(bundle).manifest.adapter("again").compressed == LOST


@pytest.mark.parametrize("wrong", [5, {"rank": 5}, {**LOST.to_json(), "rank": "5"}])
def test_a_damaged_entry_is_refused(lossy, wrong):
    file = lossy / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "compressed": wrong}))
    with pytest.raises(AdapterError, match=r"compressed: expected an object of rank, max_range"):
        load_adapter(lossy)
