"""PEFT in eager PyTorch, and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import THREADS
from benchmarks.peers.tasks import CLASSES, Array, Case, by_task


def base_model(case: Case) -> Any:
    """timm's model with the case's weights."""
    import timm
    from safetensors.torch import load_file

    model = timm.create_model(case.model, pretrained=False, num_classes=CLASSES)
    model.load_state_dict(load_file(str(case.weights)))
    return model.eval()


def peft_model(case: Case, names: Sequence[str]) -> Any:
    """PEFT's model with these adapters, in eval mode."""
    from peft import PeftModel

    first, *rest = names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(
            base_model(case), str(case.peft(first)), adapter_name=first
        )
        for name in rest:
            model.load_adapter(str(case.peft(name)), adapter_name=name)
    return model.eval()


class _Peft:
    """A PEFT model that grows."""

    promised = "float32"

    def __init__(self, case: Case) -> None:
        import torch

        torch.set_num_threads(THREADS)
        self._case, self._model = case, None

    def add(self, name: str) -> None:
        """Load one more adapter from its directory."""
        if self._model is None:
            self._model = peft_model(self._case, [name])
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model.load_adapter(str(self._case.peft(name)), adapter_name=name)
        self._model.eval()

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


class PeftMixed(_Peft):
    """``adapter_names=``: one run, a product an adapter at each site."""

    def run(self, images: Array, names: Sequence[str]) -> Array:
        """Logits of a batch."""
        import torch

        with torch.inference_mode():
            found: Array = self._model(torch.from_numpy(images), adapter_names=list(names)).numpy()
        return found


class PeftOneByOne(_Peft):
    """``set_adapter``, then the images of that adapter."""

    def switch(self, name: str) -> None:
        """What has to be done before another adapter's image."""
        self._model.set_adapter(name)

    def run(self, images: Array, names: Sequence[str]) -> Array:
        """Logits of a batch."""
        import torch

        found = np.empty((len(images), CLASSES), np.float32)
        with torch.inference_mode():
            for name, rows in by_task(names):
                self.switch(name)
                found[rows] = self._model(torch.from_numpy(images[rows])).numpy()
        return found


class PeftCompiled(PeftMixed):
    """The mixed batch under ``torch.compile``; a new mix of adapters is compiled anew."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._compiled: Any = None

    def add(self, name: str) -> None:
        """Load one more; what was compiled does not know it."""
        super().add(name)
        self._compiled = None

    def run(self, images: Array, names: Sequence[str]) -> Array:
        """Logits of a batch."""
        import torch

        if self._compiled is None:
            torch._dynamo.reset()
            self._compiled = torch.compile(self._model, dynamic=False)
        with torch.inference_mode():
            found: Array = self._compiled(
                torch.from_numpy(images), adapter_names=list(names)
            ).numpy()
        return found
