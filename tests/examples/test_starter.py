"""examples/starter/README.md: its lines run as they stand, and give what docs/serving.md shows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hhdeploy.runtime import open_session
from tests.docs.pages import blocks
from tests.starter import IN_A_SHELL, IN_PYTHON, run_lines
from tests.workshop import ROOT


def test_the_model_in_python(monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(compile(IN_PYTHON.text, IN_PYTHON.page, "exec"), names)
    count = sum(parameter.numel() for parameter in names["model"].parameters())
    assert round(count / 1e6, 1) == 1.2  # as the page says


def test_the_commands(starter):
    assert "15,360 parameters" in run_lines(IN_A_SHELL, "hhdeploy adapter inspect", out=starter)
    assert "brick" in run_lines(IN_A_SHELL, "hhdeploy predict", out=starter).splitlines()[2]


def test_the_answer_that_serving_shows(starter):
    """Of the picture that the page names."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    picture = "images/digits/7/000.png"
    assert f"`picture.png` is their `{picture}`" in page
    (shown,) = (
        json.loads(block.text) for block in blocks("docs/serving.md") if block.kind == "json"
    )
    with open_session(starter, device="cpu", threads=1) as session:
        with Image.open(ROOT / "examples" / "starter" / picture) as opened:
            ((*answers,),) = session.classify([opened], ["digits"])
        entry = session.entry("digits")
    assert entry is not None
    labels, probabilities = (output["data"] for output in shown["outputs"])
    assert labels == [answers[0].label]
    best = [text.split(":") for text in probabilities]
    assert [label for _, _, label in best] == [a.label for a in answers[: len(best)]]
    scores = np.asarray([float(score) for score, _, _ in best])
    assert scores == pytest.approx([a.score for a in answers[: len(best)]], abs=1e-5)
