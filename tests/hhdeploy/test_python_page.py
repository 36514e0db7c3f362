"""docs/python.md: it names all that is public, and what it shows runs as it stands."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import hhdeploy
from hhdeploy.bundle import Bundle
from hhdeploy.choices import DEVICES, PRECISIONS
from hhdeploy.runtime import Session
from tests.hhdeploy.bundle.test_signing import pair
from tests.support import TINY_ARGS, TINY_MODEL
from tests.workshop import BACKBONE_CLASSES, ROOT, Workshop

PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")


def code() -> str:
    """The snippets, one program."""
    return "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S))


def tiny(program: str, workshop: Workshop) -> str:
    """The program with the tests' model in place of the page's, and few pictures."""
    weights, cache = f'Path("{workshop.checkpoint}")', f'Path("{workshop.cache}")'
    model = '"vit_base_patch16_224"'
    args = f"**{TINY_ARGS}, num_classes={BACKBONE_CLASSES}"
    for theirs, ours in (
        (f"{model}, pretrained=True", f"{model}, checkpoint_path={weights}, {args}"),
        (f"BackboneSpec({model})", f"BackboneSpec({model}, {TINY_ARGS}, checkpoint={weights})"),
        ("epochs=10", f"epochs=1, threads=1, model_args={TINY_ARGS}, checkpoint={weights}"),
        (
            "    reserve=",
            f"    checkpoint={weights}, cache={cache}, verify_images=2, reserve=",
        ),
        (
            'verify_against_torch("bundle")',
            f'verify_against_torch("bundle", checkpoint={weights}, verify_images=2)',
        ),
        ("threads=2", "threads=1"),
        ('device="auto"', 'device="cpu"'),
        ("images=128", "images=8, smooth_quant=None, bias_correction=False"),
        (model, repr(TINY_MODEL)),
    ):
        assert theirs in program, theirs
        program = program.replace(theirs, ours)
    return program


def draw(place: Path, count: int) -> None:
    """Seeded pictures that are not square."""
    place.mkdir(parents=True)
    generator = np.random.default_rng(len(str(place.name)))
    for index in range(count):
        pixels = generator.integers(0, 255, (37, 41, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.png")


@pytest.fixture
def place(workshop, tmp_path, monkeypatch) -> Path:
    """The directory that the page speaks of."""
    for theirs, ours in (("flowers", "alpha"), ("cars", "gamma")):
        shutil.copytree(workshop.directory(ours), tmp_path / "adapters" / theirs)
        for index in range(2):
            draw(tmp_path / "calibration" / theirs / str(index), 4)
    for name in ("cat", "dog"):
        draw(tmp_path / "images" / name, 3)
    draw(tmp_path / "pictures", 2)
    for name, picture in zip("ab", sorted((tmp_path / "pictures").iterdir()), strict=True):
        shutil.copy(picture, tmp_path / f"{name}.png")
    adapter = workshop.adapters["alpha"]
    trained = {
        f"{name}.{part}": torch.from_numpy(getattr(site, part))
        for name, site in adapter.sites.items()
        for part in ("u", "v", "d", "lora_A", "lora_B")
    }
    trained |= {f"head.{p}": torch.from_numpy(getattr(adapter.head, p)) for p in ("weight", "bias")}
    torch.save(trained, tmp_path / "trained.pth")
    pair(tmp_path)
    tuned = load_file(workshop.checkpoint)
    tuned["blocks.1.mlp.fc2.weight"] += torch.outer(torch.arange(48.0), torch.ones(192))
    torch.save(tuned, tmp_path / "tuned.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_the_caller() -> dict[str, object]:
    """What calls leave as it was, without what is set for other packages, or by them."""
    set_once = ("ORT_DISABLE_TELEMETRY", "TORCHINDUCTOR_CACHE_DIR", "PYTEST_CURRENT_TEST")
    return {
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "torch's": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "path": [place for place in sys.path if not place.endswith("setuptools/_vendor")],
        "directory": Path.cwd(),
        "environment": {k: v for k, v in os.environ.items() if k not in set_once},
        "logging": (logging.getLoggerClass(), logging.root.level, tuple(logging.root.handlers)),
    }


def test_every_public_name_is_on_the_page():
    shown = set(re.findall(r"\w+", code()))
    assert not set(hhdeploy.__all__) - shown
    methods = {n for n in vars(Session) if not n.startswith("_")} | {"open", "add", "remove"}
    assert not {name for name in methods if not re.search(rf"\.{name}\b", PAGE)}


@pytest.mark.slow
def test_the_page_runs(workshop, place, capsys, monkeypatch):
    pytest.importorskip("nncf", reason="NNCF is not installed")
    create = timm.create_model

    def create_model(*args, **kwargs):
        """The page's own random numbers."""
        with torch.random.fork_rng(devices=[]):
            return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    before = of_the_caller()
    exec(compile(tiny(code(), workshop), "docs/python.md", "exec"), {"Path": Path})
    assert of_the_caller() == before
    printed = capsys.readouterr().out.splitlines()
    assert "['flowers', 'cars', 'pets']" in printed
    assert printed[-1] == "precisions"
    assert f"precisions: {' '.join(PRECISIONS)}" in printed
    assert f"devices: {' '.join(DEVICES)}" in printed
    bundle = Bundle.open(place / "bundle")
    verified = {entry.name: entry.verified for entry in bundle.manifest.adapters}
    assert verified == {"flowers": False, "cars": False}
    assert set(bundle.manifest.graphs) == {"float32", "int8"}
    assert (place / "repository" / "vit" / "config.pbtxt").is_file()
    assert (place / "report.html").is_file()
