"""`bench --serve --abuse`: a server, the honest clients and every abuser, each 2 s.

What it says about the machine's speed is not held here: the control is short, the machine is not
alone, and both sides ask for less, since their requests would be most of what the suite computes.
"""

from __future__ import annotations

import json

from hhdeploy.loadtest.abuse import run
from hhdeploy.loadtest.abuse.kinds import KINDS
from tests.docs.pages import words_of


def test_abuse_of_every_kind_costs_nobody_else_an_answer(call, branches, monkeypatch):
    monkeypatch.setattr(run, "SATURATION_SECONDS", 0.2)
    monkeypatch.setattr(run, "CONTROL_SHARE", 0.05)
    monkeypatch.setattr(run, "SETTLE_SECONDS", 0.0)  # memory needs the real one
    monkeypatch.setattr(run, "SHARE", 0.05)
    monkeypatch.setattr(run, "PAUSE_SECONDS", 0.5)
    command = words_of("docs/serving.md", "hhdeploy bench OUT --serve --abuse", OUT=branches)
    few = ("--seconds", "2", "--device", "cpu", "--threads", "1", "--adapters", "6")
    result = call(*command, *few, "--json")
    found = json.loads(result.stdout)
    assert found["server_exit_code"] == 0
    assert set(found["kinds"]) == set(KINDS)
    for kind, siege in found["kinds"].items():
        assert siege["answers_broken"] == [], (kind, siege["abused"]["faults"])
        assert siege["abused"]["requests"] > 0
        assert siege["abused"]["health"]["count"] > 0
