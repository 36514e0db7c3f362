"""What TensorRT said, whole, with the node and the site it is about and what to do."""

from __future__ import annotations

import re
from typing import Any

from hhdeploy.errors import as_code
from hhdeploy.packages import Log

# Words of TensorRT's message -> what to do.
_HINTS: tuple[tuple[str, str], ...] = (
    (
        r"HW-specific datatypes|FP8.*not supported|fp8",
        "FP8 needs sm89 (Ada) or newer: pass `architectures=['sm89']`, or build with "
        "`precision='int8'`.",
    ),
    (
        r"zero.?point",
        "TensorRT takes symmetric INT8 only (all zero points 0). Calibrate with: "
        + as_code(
            "calibrate",
            "BUNDLE",
            data="DIR",
            settings=as_code("CalibrationSettings", precision="int8"),
        ),
    ),
    (
        r"2\^31|volume.*exceed|exceeds.*(limit|max)|too many elements",
        "A tensor is too large: lower `max_slots` or `batch[2]`.",
    ),
    (r"out of memory|OutOfMemory", "Lower `batch[2]`, or `workspace_mib`."),
)


def site_of(node: str) -> str | None:
    """The module path in a node's name: the site, if it is a Linear's or a branch's.

    >>> site_of("branch/blocks.0.attn.qkv.q/additive/scale")
    'blocks.0.attn.qkv.q'
    >>> site_of("blocks.0.attn.proj/MatMul_weight_quantized")
    'blocks.0.attn.proj'
    >>> site_of("model/Softmax") is None
    True
    """
    parts = node.split("/")
    candidates = parts[1:] if parts[0] == "branch" else parts
    if len(candidates) < 2 or "." not in candidates[0]:
        return None
    return candidates[0]


def parser_errors(parser: Any, log: Log) -> str:
    """Every error of an ``OnnxParser``: node, operator, site, what it said."""
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = error.node_name()
        where = f"node {node!r} ({error.node_operator()})" if node else "the graph"
        site = site_of(node) if node else None
        about = f" at {site}" if site else ""
        lines.append(f"  {where}{about}: {error.desc()} [{error.code().name}]")
    return explain("\n".join(lines) or log.text())


def explain(text: str) -> str:
    """A message, followed by what to do about it where that is known."""
    hints = [hint for words, hint in _HINTS if re.search(words, text, re.IGNORECASE)]
    sites = sorted({s for name in re.findall(r"[\w.]+(?:/[\w.@]+)+", text) if (s := site_of(name))})
    about = [f"Modules named there: {', '.join(sites)}."] if sites and " at " not in text else []
    return "\n".join([text or "(it said nothing)", *about, *hints])
