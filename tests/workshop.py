"""Tiny bundles that many tests share: a checkpoint, adapters, exports, their true logits.

One backbone (five classes of its own) and adapters that differ in everything that may differ:
form, reflection, rank, targets, classes, preprocessing. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import LABELS, VALUES, ProblemType
from hhdeploy.adapters.format import PARTS, Adapter, SiteTensors, save_adapter
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.preprocess import Preprocess
from tests.support import TINY_MODEL, random_adapter

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone
    from hhdeploy.exporting.bundles import ExportResult

BACKBONE_CLASSES = 5
# Own classes of every adapter; `headless` answers with the backbone's classifier.
CLASSES = {"alpha": 7, "rival": 7, "beta": 11, "gamma": 3, "lora": 2, "headless": BACKBONE_CLASSES}
# Heads that are no classes: three independent labels, one value.
TAGS, AGE = "tags", "age"
# A head and nothing else.
PROBE = "probe"
WIDTH = max(CLASSES.values())
# What fits into the rows that alpha and gamma lay out, and what does not.
FITS, TOO_WIDE = "rival", "beta"

ROOT = Path(__file__).resolve().parents[1]
# Of a program that a test starts, on a busy machine.
COMMAND_SECONDS = 600


def make_adapters(facts: BackboneFacts) -> dict[str, Adapter]:
    """The adapters by name; `rival` has alpha's shape and other values."""
    gamma = random_adapter(
        facts,
        form="sequential",
        reflection="orthogonal",
        targets=("proj", "fc2"),
        r=2,
        classes=3,
        seed=3,
    )
    own = replace(facts.preprocess, mean=(0.2, 0.3, 0.5), std=(0.7, 0.6, 0.3), crop_pct=1.0)
    lora = random_adapter(facts, targets=("q", "fc1"), r=5, classes=2, seed=4)
    return {
        "alpha": random_adapter(facts, classes=7, seed=1),
        "rival": random_adapter(facts, classes=7, seed=11),
        "beta": random_adapter(
            facts, reflection="orthogonal", targets=("q", "v", "fc1"), r=4, classes=11, seed=2
        ),
        "gamma": replace(gamma, config=replace(gamma.config, preprocess=own)),
        "lora": replace(
            lora,
            sites={
                name: SiteTensors(lora_A=site.lora_A, lora_B=site.lora_B)
                for name, site in lora.sites.items()
            },
        ),
        "headless": random_adapter(facts, targets=("k", "fc2"), r=0, classes=None, seed=5),
        TAGS: _meaning(random_adapter(facts, targets=("v",), classes=3, seed=6), LABELS),
        PROBE: random_adapter(facts, targets=(), classes=3, seed=8),
        AGE: _meaning(random_adapter(facts, targets=("proj",), classes=1, seed=7), VALUES),
    }


def _meaning(adapter: Adapter, problem_type: ProblemType) -> Adapter:
    return replace(adapter, config=replace(adapter.config, problem_type=problem_type))


