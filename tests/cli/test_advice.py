"""What messages advise can be done: the commands take it, with these very options."""

from __future__ import annotations

import shlex

import click
import pytest

from hhdeploy.api import _check_precisions
from hhdeploy.bundle import Bundle, graph_hint
from hhdeploy.cli import main
from hhdeploy.errors import BundleError
from hhdeploy.parity import PARITY

TYPED = sorted({p for stage, p in PARITY if stage == "twin"})
QUANTISED = sorted({p for stage, p in PARITY if stage == "quantised"})


def parsed(words: list[str]) -> click.Context:
    """``hhdeploy COMMAND ...``, read by click and not run. Raises its UsageError."""
    program, name, *arguments = words
    assert program == "hhdeploy"
    command = main.get_command(click.Context(main), name)
    assert command is not None, f"there is no command {name}"
    return command.make_context(name, arguments)


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_missing_quantised_graph_comes_from_calibrate(small, precision):
    with pytest.raises(BundleError, match=f"no {precision} graph; it has float32") as caught:
        Bundle.open(small).graph(precision)
    advice = str(caught.value).partition("Add it with: ")[2]
    given = parsed(shlex.split(advice)).params
    assert (given["bundle"], given["precision"]) == (small, precision)


@pytest.mark.parametrize("precision", TYPED)
def test_a_missing_typed_graph_comes_from_export(small, precision):
    with pytest.raises(BundleError, match=rf"no {precision} graph.*--precision {precision}\."):
        Bundle.open(small).graph(precision)
    _check_precisions([precision])


def test_what_is_no_precision_gets_the_list_and_no_command(small):
    hint = graph_hint(small, "float8")
    listed = hint.partition(": ")[2].rstrip(".").split(", ")
    assert sorted(listed) == sorted(["float32", *TYPED, *QUANTISED])
