"""A bundle whose adapters are undecided, and labelled images that they can hardly tell apart.

The true classes are the float32 graph's own answers, so that any answer that quantisation
changes is an answer lost, and there are some to lose.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hhdeploy.adapters.format import save_adapter
from hhdeploy.bundle import add_adapter, remove_adapter
from hhdeploy.runtime import Session, open_session
from tests.workshop import Workshop, copy_bundle

_CANDIDATES = 400


def make_undecided(workshop: Workshop, bundle: Path, root: Path) -> Path:
    """A copy of a bundle whose adapters answer class 0 or 1, which of them by little."""
    path = copy_bundle(bundle, root / "bundle")
    with open_session(bundle, device="cpu", threads=1) as session:
        means = {a: _logits(session, a, _pictures(a)).mean(axis=0) for a in session.adapters}
    for name, mean in means.items():
        adapter = workshop.adapters[name]
        head = adapter.head
        assert head is not None
        own = mean[: len(head.bias)]
        wanted = np.where(np.arange(len(own)) < 2, 10.0, -10.0)
        bias = (head.bias + wanted - own).astype(np.float32)
        save_adapter(replace(adapter, head=replace(head, bias=bias)), root / name)
        remove_adapter(path, name)
        add_adapter(path, name, root / name)
    return path


def write_close_calls(bundle: Path, root: Path, per_adapter: int) -> Path:
    """``root/ADAPTER/CLASS/image``: of float32's close calls every eighth."""
    with open_session(bundle, device="cpu", threads=1) as session:
        for adapter in session.adapters:
            pictures = _pictures(adapter)
            logits = _logits(session, adapter, pictures)
            margins = np.abs(logits[:, 0] - logits[:, 1])
            for index in np.argsort(margins)[: 8 * per_adapter : 8]:
                answer = int(np.argmax(logits[index]))
                folder = root / adapter / session.adapters[adapter].label(answer)
                folder.mkdir(parents=True, exist_ok=True)
                pictures[index].save(folder / f"{index}.png")
    return root


def _pictures(adapter: str) -> list[Image.Image]:
    """Other ones for every adapter: what one was calibrated on would not judge another."""
    coarse = np.random.default_rng(len(adapter) + ord(adapter[0])).integers(
        0, 256, (_CANDIDATES, 5, 7, 3), np.uint8
    )
    return [Image.fromarray(c).resize((32, 32)) for c in coarse]


def _logits(session: Session, adapter: str, pictures: list[Image.Image]) -> NDArray[np.float32]:
    return session.run(session.preprocess(pictures, adapter), adapter)
