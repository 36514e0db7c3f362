"""hhdeploy ovms from the command line."""

from __future__ import annotations

import json
import re

from tests.workshop import contents


def test_what_it_writes_and_says(succeed, small, folded, tmp_path):
    out = tmp_path / "models"
    text = succeed("ovms", small, out, "--name", "vit", "--target-device", "AUTO")
    written = re.findall(r"^  (/.*)$", text, re.MULTILINE)
    assert sorted(written) == sorted(str(out / name) for name in contents(out))
    assert f"config_path is {out / 'config.json'}\n" in text
    assert (
        "images float32 [batch, 3, 32, 32], and adapter_ids int64 [batch]: alpha 1, gamma 2" in text
    )
    (entry,) = json.loads((out / "config.json").read_text())["model_config_list"]
    assert entry["config"]["target_device"] == "AUTO"
    assert "adapter_ids" not in succeed("ovms", folded, out)


def test_as_json(succeed_json, small, refuse, tmp_path):
    answer = succeed_json("ovms", small, tmp_path / "models")
    assert answer == {
        "repository": str(tmp_path / "models"),
        "model": "small",
        "files": ["config.json", *sorted(n for n in contents(tmp_path / "models") if "/" in n)],
        "adapters": {"alpha": 1, "gamma": 2},
        "unverified": [],
    }
    assert "already exists" in refuse("ovms", small, tmp_path / "models")
    succeed_json("ovms", small, tmp_path / "models", "--overwrite", "--precision", "bfloat16")
