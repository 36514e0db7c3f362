"""The command line, called in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hhdeploy.cli import main
from tests.calibration.conftest import write_pictures
from tests.support import TINY_ARGS, TINY_MODEL

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


@pytest.fixture
def here(tmp_path, monkeypatch, workshop) -> Path:
    """A working directory with pictures, and in `vit` the workshop's model as timm saves it."""
    from safetensors.torch import save_file

    for number, label in enumerate(("daisy", "rose")):
        write_pictures(tmp_path / "flowers" / label, 8, number)
    shutil.copy(tmp_path / "flowers" / "daisy" / "0.png", tmp_path / "photo.jpg")
    model = workshop.backbone.model
    config = {"architecture": TINY_MODEL, "model_args": TINY_ARGS, "num_classes": 5}
    config["pretrained_cfg"] = model.pretrained_cfg
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()},
        tmp_path / "vit" / "model.safetensors",
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path
