"""A command that ends early, once something is written: what is complete is said."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

import hhdeploy.files.directories
from hhdeploy.adapters.directory import ADAPTER
from hhdeploy.cli import Group, progress
from hhdeploy.errors import BackboneError
from hhdeploy.files.caches import CacheWarning
from hhdeploy.files.directories import atomic_directory
from hhdeploy.files.scratch import scratch_directory
from tests.workshop import copy_bundle

WITNESS = Path(__file__).parents[1] / "witnesses" / "v1"
# Command -> its arguments, and what it puts in its place or changes.
COMMANDS = {
    "add": (("adapter", "add", "BUNDLE", f"guest={WITNESS / 'rival'}"), "BUNDLE"),
    "remove": (("adapter", "remove", "BUNDLE", "gamma"), "BUNDLE"),
    "pull": (("pull", "BUNDLE", "OUT"), "OUT"),
    "pull over another": (("pull", "BUNDLE", "OTHER", "--overwrite"), "OTHER"),
    "push": (("push", "BUNDLE", "OUT"), "OUT"),
    "merge": (("adapter", "merge", f"{WITNESS / 'rival'}=0.5", "OUT"), "OUT"),
    "triton": (("triton", "BUNDLE", "OUT"), "OUT"),
    "pack": (("adapter", "pack", "BUNDLE", "alpha", "OUT"), "OUT"),
    "bom": (("bom", "BUNDLE", "--out", "OUT"), "OUT"),
}


@pytest.fixture(params=COMMANDS)
def command(request, tmp_path):
    """Arguments of a command, and its result's path."""
    arguments, result = COMMANDS[request.param]
    places = {name: tmp_path / name.lower() for name in ("BUNDLE", "OUT", "OTHER")}
    for name in ("BUNDLE", "OTHER"):
        copy_bundle(WITNESS / "branches", places[name])
    return [str(places.get(a, a)) for a in arguments], places[result]


def interrupting(real, place):
    """The call, and after it, where it puts something in its place, Ctrl-C."""

    def call(source, target, *others, **options):
        done = real(source, target, *others, **options)
        if Path(target) in (place, place / "hhdeploy.json"):
            raise KeyboardInterrupt
        return done

    return call


def interrupted_by(calls, real):
    """The call, once ``calls`` are used up: what is said of a Ctrl-C is printed, too."""
    return lambda *arguments, **options: next(calls, real)(*arguments, **options)


@pytest.mark.parametrize("step", ["not yet", "at that moment", "later"])
def test_ctrl_c_says_what_is_complete(call, monkeypatch, command, step):
    arguments, place = command
    with monkeypatch.context() as patch:
        if step == "at that moment":
            for where, name in (
                (os, "replace"), (os, "rename"), (hhdeploy.files.directories, "_exchange"),
            ):  # fmt: skip
                patch.setattr(where, name, interrupting(getattr(where, name), place))
        elif step == "later":
            once = iter([_interrupted])
            patch.setattr(click, "echo", interrupted_by(once, click.echo))
            patch.setattr(Console, "print", interrupted_by(once, Console.print))
        else:
            patch.setattr("hhdeploy.files.writing.fsync", _interrupted)
        result = call(*arguments)
    assert result.exit_code == 130, result.output
    if step == "not yet":
        assert result.stderr.splitlines()[-1] == "Interrupted."
        return
    assert f"Interrupted. Complete by then, and on the disk: {place}." in result.stderr
    assert place.exists()


def _interrupted(*arguments, **options):
    raise KeyboardInterrupt


