"""The reference that a bundle carries: images and the training-time model's float64 outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.format import Adapter
from hhdeploy.algebra import logit_change, logit_range
from hhdeploy.backbones.facts import LOGITS, BackboneFacts
from hhdeploy.backbones.outputs import giving
from hhdeploy.backbones.spec import Backbone
from hhdeploy.choices import whole
from hhdeploy.errors import AdapterError, PlanError
from hhdeploy.files.folders import list_images, part_of, spread
from hhdeploy.files.tensors import ByContent
from hhdeploy.files.writing import path_or_none
from hhdeploy.parity import NO_EFFECT
from hhdeploy.preprocess import open_image

if TYPE_CHECKING:
    from hhdeploy.bundle.manifest import Manifest

_BATCH = 4


@dataclass(frozen=True)
class VerifyData:
    """Which images a verification uses.

    Attributes:
        folder: a folder of images (``DIR/ADAPTER/...`` or ``DIR/ADAPTER.txt`` where they exist,
            else all of DIR for every adapter), or a list of them; None: seeded Gaussian noise,
            which parity.json says.
        images: how many per adapter.
        seed: of the noise.
    """

    folder: Path | None = None
    images: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", path_or_none(self.folder, "verify_data"))
        object.__setattr__(self, "images", whole(self.images, "verify_images", 1))

    def to_json(self) -> dict[str, Any]:
        """The ``data`` entry of parity.json."""
        if self.folder is None:
            return {"kind": "noise", "seed": self.seed, "images_per_adapter": self.images}
        return {
            "kind": "images",
            "folder": self.folder.name,
            "images_per_adapter": self.images,
            **({"skipped": skipped} if (skipped := dict(list_images(self.folder).skipped)) else {}),
        }

    def batch(
        self, name: str, adapter: Adapter | None, facts: BackboneFacts
    ) -> NDArray[np.float32]:
        """The images for one adapter, float32 [n, 3, H, W].

        Raises:
            DataError: the folder has no images, or one cannot be decoded.
        """
        if self.folder is None:
            rng = np.random.default_rng(self.seed)
            shape = (self.images, *facts.preprocess.input_size)
            return rng.standard_normal(shape, np.float32)
        paths = spread(list_images(part_of(self.folder, name)).paths, self.images)
        preprocess = adapter.config.preprocess if adapter is not None else None
        transform = preprocess or facts.preprocess
        return np.stack([transform(open_image(path)) for path in paths])


@dataclass(frozen=True, eq=False)
class Reference(ByContent):
    """Images, rows and outputs; neighbouring images use different adapters.

    Attributes:
        images: float32 [N, 3, H, W], normalised.
        adapter_ids: int64 [N], rows of the bank (0 for a folded bundle's only adapter).
        logits: float64 [N, columns]: all outputs of an image side by side; logits are -inf past an
            adapter's own classes.
    """

    images: NDArray[np.float32]
    adapter_ids: NDArray[np.int64]
    logits: NDArray[np.float64]

    def of_rows(self, rows: Sequence[int]) -> Reference:
        """The part that is about some rows of the bank."""
        kept = np.isin(self.adapter_ids, rows)
        return Reference(self.images[kept], self.adapter_ids[kept], self.logits[kept])

    def tensors(self, manifest: Manifest) -> dict[str, NDArray[Any]]:
        """The tensors of reference.safetensors; ``manifest`` says which outputs there are."""
        outputs = {k: np.ascontiguousarray(v) for k, v in manifest.split(self.logits).items()}
        return {"images": self.images, "adapter_ids": self.adapter_ids, **outputs}


def check_verifiable(names: Collection[str]) -> None:
    """Raise `PlanError` where a bundle answers by no name, so that there is nothing to verify."""
    if not names:
        raise PlanError(
            "nothing to verify: there is no adapter, and the backbone's own classifier was not "
            "kept. Export with `verify=False`, or add an adapter first."
        )


def training_time_reference(
    backbone: Backbone,
    adapters: Mapping[str, tuple[int, Adapter | None]],
    data: VerifyData,
    outputs: Mapping[str, tuple[int, ...]],
    *,
    check_effect: bool = False,
) -> Reference:
    """Run the training-time model in float64 on every adapter's images.

    Args:
        backbone: the model, float32; it is bare again afterwards.
        adapters: name -> (row, adapter); None stands for the bare backbone.
        data: which images.
        outputs: of the graph, with the shape of an image's part; see `Manifest.outputs`.
        check_effect: refuse an adapter that changes nothing.

    Raises:
        PlanError: no adapter at all, nor the backbone's own classifier.
        AdapterError: with ``check_effect``, an adapter that moves no output.
    """
    check_verifiable(adapters)
    per_adapter, asked = [], tuple(outputs)
    classes = outputs[LOGITS][0] if LOGITS in outputs else 0
    for name, (row, adapter) in adapters.items():
        images = data.batch(name, adapter, backbone.facts)
        found = _training_time_outputs(backbone, adapter, images, asked)
        if check_effect and adapter is not None:
            _check_effect(backbone, name, adapter, images[:1], found[0][:1], asked[:1])
        answers = np.concatenate(found, axis=1)
        if padding := classes - found[0].shape[1] if classes else 0:
            columns = np.full((len(images), padding), -np.inf)
            answers = np.concatenate([found[0], columns, *found[1:]], axis=1)
        per_adapter.append((images, np.full(len(images), row, np.int64), answers))
    order = _interleaved([len(images) for images, _, _ in per_adapter])
    images, ids, logits = (
        np.concatenate([entry[i] for entry in per_adapter])[order] for i in range(3)
    )
    return Reference(images, ids, logits)


def _check_effect(
    backbone: Backbone,
    name: str,
    adapter: Adapter,
    images: NDArray[np.float32],
    found: NDArray[np.float64],
    outputs: Sequence[str],
) -> None:
    """What an adapter answers is not what the backbone does with the adapter's classifier alone."""
    changes = adapter.sites or adapter.values
    bare = replace(
        adapter,
        sites={},
        values={},
        config=replace(adapter.config, target_modules=(), fold_only=False),
    )
    head_alone = bare if changes and adapter.head is not None else None
    (without,) = _training_time_outputs(backbone, head_alone, images, outputs)
    if without.shape != found.shape:
        return  # another classifier, and nothing else was trained
    moved = float(np.abs(logit_change(found, without)).max())
    if moved <= NO_EFFECT * logit_range(found):
        what = "logit" if outputs == (LOGITS,) else "feature"
        raise AdapterError(
            f"{adapter.source}: adapter {name!r} moves no {what}: with and without it the backbone "
            f"answers the same (up to {moved:.0e}). It was not trained, or its tensors were lost. "
            "If that is meant, export with `allow_no_effect=True`."
        )


def _training_time_outputs(
    backbone: Backbone,
    adapter: Adapter | None,
    images: NDArray[np.float32],
    outputs: Sequence[str],
) -> list[NDArray[np.float64]]:
    """[n, columns] of each output."""
    import torch

    from hhdeploy.backbones.parameters import forgetting
    from hhdeploy.training import attach, detach
    from hhdeploy.verifying.wide import Float64

    model = backbone.model
    if adapter is not None:
        attach(model, adapter)
    try:
        # An adapted weight is computed when it is used, and dropped: cached, they would all be
        # there at once.
        with (
            torch.no_grad(),
            giving(model, backbone.facts.classifier, outputs),
            forgetting(model),
            Float64(),
        ):
            batches = [
                # A copy, and wide already: a model may write into what it is given.
                model(torch.from_numpy(images[i : i + _BATCH].astype(np.float64)))
                for i in range(0, len(images), _BATCH)
            ]
    finally:
        if adapter is not None:
            detach(model)
    if tuple(outputs) == (LOGITS,):
        return [np.concatenate([batch.numpy() for batch in batches])]
    return [
        np.concatenate([batch[i].flatten(1).numpy() for batch in batches])
        for i in range(len(outputs))
    ]


def _interleaved(counts: Sequence[int]) -> NDArray[np.int64]:
    """Order that takes the groups in turn, so that any batch mixes adapters."""
    starts = np.cumsum([0, *counts[:-1]])
    rounds = range(max(counts))
    return np.asarray(
        [s + i for i in rounds for s, n in zip(starts, counts, strict=True) if i < n], np.int64
    )
