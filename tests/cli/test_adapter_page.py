"""`adapter inspect --html`: the paper's point at a glance, in one file that loads nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

import hhdeploy.cli.adapter_page
from hhdeploy.adapters.format import save_adapter
from hhdeploy.adapters.spectra import distance, spectra
from hhdeploy.algebra import effective_rank
from hhdeploy.cli.adapter_page import adapter_page
from tests.browser import CHROMIUM, WHY_NOT, running_browser
from tests.calibration.test_report import Reader
from tests.support import assert_parity, random_adapter

EVIL = "<img src=x onerror=\"alert('boo')\">&<script>alert(1)</script>"


@pytest.fixture(scope="module")
def adapters(tiny_facts):
    """Two of a family, their opposite, a sequential one; ranks that grow with the layer."""
    one = random_adapter(tiny_facts, targets=("q", "v", "fc1"), r=2, seed=1)
    grown = {}
    for name, site in one.sites.items():
        keep = 3 if ".0." in name else site.d.size
        d = np.where(np.arange(site.d.size) < keep, site.d, 0).astype(np.float32)
        grown[name] = replace(site, d=d)
    return {
        "one": replace(one, sites=grown),
        EVIL: random_adapter(tiny_facts, targets=("q", "v", "fc1"), r=2, seed=2),
        "after": random_adapter(tiny_facts, form="sequential", targets=("proj",), seed=3),
        "head": random_adapter(tiny_facts, targets=(), seed=4),
    }


def test_the_figures_are_those_of_the_dense_changes(adapters):
    for name in ("one", "after"):
        adapter = adapters[name]
        found, shares = spectra(adapter), []
        for site in found:
            delta = adapter.delta(site.site)
            dense, d = delta.dense(), delta.diag
            if name == "after":
                dense, d = dense - np.eye(len(dense)), d - 1.0
            else:
                assert site.effective_rank == effective_rank(delta)
            dense_singular = np.linalg.svd(dense, compute_uv=False)
            assert_parity(dense_singular, site.singular, "algebra", "float64")
            assert np.array_equal(site.diagonal, np.sort(np.abs(d))[::-1])
            thin = np.sum((delta.left @ delta.right) ** 2)
            shares.append(d @ d / (d @ d + thin))
        stated = np.asarray([site.diagonal_share for site in found])
        assert_parity(np.asarray(shares), stated, "algebra", "float64")
    low, high = (s for s in spectra(adapters["one"]) if s.site.endswith("fc1"))
    assert high.effective_rank > 2 * low.effective_rank, "planted"


def test_distances(adapters):
    one = adapters["one"]
    assert distance(one, one) == 0.0
    opposite = {
        n: replace(s, u=None, v=None, d=None, lora_B=-s.lora_B) for n, s in one.sites.items()
    }
    alone = {n: replace(s, u=None, v=None, d=None) for n, s in one.sites.items()}
    both = replace(one, sites=alone), replace(one, sites=opposite, head=None)
    assert distance(*both) == pytest.approx(2.0)
    nothing = replace(one, sites={})
    assert distance(one, nothing) == pytest.approx(1.0)
    assert distance(nothing, nothing) == 0.0
    assert 1.0 < distance(one, adapters[EVIL]) < 1.8


def test_names_stay_text_and_nothing_is_loaded(adapters):
    html = adapter_page(adapters)
    page = Reader(html)
    assert EVIL in page.text
    assert {e for e, _ in page.elements}.isdisjoint({"script", "img", "iframe", "object", "link"})
    assert not [e for e in page.elements if "onerror" in e[1]]
    assert not re.search(r"url\(|@import|https?://|<script", html)
    (policy,) = [a["content"] for e, a in page.elements if e == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'")


def test_what_is_drawn(adapters):
    page = Reader(adapter_page(adapters))
    bars = [float(a["height"]) for e, a in page.elements if e == "rect" and a["class"] == "bar"]
    # 6 + 6 + 2 sites, each with its rank and its share; 4 x 4 distances.
    assert len(bars) == 2 * 14 + 16
    ranks = [site.effective_rank for site in spectra(adapters["one"])]
    top = max(site.effective_rank for name in adapters for site in spectra(adapters[name]))
    assert [f"{bar:.1f}" for bar in bars[16:22]] == [f"{46 * rank / top:.1f}" for rank in ranks]
    heat = [float(a["fill-opacity"]) for e, a in page.elements if "fill-opacity" in a]
    assert heat[0] == heat[5] == heat[10] == 0.0
    assert heat[1] == heat[4] > 0.4
    single = Reader(adapter_page({"one": adapters["one"]}))
    assert "Distances" not in single.text
    assert "Effective ranks run from" in single.text
    assert "blocks.0.mlp.fc1: effective rank" in single.text


def test_an_adapter_that_changes_nothing_is_drawn_too(adapters):
    """LoRA before its training: all ranks are 0."""
    sites = {
        name: replace(site, u=None, v=None, d=None, lora_B=np.zeros_like(site.lora_B))
        for name, site in adapters[EVIL].sites.items()
    }
    page = Reader(adapter_page({"new": replace(adapters[EVIL], sites=sites)}))
    bars = [float(a["height"]) for e, a in page.elements if e == "rect" and a["class"] == "bar"]
    assert bars == [0.0] * 6


def test_each_pair_is_compared_once_and_before_the_singular_values(adapters, monkeypatch):
    compared, said = [], []

    def counted(*pair):
        assert said == []
        compared.append(pair)
        return distance(*pair)

    monkeypatch.setattr(hhdeploy.cli.adapter_page, "distance", counted)
    adapter_page(adapters, said.append)
    assert len(compared) == 4 * 3 / 2
    assert len(said) == 4


def test_the_command_writes_it(adapters, tmp_path, succeed, refuse, call, monkeypatch):
    for name in ("one", "after"):
        save_adapter(adapters[name], tmp_path / name)
    out = tmp_path / "page.html"
    said = succeed("adapter", "inspect", tmp_path / "one", tmp_path / "after", "--html", out)
    assert str(out) in said
    assert "2 adapters" in out.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path / "one")
    succeed("adapter", "inspect", ".", "--html", out)
    assert "Adapter one" in out.read_text(encoding="utf-8")
    assert "not a directory" in refuse(
        "adapter", "inspect", tmp_path / "one", "--html", tmp_path / "no" / "page.html"
    )
    assert call("adapter", "inspect", tmp_path / "one", tmp_path / "after").exit_code == 2
    assert call("adapter", "inspect", tmp_path / "one", "--html", out, "--json").exit_code == 2
    assert call("adapter", "inspect", tmp_path / "one", "--html", out, "--no-rank").exit_code == 2


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
def test_in_a_browser(adapters, tmp_path):
    """390 px wide and dark: no error, no request, nothing wider than the window."""
    file = tmp_path / "page.html"
    file.write_text(adapter_page(adapters), encoding="utf-8")
    heard: list[str] = []
    asked: list[str] = []
    with running_browser() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: heard.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        colours = "getComputedStyle(document.body).%s"
        dark, ink = (page.evaluate(colours % key) for key in ("backgroundColor", "color"))
        assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 150
        assert sum(map(int, re.findall(r"\d+", ink)[:3])) > 500
        assert page.locator("h2").all_inner_texts() == ["Distances", *adapters]
        assert page.locator("svg").count() == 1 + 3 * 3
        page.set_viewport_size({"width": 1280, "height": 900})
        box = page.locator("svg").nth(1).bounding_box()
        assert box["width"] > 600
        assert box["height"] > 100
    assert heard == []
    assert asked == [file.as_uri()]