@pytest.fixture
def number(request):
    """A signal as a process has it at its start, whatever a server in this one made of it."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before or signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], indirect=True)
def test_who_stops_a_container_or_closes_a_terminal_leaves_nothing_half_done(tmp_path, number):
    group = Group("hhdeploy")

    @group.command()
    def work() -> None:
        with scratch_directory(tmp_path, "work"):
            assert signal.getsignal(number) is not signal.SIG_DFL, "it would end the tests"
            os.kill(os.getpid(), number)
            time.sleep(60)  # which the signal ends

    result = CliRunner().invoke(group, ["work"])
    assert (result.exit_code, result.stderr) == (128 + number, f"Interrupted by {number.name}.\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so():
    """``nohup hhdeploy ...``."""
    group = Group("hhdeploy")

    @group.command()
    def work() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        click.echo("done")

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = CliRunner().invoke(group, ["work"])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.exit_code, result.output) == (0, "done\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_that_progress_is_written_to_ends_no_work(monkeypatch):
    """``nohup hhdeploy train ... 2> log``, hours of it; nothing is left to write at the end."""
    group = Group("hhdeploy")

    @group.command()
    def work() -> None:
        progress.note("a line")
        with (
            progress.steps(quiet=False) as step,
            progress.phased_steps(quiet=False) as (other, phase),
        ):
            for number in range(3):
                step("one")
                other("another")
                phase("a part", number, 2)
        warnings.simplefilter("always")
        warnings.warn("no cache", CacheWarning, stacklevel=1)
        click.echo("done")

    with Path("/dev/full").open("w", buffering=1) as full:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", full)
            assert group.main(["work"], standalone_mode=False) is None
        full.flush()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
def test_an_output_that_takes_no_more_says_what_is_complete(call, monkeypatch, tmp_path, number):
    """``| head -1`` is nobody's mistake, unless more was done than to print."""
    bundle = copy_bundle(WITNESS / "branches", tmp_path / "bundle")

    def refused(*arguments, **options):
        if not options.get("err"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(click, "echo", refused)
    monkeypatch.setattr(Console, "print", refused)
    added = call("adapter", "add", bundle, f"guest={WITNESS / 'rival'}")
    assert added.exit_code == 1
    assert f"could not be written: {os.strerror(number)}." in added.stderr
    assert f"Complete by then, and on the disk: {bundle}." in added.stderr
    listed = call("adapter", "list", bundle)
    assert listed.exit_code == 1
    assert ("Error" in listed.stderr) == (number == errno.ENOSPC)
    assert "Complete" not in listed.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("DefaultCPUAllocator: can't allocate: 12 (Cannot allocate memory)"),
        BackboneError("torch could not trace it"),
    ],
    ids=["Python's", "the system's", "torch's", "behind"],
)
def test_a_memory_that_is_used_up_is_said(error):
    group = Group("hhdeploy")

    @group.command()
    def work() -> None:
        raise error from MemoryError() if isinstance(error, BackboneError) else None

    result = CliRunner().invoke(group, ["work"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: The memory is used up, or more than ulimit -v allows.")
    assert f"({str(error) or 'MemoryError'})" in result.stderr


@pytest.mark.filterwarnings("default")
def test_a_cache_that_takes_nothing_is_a_line():
    group = Group("hhdeploy")

    @group.command()
    def work() -> None:
        warnings.warn("It is full. (`cache=None`.)", CacheWarning, stacklevel=1)

    result = CliRunner().invoke(group, ["work"])
    assert (result.exit_code, result.stderr) == (0, "Warning: It is full. (--no-cache.)\n")


def test_what_went_with_its_directory_is_not_told_of():
    """A command may put things in their place in a directory of temporary files."""
    group = Group("hhdeploy")

    @group.command()
    def work() -> None:
        with scratch_directory(None, "work") as folder:
            with atomic_directory(folder / "out", overwrite=False, kind=ADAPTER):
                pass
            raise KeyboardInterrupt

    assert CliRunner().invoke(group, ["work"]).stderr == "Interrupted.\n"


def test_training_says_that_its_output_is_there(call, monkeypatch, tmp_path):
    """With --resume there would be nothing left to continue."""
    out = tmp_path / "out"

    def train(settings, on_report):
        with atomic_directory(settings.out, overwrite=False, kind=ADAPTER):
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr("hhdeploy.training.recipe.train", train)
    result = call("train", out, "--model", "vit_tiny_patch16_224", "--data", tmp_path)
    assert result.exit_code == 130
    assert f"Interrupted. Complete by then, and on the disk: {out}." in result.stderr
    assert "--resume" not in result.stderr
