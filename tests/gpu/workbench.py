"""Bundles and engines that the GPU tests share, each made when a test first needs it.

Three models: the starter ViT with its four real adapters on real images; a ViT-S/16, and for dry
runs a tiny ViT, with random adapters of both forms on noise. Bundles stay in the directory for
the parts that come later; engines are each part's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import MANIFEST, EngineEntry, Range
from hhdeploy.errors import HhdeployError
from tests.support import TINY_ARGS, TINY_MODEL
from tests.workshop import BACKBONE_CLASSES, ROOT, copy_bundle

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import BackboneSpec

# Graphs that export writes, and those that every bundle of the workbench has.
TYPED = ("float32", "float16", "bfloat16")
PRECISIONS = (*TYPED, "int8")
# Smaller and larger batches than the profile's must work.
PROFILE: Range = (2, 4, 8)
LATENCY_PROFILE: Range = (1, 8, 32)

_STARTER = ROOT / "examples" / "starter"
# Random models: timm's name and arguments, and the size of the adapters' values: ‖u‖² of about
# 2.5 with 384 features. The tiny one is the workshop's, so that the suite's trace of it will do.
_RANDOM: Mapping[str, tuple[str, Mapping[str, Any], float]] = {
    "vit-s": ("vit_small_patch16_224", {"num_classes": 17}, 0.08),
    "tiny": (TINY_MODEL, {**TINY_ARGS, "num_classes": BACKBONE_CLASSES}, 0.2),
}
# Two of one shape, and one of the other form.
_ADAPTERS = ("alpha", "rival", "after")
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
    """A bundle with a graph of each of `PRECISIONS`, verified when it was exported.

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
        """The starter ViT, or one of the random models; adapters as side branches."""
        make = self._starter if name == "starter" else lambda: self._random(name)
        return self._once((name,), make)

    def folded(self, name: str) -> Path:
        """The first adapter of a model in its weights."""
        return self._once((name, "folded"), lambda: self._one(name, "folded", fold=True))

    def single(self, name: str) -> Path:
        """The first adapter of a model as the only side branch, in float32 alone."""
        return self._once(
            (name, "single"), lambda: self._one(name, "single", precisions=PRECISIONS[:1])
        )

    def bundle(self, name: str, graph: str) -> Path:
        """``folded`` or ``side branches``, by name."""
        return self.folded(name) if graph == "folded" else self.model(name).path

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
        from hhdeploy.backbones.spec import BackboneSpec
        from hhdeploy.cli.starter import Starter

        starter = Starter.read(_STARTER)
        spec = BackboneSpec(starter.model, starter.args, starter.path / "backbone.safetensors")
        adapters = {task: starter.adapter(task) for task in starter.tasks}
        path = self._bundle("starter", spec, adapters, verify_data=starter.path / "images")
        return Made(path, spec, ("digits", "fashion"))

    def _random(self, name: str) -> Made:
        from hhdeploy.backbones.spec import BackboneSpec

        model, args, scale = _RANDOM[name]
        checkpoint, folder = self._root / f"{name}.safetensors", self._root / f"{name}-adapters"
        if not self._made(name, PRECISIONS):
            _write_random(model, args, scale, checkpoint, folder)
        spec = BackboneSpec(model, args, checkpoint)
        path = self._bundle(name, spec, {key: folder / key for key in _ADAPTERS})
        return Made(path, spec, _ADAPTERS[:2])

    def _one(self, name: str, kind: str, **options: Any) -> Path:
        made = self.model(name)
        adapter = made.pair[0]
        return self._bundle(
            f"{name}-{kind}", made.spec, {adapter: made.adapter(adapter)}, **options
        )

    def _bundle(
        self,
        name: str,
        spec: BackboneSpec,
        adapters: Mapping[str, Path],
        precisions: Sequence[str] = PRECISIONS,
        **options: Any,
    ) -> Path:
        """A bundle with these of `PRECISIONS`, unless a part before this one has made it."""
        from hhdeploy.exporting.bundles import export
        from hhdeploy.plan import Reserve
        from tests.gpu.int8 import add_int8

        path = self._root / name
        if self._made(name, precisions):
            return path
        shutil.rmtree(path, ignore_errors=True)
        if not options.get("fold"):
            options["reserve"] = Reserve(keep_backbone_head=True)
        export(
            spec.model,
            adapters,
            path,
            model_args=spec.args,
            checkpoint=spec.checkpoint,
            precisions=[p for p in TYPED[1:] if p in precisions],
            verify_images=_IMAGES,
            cache=self._root / "cache",
            **options,
        )
        if "int8" in precisions:
            add_int8(path)
        return path

    def _made(self, name: str, precisions: Sequence[str]) -> bool:
        path = self._root / name
        return (path / MANIFEST).is_file() and set(precisions) <= set(
            Bundle.open(path).manifest.graphs
        )


def _write_random(
    model: str, args: Mapping[str, Any], scale: float, checkpoint: Path, folder: Path
) -> None:
    """Weights of a random model, and `_ADAPTERS` of it."""
    from safetensors.torch import save_file

    from hhdeploy.adapters.format import save_adapter
    from tests.support import random_adapter, tiny_backbone

    backbone = tiny_backbone(model, **args)
    facts = backbone.facts
    state = {key: t.contiguous() for key, t in backbone.model.state_dict().items()}
    save_file(state, checkpoint)
    made = (
        random_adapter(facts, classes=11, seed=1, scale=scale),
        random_adapter(facts, reflection="orthogonal", r=2, classes=11, seed=2, scale=scale),
        random_adapter(
            facts, form="sequential", targets=("proj", "fc2"), classes=3, seed=3, scale=scale
        ),
    )
    for key, adapter in zip(_ADAPTERS, made, strict=True):
        save_adapter(adapter, folder / key, overwrite=True)
