"""The state of an unfinished training on disk: whatever ends its writer, the training goes on."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from hhdeploy.errors import WriteError
from hhdeploy.files.tensors import write_tensors
from hhdeploy.training import state as states
from hhdeploy.training.settings import EpochReport, TrainingError
from hhdeploy.training.state import SavedTraining, StateDirectory
from tests.crashing import killed_at_every_call

SETTINGS = {"`lr`": 0.1}


def saved(epoch):
    reports = [EpochReport(n, 1.0, 0.1, None, None) for n in range(1, epoch + 1)]
    return SavedTraining(epoch, {"value/a": np.arange(8, dtype=np.float32)}, tuple(reports))


def of(root):
    return StateDirectory.beside(root / "o")


def write_first(root):
    of(root).write(saved(1), SETTINGS)


def write_second(root):
    of(root).write(saved(2), SETTINGS)


def discard(root):
    of(root).discard()


@pytest.mark.parametrize(("writer", "done"), [(write_first, 0), (write_second, 1), (discard, 1)])
def test_a_training_that_was_killed_goes_on(writer, done, tmp_path):
    origin = tmp_path / "origin"
    origin.mkdir()
    if done:
        write_first(origin)
    deaths = 0
    for root in killed_at_every_call(writer, origin, tmp_path):
        state = of(root)
        there = state.exists
        state.check(resume=there)
        epoch = state.read(SETTINGS).epoch if there else 0
        state.write(saved(epoch + 1), SETTINGS)
        kept = sorted(p.name for p in state.path.iterdir() if not p.name.startswith("."))
        assert kept == [f"epoch-{epoch + 1}.safetensors", "state.json"]
        assert state.read(SETTINGS).epoch == epoch + 1
        deaths += 1
    assert deaths > 1


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_full_disk_leaves_what_was_there(epoch, tmp_path, monkeypatch):
    def full(path, content):
        raise WriteError(f"Could not write {path}: {os.strerror(errno.ENOSPC)}")

    state = of(tmp_path)
    if epoch == 2:
        write_first(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(states, "write_json", full)
        with pytest.raises(WriteError, match="No space"):
            state.write(saved(epoch), SETTINGS)
    assert state.path.exists() == state.exists == (epoch == 2)
    state.check(resume=state.exists)
    state.write(saved(epoch), SETTINGS)
    assert state.read(SETTINGS).epoch == epoch


def test_tensors_of_another_are_not_written_over(tmp_path):
    state = of(tmp_path)
    state.path.mkdir()
    write_tensors(state.path / "epoch-1.safetensors", saved(1).tensors, {"made_by": "me"})
    with pytest.raises(TrainingError, match=r"no epoch-1\.safetensors without state\.json"):
        state.check(resume=False)
