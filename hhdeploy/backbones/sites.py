"""Which Linears an adapter can change, and what their sites are called.

A site is a Linear's module path, or for a fused ``attn.qkv`` the path plus ``.q``, ``.k`` or
``.v`` (one third of its rows each). Names follow timm; pure functions, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Form = Literal["additive", "sequential"]
FORMS: tuple[Form, ...] = ("additive", "sequential")

KINDS = ("q", "k", "v", "proj", "fc1", "fc2")
# The sequential form acts on a whole Linear's output, in the paper after proj and fc2.
SEQUENTIAL_KINDS = ("proj", "fc2")

_QKV_PARTS = ("q", "k", "v")
# The last two components of a module path, and the kind it stands for.
_KIND_OF = {
    ("attn", "q"): "q",
    ("attn", "k"): "k",
    ("attn", "v"): "v",
    ("attn", "q_proj"): "q",
    ("attn", "k_proj"): "k",
    ("attn", "v_proj"): "v",
    ("attn", "proj"): "proj",
    ("mlp", "fc1"): "fc1",
    ("mlp", "fc2"): "fc2",
}


@dataclass(frozen=True)
class Site:
    """One weight that an adapter may change: ``out`` x ``in_`` of the torch layout."""

    name: str
    kind: str
    out: int
    in_: int


@dataclass(frozen=True)
class LinearSpec:
    """One Linear of the backbone that carries one site, or three (a fused qkv).

    Attributes:
        path: module path in the timm model.
        out: output features of the whole Linear.
        in_: input features.
        sites: one `Site`, or the q, k and v thirds in this order.
    """

    path: str
    out: int
    in_: int
    sites: tuple[Site, ...]


def linear_spec(path: str, out: int, in_: int) -> LinearSpec | None:
    """The `LinearSpec` of a Linear at ``path``, or None if adapters do not target it.

    Pooling heads (``attn_pool``) and patch embeddings are never targets.
    """
    *ancestors, parent, name = ("", "", *path.split("."))
    if "attn_pool" in (*ancestors, parent):
        return None
    if (parent, name) == ("attn", "qkv"):
        if out % 3:
            return None
        sites = tuple(Site(f"{path}.{part}", part, out // 3, in_) for part in _QKV_PARTS)
        return LinearSpec(path, out, in_, sites)
    kind = _KIND_OF.get((parent, name))
    if kind is None:
        return None
    return LinearSpec(path, out, in_, (Site(path, kind, out, in_),))


def split_target(target: str) -> tuple[str, Form]:
    """``"proj:sequential"`` -> ("proj", "sequential"); without a form: additive."""
    name, _, form = target.partition(":")
    if form not in ("", *FORMS):
        raise ValueError(f"form must be one of {', '.join(FORMS)}, found {form!r} in {target!r}")
    return name, "sequential" if form == "sequential" else "additive"


def sites_of(linears: Iterable[LinearSpec]) -> dict[str, Site]:
    """All sites of some Linears by name, in their order."""
    return {site.name: site for linear in linears for site in linear.sites}


def select_sites(linears: Iterable[LinearSpec], targets: Sequence[str]) -> dict[str, list[Site]]:
    """The sites that each target stands for: a kind (``q`` .. ``fc2``) or one site's name."""
    sites = sites_of(linears)
    return {target: [s for s in sites.values() if target in (s.kind, s.name)] for target in targets}
