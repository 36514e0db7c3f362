"""The head-to-head benchmark: what its page says of given figures; batches; merged graphs."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from benchmarks.peers import page
from benchmarks.peers.plots import Axis, nice_ticks
from benchmarks.peers.rounds import AGAIN, INT8, OURS, PEERS, Entrant, race
from benchmarks.peers.tasks import BATCH, Case, by_task, mixes, range_error

BEST = "OpenVINO, a model a task"


def raced(peer, speed, bank=8, **changes):
    return {
        "model": "ViT-S/16",
        "bank": bank,
        "peer": peer,
        "images_per_s": speed,
        "p50_ms": 8000 / speed,
        "p99_ms": 9000 / speed,
        "runs": 7,
        "first_s": 1.0,
        "error": 3e-7,
        "top1": 1.0,
        "right": True,
        "ours_faster": 1.0,
        **changes,
    }


def changed(peer, bank, mb):
    return {
        "model": "ViT-S/16",
        "bank": bank,
        "peer": peer,
        "rss_mb": mb,
        "add_ms": 4.0,
        "switch_ms": None if peer == OURS else 2.5,
    }


@pytest.fixture
def content():
    return {
        "machine": {"cpu": "A processor", "cores": 2, "threads": 2, "versions": {"peft": "1.2"}},
        "date": "2026-01-02",
        "command": "python all",
        "races": [
            raced(BEST, 20.0),
            raced("PEFT mixed batch", 80.0, right=False, error=0.5),
            raced(OURS, 16.0),
            raced(AGAIN, 16.0, ours_faster=1.03),
            raced(INT8, 60.0, error=0.02),
            {"model": "ViT-S/16", "bank": 64, "peer": BEST, "failed": "does not fit"},
        ],
        "latencies": [{"model": "ViT-S/16", "peer": OURS, "batch": b, "p50_ms": b} for b in (1, 8)],
        "changes": [changed(OURS, 1, 300), changed(OURS, 64, 330), changed(BEST, 1, 200)],
        "accuracies": [{"graph": "INT8", "images": 11, "top1": 81.0, "p50_ms": 3.0}],
    }


def test_a_loss_is_called_one_and_a_wrong_answer_is_no_best_peer(content):
    text = page.tables(content)
    assert f"best peer ({BEST}): OpenVINO 0.80x (a loss), OpenVINO INT8 3.00x; control 1.03" in text
    assert "5e-01 **off**" in text
    assert text.count("**off**") == 1
    assert "- ViT-S/16, OpenVINO, a model a task, 64: does not fit" in text
    assert f"| ViT-S/16, {OURS} | 1 / 64 | 300 / 330 | 1.10x | 4 | none needed |" in text
    content["races"][2]["images_per_s"] = 21.0
    assert "a loss" not in page.tables(content)


def test_the_page_shows_its_drawings(content):
    text = page.section(content)
    for name, drawing in page.drawings(content).items():
        assert f"({name})" in text
        ElementTree.fromstring(drawing)


def test_drawings_place_points_where_their_values_are(content):
    drawing = page.drawings(content)["peers-memory-vit-s.svg"]
    root = ElementTree.fromstring(drawing)
    (line,) = [
        e.attrib["points"].split()
        for e in root.iter("{http://www.w3.org/2000/svg}polyline")
        if e.attrib["stroke-width"] == "2" and " " in e.attrib["points"]
    ]
    (left, low), (right, high) = (map(float, place.split(",")) for place in line)
    assert left < right
    assert low > high  # more memory is further up
    assert Axis("", (1.0, 8.0, 64.0), log=True).place(8.0) == pytest.approx(0.5)
    assert nice_ticks([3.0, 19.0]) == (0.0, 5.0, 10.0, 15.0, 20.0)
    assert nice_ticks([81.0, 82.0], zero=False)[0] == pytest.approx(81.0)


def test_batches_use_the_whole_bank_and_differ_within():
    assert mixes(1) == [(0,) * BATCH]
    assert {n for mix in mixes(64) for n in mix} == set(range(64))
    assert all(len(set(mix)) == BATCH for bank in (8, 64) for mix in mixes(bank))
    assert list(by_task(["b", "a", "b"])) == [("b", [0, 2]), ("a", [1])]


class Table:
    """A peer that answers from a table, wrongly for one adapter if asked to, or fails."""

    promised = "float32"

    def __init__(self, truth, wrong=(), fails_at=None):
        self.truth, self.wrong, self.fails_at = truth, wrong, fails_at
        self.has = []

    def add(self, name):
        if len(self.has) == self.fails_at:
            raise RuntimeError("no more\nroom")
        self.has.append(name)

    def run(self, images, names):
        rows = [int(name.removeprefix("task")) for name in names]
        assert set(names) <= set(self.has)
        found = np.stack([self.truth[n, i] for i, n in enumerate(rows)]).astype(np.float32)
        for i, n in enumerate(rows):
            found[i] += n in self.wrong
        return found

    def close(self):
        self.has.clear()


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setenv("HHDEPLOY_BENCH_DIR", str(tmp_path))
    made = Case("ViT-S/16")
    made.folder.mkdir(parents=True)
    np.save(made.folder / "images.npy", np.zeros((BATCH, 3, 2, 2), np.float32))
    np.save(made.folder / "truth.npy", np.random.default_rng(0).standard_normal((11, BATCH, 5)))
    return made


def test_a_race_tells_right_wrong_and_failed_apart(case):
    truth = np.load(case.folder / "truth.npy")
    names = [OURS, "PEFT mixed batch", "PEFT set_adapter"]
    peers = (Table(truth), Table(truth, wrong=(7,)), Table(truth, fails_at=5))
    entrants = [Entrant(name, peer) for name, peer in zip(names, peers, strict=True)]
    right, _, _ = race(case, entrants, 1, 0)
    assert right["right"]
    assert right["ours_faster"] == 1
    right, wrong, failed = race(case, entrants, 8, 0)
    assert right["right"]
    assert right["error"] < 1e-6
    assert not wrong["right"]
    assert failed["failed"] == "RuntimeError: no more room"
    assert set(names) <= set(PEERS)


def test_shapes_and_not_a_number_are_infinitely_wrong():
    truth = np.arange(6.0).reshape(2, 3)
    assert range_error(truth, np.full((2, 3), np.nan, np.float32)) == float("inf")
    assert range_error(truth, np.zeros((2, 2), np.float32)) == float("inf")
    assert range_error(truth, (truth + 0.5).astype(np.float32)) == pytest.approx(0.1)


def test_what_was_not_measured_again_is_kept(content):
    other = {**content, "date": "2026-01-01"}
    other["races"] = [{**r, "model": "ViT-B/16"} for r in content["races"]]
    other["races"].append(raced(BEST, 9.0, bank=1))
    other["servers"] = [raced("hhdeploy serve, OpenVINO", 9.0)]
    new = {
        "machine": content["machine"],
        "date": "2026-01-02",
        "command": "python some",
        "races": content["races"][2:3],
        "servers": [],
    }
    found = page.merged(other, new)
    assert found["races"] == [*other["races"], *new["races"]]
    assert found["servers"] == other["servers"]
    assert found["accuracies"] == content["accuracies"]
    assert found["date"] == "2026-01-01, 2026-01-02"
    assert found["command"] == "python all; python some"
    assert page.merged(found, new)["command"] == found["command"]
    assert page.merged(None, new)["accuracies"] == []
    with pytest.raises(SystemExit, match="another machine"):
        page.merged(other, {**new, "machine": {}})


def test_servers_are_told_apart_from_peers_too(content):
    named = {"LitServe, merged models": 40.0, "hhdeploy serve, OpenVINO": 60.0}
    content["servers"] = [
        *(raced(name, speed, rss_mb=311) for name, speed in named.items()),
        raced("hhdeploy serve, OpenVINO again", 60.0, ours_faster=1.01),
        {"model": "ViT-S/16", "bank": 64, "peer": "LitServe, merged models", "failed": "too large"},
    ]
    text = page.tables(content)
    assert "hhdeploy serve over the best peer (LitServe, merged models): OpenVINO 1.50x; " in text
    assert "| ViT-S/16, LitServe, merged models | 40.0 (200.0 / 225.0) | – | 311 / – |" in text
    assert "- ViT-S/16, LitServe, merged models, 64: too large" in text
