"""How a frozen model is asked for, and what comes back, whatever its source."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.licences import Licences
from hhdeploy.backbones.meaning import UNSTATED, Meaning
from hhdeploy.choices import SEEDS, listed, mapping, text, whole
from hhdeploy.errors import OptionError
from hhdeploy.files.writing import path_or_none
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

# Behind what a source says of files of its hub that it did not get.
OFFLINE = (
    "Without a network, HF_HUB_OFFLINE=1 in the environment takes what was loaded before, and says "
    "at once what was not."
)


@dataclass(frozen=True)
class BackboneSpec:
    """How to get the frozen model.

    Attributes:
        model: timm name, ``transformers:DIR_OR_HUB_ID`` or ``python:package.module:function``.
        args: further arguments: of ``timm.create_model``, of transformers' configuration, of the
            function.
        checkpoint: a file with the weights; None: weights come from the source.
        pretrained: False gives random weights (``seed``), for benchmarks and tests.
        seed: of the random weights.
        input_size: (channels, height, width) of the images, where the source does not say; timm
            does, and another one is refused.
    """

    model: str
    args: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    pretrained: bool = True
    seed: int = 0
    input_size: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        found: dict[str, Any] = {
            "model": model_name(self.model),
            "args": mapping(self.args, "model_args", "arguments"),
            "checkpoint": path_or_none(self.checkpoint, "checkpoint"),
            "seed": whole(self.seed, "seed", *SEEDS),
        }
        if self.input_size is not None:
            size = listed(self.input_size, "input_size", "channels, height and width")
            found["input_size"] = tuple(whole(number, "input_size", 1) for number in size)
            if len(size) != 3:
                raise OptionError(
                    f"`input_size`: expected channels, height and width, found {self.input_size!r}."
                )
        for name, value in found.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Loaded:
    """What a source gives.

    Attributes:
        model: called with images, it returns a tensor [batch, classes or features].
        name: what the model is called from now on: the source and a public name, never a path.
        classifier: module path of the Linear that the output comes from; "" without one.
        classes: of that classifier; 0 where it is a placeholder.
        preprocess: how images become inputs.
        notes: what had to be assumed, a line each.
        traced_with: what the traced graph depends on beside the weights, for the cache's key;
            None where nobody can tell, so that the graph is never cached.
        license: of the weights, as their source states it; empty where it says nothing.
        meaning: of the classifier's numbers, as far as the source says it.
    """

    model: nn.Module
    name: str
    classifier: str
    classes: int
    preprocess: Preprocess
    notes: tuple[str, ...] = ()
    traced_with: tuple[str, ...] | None = None
    license: Licences = ()
    meaning: Meaning = UNSTATED


@dataclass(frozen=True)
class Backbone:
    """A loaded model in eval mode, float32, and what planning needs to know of it.

    ``facts.classes`` is 0 when the classifier is a placeholder. ``notes`` and ``traced_with`` are
    those of `Loaded`.
    """

    model: nn.Module
    facts: BackboneFacts
    notes: tuple[str, ...] = ()
    traced_with: tuple[str, ...] | None = None


def model_name(given: object) -> str:
    """A ``model`` parameter: a name, or a path, which a folder of timm's is. Raises
    `OptionError`."""
    name = os.fspath(given) if isinstance(given, os.PathLike) else given
    return text(name, "model", "the name of a model")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What torch draws in the block begins at ``seed``; the caller's numbers go on behind it.

    On the CPU, where models are made: ``torch.manual_seed`` would seed the caller's GPUs too.
    """
    import torch

    before = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(before)
