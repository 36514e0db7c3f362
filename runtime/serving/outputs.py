"""Logits to the outputs that a request asks for.

`logits` FP32 (the default), `probabilities` FP32, `labels` BYTES. All are cut to the adapter's own
classes; where a request mixes adapters, to the widest of them, padded with -inf (logits) and 0
(probabilities). Triton's classification extension gives the best classes of logits or
probabilities as `score:index:label`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle.answers import label_of, softmax
from hhdeploy.bundle.manifest import AdapterEntry
from hhdeploy.runtime.serving.errors import RequestError
from hhdeploy.runtime.serving.messages import BYTES, FP32, Tensor, Wanted, bytes_array

LOGITS, PROBABILITIES, LABELS = "logits", "probabilities", "labels"
OUTPUTS = (LOGITS, PROBABILITIES, LABELS)


def check_outputs(asked: Sequence[Wanted]) -> Sequence[Wanted]:
    """What a request asks for, or the default.

    Raises:
        RequestError: an output that there is not, or twice the same.
    """
    for output in asked:
        if output.name not in OUTPUTS:
            raise RequestError(
                f"unknown output {output.name[:80]!r}: expected {', '.join(OUTPUTS)}."
            )
        if sum(other.name == output.name for other in asked) > 1:
            raise RequestError(f"outputs: {output.name!r} is asked for twice.")
        if output.top and output.name == LABELS:
            raise RequestError("output labels: classification is of logits or probabilities.")
    return asked or (Wanted(LOGITS),)


def output_of(
    wanted: Wanted,
    logits: NDArray[np.float32],
    entries: Sequence[AdapterEntry | None],
    classes: Sequence[int],
) -> Tensor:
    """One output.

    Args:
        wanted: which.
        logits: float32 [n, classes of the graph].
        entries: of each image's adapter; None: the backbone.
        classes: of each image's adapter.
    """
    widest = max(classes)
    logits = logits[:, :widest]
    if wanted.name == LABELS:
        best = [
            label_of(entry, int(np.argmax(row[:n])))
            for entry, row, n in zip(entries, logits, classes, strict=True)
        ]
        return Tensor(LABELS, BYTES, _texts(best))
    scores = logits if wanted.name == LOGITS else softmax(logits).astype(np.float32)
    if not wanted.top:
        return Tensor(wanted.name, FP32, scores)
    top = min(wanted.top, widest)
    found: list[str] = []
    for entry, row, n in zip(entries, scores, classes, strict=True):
        order = np.argsort(-row[:n], kind="stable")[:top]
        texts = [f"{row[i]:f}:{i}:{label_of(entry, int(i))}" for i in order]
        found += texts + [""] * (top - len(texts))
    return Tensor(wanted.name, BYTES, _texts(found).reshape(len(entries), top))


def _texts(texts: Sequence[str]) -> NDArray[np.object_]:
    return bytes_array([text.encode("utf-8", "replace") for text in texts])