@dataclass(frozen=True)
class Workshop:
    """Files that exports start from.

    Attributes:
        root: a directory of the test session.
        backbone: the timm model, as the checkpoint holds it; float32 and bare.
        adapters: by name; `directory` has them on disk.
    """

    root: Path
    backbone: Backbone
    adapters: dict[str, Adapter]

    @property
    def checkpoint(self) -> Path:
        return self.root / "backbone.safetensors"

    @property
    def cache(self) -> Path:
        """Traced backbones: one trace serves the whole test session."""
        return self.root / "cache"

    def directory(self, name: str) -> Path:
        return self.root / "adapters" / name

    def directories(self, *names: str) -> dict[str, Path]:
        return {name: self.directory(name) for name in names}

    def export(self, out: Path, names: Iterable[str], **options: Any) -> ExportResult:
        """`hhdeploy.exporting.bundles.export` of some adapters, by default two images each."""
        from hhdeploy.exporting.bundles import export

        chosen = {"checkpoint": self.checkpoint, "cache": self.cache, "verify_images": 2, **options}
        return export(TINY_MODEL, self.directories(*names), out, **chosen)

    def truth(self, name: str | None, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """Float64 logits of the training-time model, only the adapter's own classes."""
        from hhdeploy.training import attach, detach
        from tests.support import logits_of

        model = self.backbone.model
        if name is not None:
            attach(model, self.adapters[name])
        try:
            return logits_of(model, images)
        finally:
            if name is not None:
                detach(model)
            model.float()

    def mixed_truth(
        self, names: Sequence[str | None], images: NDArray[np.float32], width: int = WIDTH
    ) -> NDArray[np.float64]:
        """Row i: the training-time model of ``names[i]`` on image i, padded with -inf."""
        found = np.full((len(images), width), -np.inf)
        for name in dict.fromkeys(names):
            chosen = [i for i, other in enumerate(names) if other == name]
            logits = self.truth(name, images[chosen])
            found[chosen, : logits.shape[1]] = logits
        return found


def open_workshop(root: Path) -> Workshop:
    """The workshop that `make_workshop` wrote to ``root``; all of it is seeded."""
    from tests.support import tiny_backbone

    backbone = tiny_backbone(num_classes=BACKBONE_CLASSES)
    return Workshop(root, backbone, make_adapters(backbone.facts))


def make_workshop(root: Path) -> Workshop:
    """Write checkpoint and adapters below ``root``."""
    from safetensors.torch import save_file

    workshop = open_workshop(root)
    backbone = workshop.backbone
    root.mkdir(exist_ok=True)
    state = {name: t.contiguous() for name, t in backbone.model.state_dict().items()}
    save_file(state, workshop.checkpoint)
    for name, adapter in workshop.adapters.items():
        save_adapter(adapter, workshop.directory(name))
    return workshop


def make_scaled_adapters(workshop: Workshop) -> dict[str, Adapter]:
    """Adapters of its backbone that need more than a diagonal and a low rank.

    ``norms`` can only be folded. Of the others `after` is sequential, `ia3` has no matrix, and
    `plain` none of s_in, s_out and db.
    """
    facts = workshop.backbone.facts
    few = random_adapter(facts, targets=("k", "v", "fc2"), classes=3, seed=62, parts=PARTS)
    alone = {"k": ("s_out", "db"), "v": ("s_out", "db"), "fc2": ("s_in",)}
    sites = {
        name: SiteTensors(**{p: site.parts[p] for p in alone[name.rpartition(".")[2]]})
        for name, site in few.sites.items()
    }
    every = ("q", "k", "v", "proj", "fc1", "fc2")
    return {
        "scaled": random_adapter(facts, targets=every, classes=7, seed=61, parts=PARTS),
        "ia3": replace(few, sites=sites),
        "after": random_adapter(
            facts, form="sequential", targets=("proj", "fc2"), classes=5, seed=63, parts=PARTS
        ),
        "plain": random_adapter(facts, targets=every, classes=2, seed=64),
        "norms": _with_values(workshop, random_adapter(facts, targets=("q",), classes=4)),
    }


def _with_values(workshop: Workshop, adapter: Adapter) -> Adapter:
    """The adapter and, fold only, another norm, patch convolution and dense weight."""
    random = np.random.default_rng(8)
    known = dict(workshop.backbone.model.named_parameters())
    values = {}
    for name in ("blocks.1.norm2.weight", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        noise = 0.2 * random.standard_normal(known[name].shape)
        values[name] = (known[name].detach().numpy() + noise).astype(np.float32)
    return replace(adapter, config=replace(adapter.config, fold_only=True), values=values)


def other_workshop(root: Path, workshop: Workshop, adapters: dict[str, Adapter]) -> Workshop:
    """A workshop of other adapters with the checkpoint and the cache of this one."""
    workshop.cache.mkdir(exist_ok=True)
    root.mkdir(exist_ok=True)
    (root / "backbone.safetensors").symlink_to(workshop.checkpoint)
    (root / "cache").symlink_to(workshop.cache)
    other = Workshop(root, workshop.backbone, adapters)
    for name, adapter in adapters.items():
        save_adapter(adapter, other.directory(name))
    return other


def copy_bundle(bundle: Path, target: Path) -> Path:
    """A bundle of the test's own, free to be damaged."""
    return Path(shutil.copytree(bundle, target))


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a directory and its bytes: what "unchanged" means."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own, ``size`` as tmpfs takes it; the test is skipped where the system
    lets us mount none."""
    import pytest

    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, check=False, timeout=COMMAND_SECONDS)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=COMMAND_SECONDS)


def flip_byte(path: Path, position: int = -1) -> None:
    """Invert one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(bytes(data))


def transform_of(facts: BackboneFacts, adapter: Adapter) -> Preprocess:
    """What an adapter's images go through."""
    return adapter.config.preprocess or facts.preprocess


HEAVY = ("torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxscript", "openvino")

_BLOCKER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    blocked = frozenset({blocked!r})

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ImportError(f"{{name}} is blocked in this test")
        return None

sys.meta_path.insert(0, Blocker())
"""


def blocker(blocked: Iterable[str]) -> str:
    """Python source after which importing any of ``blocked`` raises ImportError."""
    return _BLOCKER.format(blocked=tuple(blocked))


def run_python(
    code: str, *arguments: object, blocked: Iterable[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run source in a fresh interpreter of this checkout, some packages blocked."""
    source = blocker(blocked) + textwrap.dedent(code)
    return run_command([sys.executable, "-c", source, *map(str, arguments)])


def run_command(
    command: Sequence[str], *, cwd: Path = ROOT, path: Sequence[Path] = (ROOT,)
) -> subprocess.CompletedProcess[str]:
    """Run a program with one thread and ``path`` first in PYTHONPATH.

    Raises:
        subprocess.TimeoutExpired: it hangs.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    return subprocess.run(
        list(command), cwd=cwd, env=environment, capture_output=True, text=True, check=False,
        timeout=COMMAND_SECONDS,
    )  # fmt: skip
