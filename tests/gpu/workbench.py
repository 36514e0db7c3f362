"""Bundles and engines that the GPU tests share, each made when a test first needs it.

Two models: the starter ViT with its four real adapters on real images, and a ViT-S/16 with
random adapters of both forms on noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle import Bundle
from hhdeploy.engines import EngineEntry, Range
from hhdeploy.errors import HhdeployError
from tests.workshop import ROOT, copy_bundle

if TYPE_CHECKING:
    from hhdeploy.backbone import BackboneSpec

MODELS = ("starter", "vit-s")
# Graphs that every bundle of the workbench has; others come from calibration.
TYPED = ("float32", "float16", "bfloat16")
PRECISIONS = (*TYPED, "int8", "fp8")
# Smaller and larger batches than the profile's must work.
PROFILE: Range = (2, 4, 8)
LATENCY_PROFILE: Range = (1, 8, 32)

_STARTER = ROOT / "examples" / "starter"
_VIT_S = "vit_small_patch16_224"
# ‖u‖² of about 2.5 with 384 features.
_SCALE = 0.08
_IMAGES = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Truth:
    """Images, the adapter of each, and float64 logits of the training-time model."""

    images: NDArray[np.float32]
    names: Sequence[str | None]
    logits: NDArray[np.float64]


@dataclass(frozen=True)
class Made:
    """A bundle with float32, float16 and bfloat16 graphs, verified when it was exported.

    Attributes:
        path: the bundle; read only.
        spec: its backbone.
        pair: two adapters with as many classes, so that the wrong one has the right shape.
    """

    path: Path
    spec: BackboneSpec
    pair: tuple[str, str]

    def truth(self, count: int | None = None) -> Truth:
        """The stored reference, neighbours of different adapters; repeated up to ``count``."""
        bundle = Bundle.open(self.path)
        images, ids, logits = bundle.reference()
        names: dict[int, str | None] = {a.row or 0: a.name for a in bundle.manifest.adapters}
        chosen = np.arange(len(ids) if count is None else count) % len(ids)
        return Truth(images[chosen], [names.get(int(ids[i])) for i in chosen], logits[chosen])

    def truth_of(self, name: str | None) -> Truth:
        """The part of one adapter; None: the bare backbone."""
        whole = self.truth()
        chosen = [i for i, other in enumerate(whole.names) if other == name]
        return Truth(whole.images[chosen], [name] * len(chosen), whole.logits[chosen])

    def adapter(self, name: str) -> Path:
        """An adapter's directory."""
        return self.path / "adapters" / name


class Workbench:
    """Makes and keeps; a failure is kept too, so that it costs its time only once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kept: dict[tuple[object, ...], object] = {}

    def model(self, name: str) -> Made:
        """One of `MODELS`, exported."""
        make = {"starter": self._starter, "vit-s": self._vit_s}[name]
        return self._once((name,), make)

    def folded(self, name: str) -> Path:
        """The first adapter of a model in its weights."""
        return self._once((name, "folded"), lambda: self._folded(self.model(name)))

    def build(
        self, path: Path, backend: str, precision: str, batch: Range = PROFILE
    ) -> tuple[Path, EngineEntry]:
        """A copy of a bundle with one engine for this machine, and the engine's entry."""

        def make() -> tuple[Path, EngineEntry]:
            from hhdeploy.building import BuildOptions, build

            copy = copy_bundle(path, self._root / f"engine-{len(self._kept)}")
            return copy, build(
                copy, backend=backend, precision=precision, options=BuildOptions(batch=batch)
            )

        return self._once((path, backend, precision, batch), make)

    def engine(self, model: str, backend: str, precision: str, batch: Range = PROFILE) -> Path:
        """A bundle with one engine of a model."""
        return self.build(self.model(model).path, backend, precision, batch)[0]

    def _once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        if key not in self._kept:
            try:
                self._kept[key] = make()
            except HhdeployError as error:
                self._kept[key] = error
        found: Any = self._kept[key]
        if isinstance(found, HhdeployError):
            raise found
        kept: T = found
        return kept

    def _starter(self) -> Made:
        from hhdeploy.backbone import BackboneSpec
        from hhdeploy.calibrating import CalibrationOptions, calibrate_bundle
        from hhdeploy.calibration.settings import CalibrationSettings
        from hhdeploy.demo import Starter

        starter = Starter.read(_STARTER)
        spec = BackboneSpec(starter.model, starter.args, starter.path / "backbone.safetensors")
        adapters = {task: starter.adapter(task) for task in starter.tasks}
        images = starter.path / "images"
        path = self._export("starter", spec, adapters, verify_data=images)
        # No FP8: which GPUs take it is not known before one is there.
        calibrate_bundle(
            path, images, CalibrationSettings(images=64), CalibrationOptions(cache=None)
        )
        return Made(path, spec, ("digits", "fashion"))

    def _vit_s(self) -> Made:
        from safetensors.torch import save_file

        from hhdeploy.adapter import save_adapter
        from hhdeploy.backbone import BackboneSpec
        from tests.support import random_adapter, tiny_backbone

        backbone = tiny_backbone(_VIT_S, num_classes=17)
        checkpoint = self._root / "vit-s.safetensors"
        state = {name: t.contiguous() for name, t in backbone.model.state_dict().items()}
        save_file(state, checkpoint)
        facts = backbone.facts
        adapters = {
            "alpha": random_adapter(facts, classes=11, seed=1, scale=_SCALE),
            "rival": random_adapter(
                facts, reflection="orthogonal", r=2, classes=11, seed=2, scale=_SCALE
            ),
            "after": random_adapter(
                facts, form="sequential", targets=("proj", "fc2"), classes=5, seed=3, scale=_SCALE
            ),
        }
        folder = self._root / "vit-s-adapters"
        for name, adapter in adapters.items():
            save_adapter(adapter, folder / name)
        spec = BackboneSpec(_VIT_S, {"num_classes": 17}, checkpoint)
        path = self._export("vit-s", spec, {name: folder / name for name in adapters})
        return Made(path, spec, ("alpha", "rival"))

    def _export(
        self, name: str, spec: BackboneSpec, adapters: dict[str, Path], **options: Any
    ) -> Path:
        from hhdeploy.api import export
        from hhdeploy.plan import Reserve

        return export(
            spec.model,
            adapters,
            self._root / name,
            model_args=spec.args,
            checkpoint=spec.checkpoint,
            reserve=Reserve(keep_backbone_head=True),
            precisions=TYPED[1:],
            verify_images=_IMAGES,
            cache=self._root / "cache",
            **options,
        ).path

    def _folded(self, made: Made) -> Path:
        from hhdeploy.api import export

        name, _ = made.pair
        return export(
            made.spec.model,
            {name: made.adapter(name)},
            self._root / f"{made.path.name}-folded",
            fold=True,
            model_args=made.spec.args,
            checkpoint=made.spec.checkpoint,
            precisions=TYPED[1:],
            cache=self._root / "cache",
        ).path
