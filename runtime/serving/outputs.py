"""Logits to the outputs that a request asks for.

`logits` and `probabilities` FP32, `labels` and `answers` BYTES, and `features` or `tokens` FP32 of
a bundle that gives them; where it gives no logits, they are all there is. Where none is asked for
there are all that the adapters have. Logits are cut to the adapter's own classes; where a request
mixes adapters, to the widest of them, padded with -inf, probabilities with 0. Triton's
classification extension gives the best classes of logits or probabilities as `score:index:label`,
and as many answers.

An adapter's problem type says what its logits mean: probabilities of labels are independent, and
`labels` are all of 0.5 or more, between `;`. A regression has neither: its values are its logits.
`answers` suit every adapter: a JSON object an image, `{"problem_type": ..., "answers": [...]}`,
with label, index, score and positive of each, as `Session.classify` has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.adapters.config import VALUES
from hhdeploy.bundle.answers import (
    answers_of,
    are_numbers,
    best,
    label_of,
    probabilities,
    problem_type,
)
from hhdeploy.bundle.manifest import AdapterEntry, Manifest
from hhdeploy.runtime.serving.errors import NoNumbersError, RequestError
from hhdeploy.runtime.serving.messages import (
    BYTES,
    FP32,
    Tensor,
    Value,
    Wanted,
    bytes_array,
)

LOGITS, PROBABILITIES, LABELS, ANSWERS = "logits", "probabilities", "labels", "answers"
# No picture has such numbers, however it is preprocessed: 16 bits have 65,535 at most.
_VAST = 1e6
_OF_LOGITS = (LOGITS, PROBABILITIES, LABELS, ANSWERS)
# What a class of an image costs where texts are made of it, in bytes that are written.
_TEXT_BYTES = 32
# Answers that become JSON at once: others may have their turn in between.
_AT_ONCE = 256


def outputs_of(manifest: Manifest) -> tuple[str, ...]:
    """What requests may ask a bundle for."""
    features = tuple(manifest.features)
    return (*_OF_LOGITS, *features) if manifest.classes else features


def asked_outputs(asked: Sequence[Wanted], there: Sequence[str]) -> Sequence[Wanted]:
    """What a request asks for.

    Args:
        asked: in the order that they are answered in.
        there: see `outputs_of`.

    Raises:
        RequestError: an output that there is not, or twice the same.
    """
    for output in asked:
        if output.name not in there:
            raise RequestError(f"unknown output {output.name[:80]!r}: expected {', '.join(there)}.")
        if sum(other.name == output.name for other in asked) > 1:
            raise RequestError(f"outputs: {output.name!r} is asked for twice.")
        if output.top and output.name not in (LOGITS, PROBABILITIES, ANSWERS):
            raise RequestError(
                f"output {output.name}: classification is of logits, probabilities or answers."
            )
    return asked


def all_outputs(
    entries: Sequence[AdapterEntry | None], there: Sequence[str], binary: bool
) -> tuple[Wanted, ...]:
    """What a request gets that asks for none: all that each of its adapters (None: the backbone)
    has, the values of a regression no probabilities and no labels; ``there``: `outputs_of`."""
    values = any(entry is not None and entry.problem_type == VALUES for entry in entries)
    without = (PROBABILITIES, LABELS) if values else ()
    return tuple(Wanted(name, binary=binary) for name in there if name not in without)


def work_of(wanted: Sequence[Wanted], classes: Sequence[int]) -> int:
    """Bytes that making outputs counts as, see `Aside.run`; ``classes``: of each image's adapter.

    Arrays are made in no time, texts one by one.
    """
    texts = sum(w.top > 0 or w.name in (LABELS, ANSWERS) for w in wanted)
    return _TEXT_BYTES * texts * sum(classes)


def answered_by(entries: Sequence[AdapterEntry | None], digests: Sequence[str]) -> dict[str, Value]:
    """The parameters of an answer that say who gave it.

    ``adapter`` and ``adapter_digest``: name and sha256 of the tensors' file; where images of one
    request have several, one an image, with commas. The backbone's name is `BACKBONE`, and it has
    no digest. ``backbone``: whether it answered for an image.

    Args:
        entries: of each image's adapter; None: the backbone.
        digests: of each image's adapter.
    """
    names = [BACKBONE if entry is None else entry.name for entry in entries]
    several = len(set(names)) > 1
    return {
        "adapter": ",".join(names) if several else names[0],
        "adapter_digest": ",".join(digests) if several else digests[0],
        "backbone": None in entries,
    }


def check_finite(
    pixels: NDArray[np.float32],
    logits: NDArray[np.float32],
    classes: Sequence[int],
    entries: Sequence[AdapterEntry | None],
) -> None:
    """Refuses logits that are no numbers, see `are_numbers`.

    Args:
        pixels: float32 [n, 3, H, W], as the graph got them.
        logits: float32 [n, classes of the graph].
        classes: of each image's adapter.
        entries: of each image's adapter; None: the backbone.

    Raises:
        RequestError: naming the first image that holds none itself, or vast ones.
        NoNumbersError: naming the first image and the adapter that makes none of it.
    """
    for index, (row, own) in enumerate(zip(logits, classes, strict=True)):
        entry = entries[index]
        if are_numbers(row[:own], entry):
            continue
        if not np.isfinite(pixels[index]).all():
            raise RequestError(
                f"input images: image {index} holds NaN or infinities, or numbers beyond float32: "
                "its answer is no number either. Ask for logits to see them."
            )
        if (largest := float(np.abs(pixels[index]).max())) > _VAST:
            raise RequestError(
                f"input images: image {index}: expected numbers of a picture, found ones of "
                f"{largest:.2g} once it is preprocessed: its answer is no number. Ask for logits "
                "to see them."
            )
        raise NoNumbersError(
            f"image {index}, adapter {entry.name if entry is not None else BACKBONE!r}: the logits "
            "are no numbers (NaN or infinity). Ask for logits to see them. An adapter whose "
            "training diverged gives such, and float16 of large activations."
        )


def output_of(
    wanted: Wanted,
    found: Mapping[str, NDArray[np.float32]],
    entries: Sequence[AdapterEntry | None],
    classes: Sequence[int],
    as_json: bool = False,
) -> Tensor:
    """One output.

    Args:
        wanted: which.
        found: float32 [n, ...] of every output of the graph.
        entries: of each image's adapter; None: the backbone.
        classes: of each image's adapter.
        as_json: what is not wanted binary becomes JSON.

    Raises:
        RequestError: probabilities or labels of a regression, or JSON cannot hold a value. To
            write it were too late: it would be counted as answered.
    """
    tensor = _output(wanted, found, entries, classes)
    if as_json and not wanted.binary and tensor.datatype != BYTES:
        _check_json(tensor)
    return tensor


def _check_json(tensor: Tensor) -> None:
    if not np.isfinite(tensor.array).all():
        raise RequestError(
            f"output {tensor.name!r} has values that JSON cannot hold: where one request mixes "
            "adapters with different numbers of classes, logits are padded with -inf. Ask for the "
            "output 'probabilities', for binary data, or for one adapter at a time; NaN comes from "
            "images that hold NaN or infinities."
        )


def _output(
    wanted: Wanted,
    found: Mapping[str, NDArray[np.float32]],
    entries: Sequence[AdapterEntry | None],
    classes: Sequence[int],
) -> Tensor:
    if wanted.name not in _OF_LOGITS:
        return Tensor(wanted.name, FP32, found[wanted.name])
    widest = max(classes)
    logits = found[LOGITS][:, :widest]
    rows = list(zip(entries, logits, classes, strict=True))
    if wanted.name in (PROBABILITIES, LABELS):
        _refuse_values(wanted.name, entries)
    if wanted.name == LABELS:
        return Tensor(LABELS, BYTES, _texts([_said(*row) for row in rows]))
    if wanted.name == ANSWERS:
        return Tensor(ANSWERS, BYTES, _texts([_answers(*row, wanted.top) for row in rows]))
    scores = logits
    if wanted.name == PROBABILITIES:
        scores = np.zeros(logits.shape, np.float32)
        for shares, (entry, row, n) in zip(scores, rows, strict=True):
            shares[:n] = probabilities(row[:n], problem_type(entry))
    if not wanted.top:
        return Tensor(wanted.name, FP32, scores)
    top = min(wanted.top, widest)
    texts: list[str] = []
    for entry, row, n in zip(entries, scores, classes, strict=True):
        order = np.argsort(-row[:n], kind="stable")[:top]
        best_of = [f"{row[i]:f}:{i}:{label_of(entry, int(i))}" for i in order]
        texts += best_of + [""] * (top - len(best_of))
    return Tensor(wanted.name, BYTES, _texts(texts).reshape(len(entries), top))


def _refuse_values(output: str, entries: Sequence[AdapterEntry | None]) -> None:
    for entry in entries:
        if entry is not None and entry.problem_type == VALUES:
            raise RequestError(
                f"output {output}: adapter {entry.name!r} answers with values, which have none. "
                f"Ask for {LOGITS} or {ANSWERS}."
            )


def _said(entry: AdapterEntry | None, logits: NDArray[np.float32], classes: int) -> str:
    found = answers_of(logits, entry, classes)
    return ";".join(answer.label for answer in found if answer.positive)


def _answers(
    entry: AdapterEntry | None, logits: NDArray[np.float32], classes: int, top: int
) -> str:
    """As JSON; a number that is none (NaN) is null there."""
    found = answers_of(logits, entry, classes)
    said = [
        {
            "label": answer.label,
            "index": answer.index,
            "score": answer.score if np.isfinite(answer.score) else None,
            "positive": answer.positive,
        }
        for answer in best(found, top or classes)
    ]
    pieces = (json.dumps(said[i : i + _AT_ONCE])[1:-1] for i in range(0, len(said), _AT_ONCE))
    head = json.dumps({"problem_type": problem_type(entry), "answers": []})
    return f"{head.removesuffix(']}')}{', '.join(pieces)}]}}"


def _texts(texts: Sequence[str]) -> NDArray[np.object_]:
    return bytes_array([text.encode("utf-8", "replace") for text in texts])
