"""The starter models: what their README.md says to do with them, done."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from hhdeploy.cli import main
from tests.docs.pages import Block, blocks, commands
from tests.workshop import ROOT

IN_PYTHON, IN_A_SHELL = blocks("examples/starter/README.md")
# Images per task; the starter models ship about 90 of each.
IMAGES = 24


def run_lines(block: Block, head: str, *, out: Path) -> str:
    """Run the lines of a block that begin so, OUT being ``out``: what they print."""
    variable, *lines = commands(block)
    name, folder = variable.split("=")
    printed = []
    for line in lines:
        words = shlex.split(line.replace(f"${name}", folder))
        if line.startswith(head):
            words = [str(out) if word == "OUT" else word for word in words[1:]]
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(ROOT)
                few = ["--verify-images", str(IMAGES)] if words[0] == "export" else []
                done = CliRunner().invoke(main, [*words, *few])
            assert done.exit_code == 0, done.output
            printed.append(done.stdout)
    assert printed, head
    return "".join(printed)


def export_as_the_page_does(out: Path) -> None:
    """All four adapters and the backbone's own classifier, in ``out``."""
    run_lines(IN_A_SHELL, "hhdeploy export", out=out)
