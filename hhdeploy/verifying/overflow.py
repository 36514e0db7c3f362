"""Which site of a typed graph overflows, and for which adapter: run on the images that failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle import Bundle
from hhdeploy.choices import Precision, TypedPrecision
from hhdeploy.errors import MissingDependencyError

# What helps: the type of the same size with float32's range, else float32 itself.
_WIDER: Mapping[TypedPrecision, Precision] = {"float16": "bfloat16", "bfloat16": "float32"}


def find_overflow(
    twin: Bundle, precision: TypedPrecision, images: NDArray[np.float32], ids: NDArray[np.int64]
) -> str:
    """What is too large for a precision, where, and what to do, in words.

    "" if nothing is, or where ONNX Runtime is not there to look for it.

    Args:
        twin: a bundle whose float32 graph is the rounding twin.
        precision: that it stands for.
        images: float32 [n, 3, H, W], those of one adapter that gave no finite logits.
        ids: int64 [n], their rows.
    """

    import onnx_ir as ir

    from hhdeploy.calibration.probe import CpuSession
    from hhdeploy.exporters.precision.overflow import watched
    from hhdeploy.graph import open_graph

    path = twin.graph("float32")
    model, peaks = watched(open_graph(path))
    try:
        session = CpuSession(ir.to_proto(model), path)
    except MissingDependencyError:
        return ""  # the failure was seen in OpenVINO and is told without its place
    for image, row in zip(images, ids, strict=True):
        found = session.run([peak.name for peak in peaks], _feed(twin, image, row))
        for peak, largest in zip(peaks, found, strict=True):
            if peak.overflows(float(largest)):
                return (
                    f"{precision} overflows at {peak.site}: a value of {float(largest):.3g}, the "
                    f"type ends at {peak.limit:.5g}; use {_WIDER[precision]}"
                )
    return ""


def _feed(bundle: Bundle, image: NDArray[np.float32], row: np.int64) -> dict[str, NDArray[Any]]:
    feed: dict[str, NDArray[Any]] = {"images": image[None]}
    if bundle.manifest.layout is not None:
        feed["adapter_ids"] = np.asarray([row], np.int64)
        if not bundle.manifest.bank_as_constant:
            feed["adapter_bank"] = bundle.bank()
    return feed
