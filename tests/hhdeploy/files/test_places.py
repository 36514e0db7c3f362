"""Places that a user names, and of which the file system does not say what is there."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hhdeploy import (
    Bundle,
    bill_of_materials,
    calibrate,
    export,
    extract_adapter,
    import_adapter,
    load_adapter,
    verify,
    write_ovms,
    write_triton,
)
from hhdeploy import train as run_training
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.errors import BundleError, DataError, HhdeployError
from hhdeploy.files.outputs import check_output
from hhdeploy.files.writing import is_folder
from hhdeploy.training.recipe import TrainSettings
from tests.support import TINY_MODEL, tiny_spec

LONG = "x" * 300


def uses(bundle, workshop, tmp_path):
    """What takes the path of something that is there, or is to be written."""
    settings = CalibrationSettings(precision="int8", images=2)
    return {
        "load_adapter": load_adapter,
        "import_adapter": lambda p: import_adapter(p, workshop.backbone),
        "extract_adapter": lambda p: extract_adapter(p, tiny_spec()),
        "export": lambda p: export(TINY_MODEL, {"a": p}, tmp_path / "out"),
        "checkpoint": lambda p: load_backbone(replace(tiny_spec(), checkpoint=Path(p))),
        "calibrate": lambda p: calibrate(bundle, p, settings),
        "train": lambda p: run_training(TrainSettings(TINY_MODEL, Path(p), tmp_path / "out")),
        "write_triton": lambda p: write_triton(bundle, p),
        "write_ovms": lambda p: write_ovms(bundle, p),
        "report": lambda p: check_output(Path(p, "report.html")),
    }


NAMES = tuple(uses(None, None, Path()))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_too_long_is_refused_with_words(branches, workshop, tmp_path, name):
    """`Path.is_dir` raised the system's error."""
    reason = re.escape(os.strerror(errno.ENAMETOOLONG))
    with pytest.raises(HhdeployError, match=rf"{LONG} cannot be read: {reason}\."):
        uses(branches, workshop, tmp_path)[name](LONG)


@pytest.mark.parametrize("name", NAMES)
def test_links_that_go_round_are_refused_with_words(branches, workshop, tmp_path, name):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(HhdeployError, match="loop"):
        uses(branches, workshop, tmp_path)[name](str(loop / "here"))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("checkpoint", "report")])
def test_an_empty_path_is_not_where_the_process_is(branches, workshop, tmp_path, monkeypatch, name):
    """Of a variable that is not set: what was read or written was the working directory."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    # Once a `Path` is made of it, nobody knows.
    used = uses(branches, workshop, tmp_path) | {
        "train": lambda p: run_training(TrainSettings(TINY_MODEL, p, tmp_path / "out")),
        "import_adapter": lambda p: import_adapter(p, workshop.backbone),
    }
    with pytest.raises(HhdeployError, match="expected a path, found str ''"):
        used[name]("")
    assert not list(place.iterdir())


@pytest.mark.parametrize("use", [Bundle.open, verify, bill_of_materials])
def test_an_empty_path_is_no_bundle(branches, monkeypatch, use):
    monkeypatch.chdir(branches)
    with pytest.raises(BundleError, match="expected the path of a bundle, found ''"):
        use("")


def test_what_is_a_folder(tmp_path):
    (tmp_path / "file").touch()
    assert is_folder(tmp_path, DataError)
    assert not is_folder(tmp_path / "file", DataError)
    assert not is_folder(tmp_path / "file" / "below", DataError)
    assert not is_folder(tmp_path / "absent", DataError)
