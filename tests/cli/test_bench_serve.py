"""hhdeploy bench --serve, as a user runs it: a real server, real faults."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace

import pytest

from hhdeploy.loadtest import process, run
from tests.docs.pages import words_of
from tests.workshop import contents

FEW = ("--device", "cpu", "--threads", "1", "--adapters", "12", "--clients", "4", "--slots", "6")
SMALL = ("--serve", *FEW, "--churn", "30")


def test_a_server_under_load_and_change_answers_right(succeed_json, branches):
    before = contents(branches)
    command = words_of("docs/howto/many-tasks.md", "hhdeploy bench tasks", tasks=branches)
    found = succeed_json(*command, *FEW, "--requests", "240", "--churn", "75")
    assert found["passed"] is True
    verdicts = found["verdicts"]
    assert verdicts["right"] + verdicts["refused as expected"] == sum(verdicts.values()) == 240
    assert verdicts["right"] > 120
    assert found["told_apart"] == 1.0
    assert found["changes"]["replace"]["count"] > 0
    server = found["server"]
    assert server["requests"] == verdicts["right"]
    assert server["evictions"] > 0
    assert 0 < server["batches"] <= server["images"] == verdicts["right"]
    groups = found["latencies"]
    assert groups["all"]["count"] == verdicts["right"]
    assert sum(g["count"] for g in groups.values()) == 2 * groups["all"]["count"]
    assert found["server_exit_code"] == 0
    assert contents(branches) == before, "the bundle was changed"


def test_open_loop_and_several_images_a_request(succeed, branches):
    command = words_of("docs/serving.md", "hhdeploy bench OUT --serve --rate", OUT=branches)
    text = succeed(*command, *FEW, "--requests", "60", "--images-per-request", "3")
    assert "passed: every answer was what its adapter had to say" in text
    assert "variants with random values, made for this test" in text
    assert "60 requests over 12 adapters of branches" in text


def test_planted_faults_fail(call, branches, monkeypatch):
    """Two adapters' expectations are swapped: the server now answers 'wrong'."""
    expect = run.expect

    def swapped(*arguments):
        expected = expect(*arguments)
        first, second, *rest = expected.logits
        return replace(expected, logits=[second, first, *rest])

    monkeypatch.setattr(run, "expect", swapped)
    result = call("bench", branches, *SMALL, "--requests", "100", "--skew", "0", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["passed"] is False
    wrong = found["verdicts"]["wrong"]
    assert 0 < wrong < 100
    assert sum(found["verdicts"].values()) == 100
    assert any("what rival version" in fault for fault in found["faults"])


def test_a_server_that_is_killed_loses_requests(call, branches, monkeypatch):
    """SIGKILL under load: what was under way is lost, and the command fails."""
    servers = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            servers.append(self)

    class KillingClient(run.Client):
        asked = 0

        async def infer(self, body, json_length):
            self.asked += 1
            if self.asked == 40:
                servers[0].kill()
            return await super().infer(body, json_length)

    monkeypatch.setattr(process.subprocess, "Popen", Popen)
    monkeypatch.setattr(run, "Client", KillingClient)
    result = call("bench", branches, *SMALL, "--requests", "100", "--churn", "0")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert re.search(r"^lost +[1-9]", result.stdout, re.MULTILINE)
    assert re.search(r"^unanswered +0", result.stdout, re.MULTILINE)
    assert "does not answer" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapters", "3"), "--adapters needs --serve"),
        (("--rate", "3"), "--rate needs --serve"),
        (("--serve", "--runs", "3"), "--runs does not go with --serve"),
        (("--serve", "--batch", "3"), "--batch does not go with --serve"),
        (("--abuse", "idle"), "--abuse needs --serve"),
        (("--serve", "--seconds", "3"), "--seconds needs --abuse"),
        (("--serve", "--abuse", "idle", "--rate", "3"), "--rate does not go with --abuse"),
    ],
)
def test_options_that_would_do_nothing_are_refused(call, branches, arguments, message):
    result = call("bench", branches, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_folded_bundle_is_refused(refuse, folded):
    assert "Export without --fold" in refuse("bench", folded, "--serve", "--json")
