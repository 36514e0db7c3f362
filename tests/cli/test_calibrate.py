"""`hhdeploy calibrate`: table, JSON, check, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hhdeploy.bundle import Bundle
from hhdeploy.cli.calibrate import command
from hhdeploy.cli.wording import as_command_line
from tests.labelled import make_undecided, write_close_calls
from tests.workshop import contents

pytest.importorskip("nncf", reason="NNCF is not installed")


@pytest.fixture(scope="module")
def bundle(workshop, small, tmp_path_factory) -> Path:
    return make_undecided(workshop, small, tmp_path_factory.mktemp("undecided"))


@pytest.fixture(scope="module")
def images(bundle, tmp_path_factory) -> Path:
    return write_close_calls(bundle, tmp_path_factory.mktemp("close"), 12)


@pytest.fixture(scope="module")
def common(images, tmp_path_factory) -> tuple[object, ...]:
    cache = tmp_path_factory.mktemp("cache")
    return ("--data", images, "--images", 8, "--cache-dir", cache, "--threads", 1)


def test_a_table_a_verdict_and_a_report(succeed, bundle, common, tmp_path):
    report = tmp_path / "report.html"
    shown = succeed("calibrate", bundle, *common, "--report", report)
    lines = shown.splitlines()
    for task in ("alpha", "gamma", "mean"):
        assert any(line.startswith(f"{task} ") for line in lines), shown
    assert any(line.startswith("INT8 costs") for line in lines)
    assert any(line.startswith("Warning: adapter 'alpha': judged on 8 images") for line in lines)
    assert f"Added {Bundle.open(bundle).manifest.graphs['int8']}" in shown
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "int8" in Bundle.open(bundle).manifest.graphs


def test_json_is_what_the_bundle_keeps(succeed_json, bundle, common):
    arguments = ("--precision", "int8-weights", "--exclude", "blocks.0.*", "--max-drop", 100)
    found = succeed_json("calibrate", bundle, *common, *arguments)
    opened = Bundle.open(bundle)
    kept = json.loads(opened.read(opened.manifest.named("calibration.int8-weights.json")))
    assert {key: found[key] for key in kept} == kept
    assert found["guard"]["kept"] == []
    assert found["file"] == opened.manifest.graphs["int8-weights"]
    excluded = [name for name, site in found["sites"].items() if not site["quantised"]]
    assert excluded
    assert all(name.startswith("blocks.0.") for name in excluded)


def test_checking_an_adapter_changes_nothing(succeed, succeed_json, bundle, common, images):
    succeed("calibrate", bundle, *common)
    before = contents(bundle)
    check = ("calibrate", bundle, "--data", images, "--check", "gamma")
    found = succeed_json(*check)
    assert (found["adapter"], found["images"]) == ("gamma", 12)
    assert found["inside"] is (not found["excess"])
    assert as_command_line(found["advice"]) in succeed(*check)
    assert contents(bundle) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "nowhere is not a directory"),
        (("--data", "{images}/alpha"), "expected DIR/ADAPTER/CLASS/image"),
        (("--data", "{images}", "--images", 3), "and a bound of --images that takes them"),
        (("--data", "{images}", "--images", 999, "--max-drop", 1), "Pass others as --eval-data"),
        (("--data", "{images}", "--report", "no/where.html"), "no is not a directory"),
        (("--data", "{images}", "--check", "nobody"), "unknown adapter 'nobody'"),
        (("--data", "{images}", "--check", "alpha", "--precision", "fp8"), "no fp8 calibration"),
    ],
)
def test_refusals(refuse, bundle, images, arguments, message):
    before = contents(bundle)
    given = [str(a).format(images=images) for a in arguments]
    assert message in refuse("calibrate", bundle, *given)
    assert contents(bundle) == before


@pytest.mark.parametrize(
    "arguments",
    [(), ("--data", "x", "--precision", "int4"), ("--data", "x", "--max-drop", "-1")],
)
def test_calls_that_are_no_commands(arguments):
    result = CliRunner().invoke(command, ["bundle", *arguments])
    assert result.exit_code == 2
    assert "Usage: " in result.output
