"""The command line, called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hhdeploy.cli import main

Call = Callable[..., Result]


@pytest.fixture
def call(monkeypatch) -> Call:
    """Run ``hhdeploy ARGUMENTS``; anything that would be a traceback fails the test."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
        if unexpected:
            raise AssertionError(f"a traceback: {result.exception!r}") from result.exception
        return result

    return run


@pytest.fixture
def succeed(call) -> Callable[..., str]:
    """Run a command that must succeed; gives its standard output."""

    def run(*arguments: object) -> str:
        result = call(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def succeed_json(succeed) -> Callable[..., Any]:
    """Run a command with --json; gives the document, which is all of standard output."""
    return lambda *arguments: json.loads(succeed(*arguments, "--json"))


@pytest.fixture
def refuse(call) -> Callable[..., str]:
    """Run a command that must end with exit code 1 and one line; gives that line."""

    def run(*arguments: object) -> str:
        result = call(*arguments)
        assert result.exit_code == 1, result.output
        assert not result.stdout
        errors = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
        assert len(errors) == 1, result.stderr
        assert result.stderr.rstrip().endswith(errors[0]), "more than one line"
        assert "Traceback" not in result.stderr
        return errors[0].removeprefix("Error: ")

    return run
