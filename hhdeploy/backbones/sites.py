"""Which Linears an adapter can change, and what their sites are called.

A site is a Linear's module path, or for a fused query, key and value the path plus ``.q``, ``.k``
or ``.v`` (one third of its rows each). Any Linear is a site; those of attention and MLP have a kind
too, an alias that one table gives for the names of timm, transformers, torchvision, open_clip and
others. Pure functions, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Form = Literal["additive", "sequential"]
FORMS: tuple[Form, ...] = ("additive", "sequential")

KINDS = ("q", "k", "v", "proj", "fc1", "fc2")
# The sequential form acts on a whole Linear's output, in the paper after proj and fc2.
SEQUENTIAL_KINDS = ("proj", "fc2")

_QKV_PARTS = ("q", "k", "v")
# Kind -> what the path of its Linears ends in; of several that fit, the longest counts. A line
# each for timm, transformers, and the others: torchvision, open_clip, torch, HTA's authors.
_SUFFIXES = {
    "q": "attn.q attn.q_proj "
    "attention.q_proj self_attn.q_proj attention.query self.query "
    "attn.query",
    "k": "attn.k attn.k_proj attention.k_proj self_attn.k_proj attention.key self.key attn.key",
    "v": "attn.v attn.v_proj "
    "attention.v_proj self_attn.v_proj attention.value self.value "
    "attn.value",
    "proj": "attn.proj "
    "attention.o_proj self_attn.out_proj attention.output.dense "
    "self_attention.out_proj attn.out_proj attn.out",
    "fc1": "mlp.fc1 intermediate.dense mlp.0 mlp.linear_1 mlp.c_fc linear1 ffn.fc1",
    "fc2": "mlp.fc2 output.dense mlp.3 mlp.linear_2 mlp.c_proj linear2 ffn.fc2",
}
_KIND_OF = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
# Fused q, k and v: a Linear, or the packed weight of a MultiheadAttention.
_FUSED, PACKED = ("attn.qkv", "attention.qkv"), "in_proj"
# What pools the tokens for the classifier is reached by its path, never by a kind.
_POOLING = frozenset({"attn_pool", "head", "pooler"})


@dataclass(frozen=True)
class Site:
    """One weight that an adapter may change: ``out`` x ``in_`` of the torch layout.

    ``kind`` is one of `KINDS`, or "" for a Linear that no kind stands for.
    """

    name: str
    kind: str
    out: int
    in_: int


@dataclass(frozen=True)
class LinearSpec:
    """One Linear of the backbone that carries one site, or three (a fused qkv).

    Attributes:
        path: module path in the model; ``<path>.in_proj`` for a MultiheadAttention's packed weight.
        out: output features of the whole Linear.
        in_: input features.
        sites: one `Site`, or the q, k and v thirds in this order.
    """

    path: str
    out: int
    in_: int
    sites: tuple[Site, ...]


def linear_spec(path: str, out: int, in_: int, *, thirds: bool = True) -> LinearSpec:
    """The `LinearSpec` of a Linear at ``path``.

    Args:
        path: its module path.
        out, in_: its features.
        thirds: of a fused qkv: its rows are all of q, then all of k, then all of v.
    """
    if thirds and _is_fused(path, out, in_):
        kinds = ("",) * 3 if _pools(path) else _QKV_PARTS
        parts = zip(_QKV_PARTS, kinds, strict=True)
        sites = (Site(f"{path}.{part}", kind, out // 3, in_) for part, kind in parts)
        return LinearSpec(path, out, in_, tuple(sites))
    return LinearSpec(path, out, in_, (Site(path, kind_of(path), out, in_),))


def _is_fused(path: str, out: int, in_: int) -> bool:
    """Whether the rows of a Linear are q, k and v and no more.

    Blocks that compute MLP and attention side by side (timm's ``vit_*_xp_*``) have the rows of both
    in ``in_proj``.
    """
    if _ends_in(path, PACKED):
        return out == 3 * in_
    return out % 3 == 0 and any(_ends_in(path, suffix) for suffix in _FUSED)


def kind_of(path: str) -> str:
    """The kind that a module path stands for, "" if none."""
    if _pools(path):
        return ""
    fitting = [suffix for suffix in _KIND_OF if _ends_in(path, suffix)]
    return _KIND_OF[max(fitting, key=len)] if fitting else ""


def _ends_in(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")


def _pools(path: str) -> bool:
    return not _POOLING.isdisjoint(path.split("."))


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
    """The sites that each target stands for.

    A target is a kind (``q`` .. ``fc2``), the name of a site or of a Linear, the end of one as in
    PEFT (``query``), or a regular expression that matches a whole name.
    """
    linears = tuple(linears)
    return {target: _selected(linears, target) for target in targets}


def _selected(linears: Sequence[LinearSpec], target: str) -> list[Site]:
    if target in KINDS:
        return [site for site in sites_of(linears).values() if site.kind == target]
    named = [s for linear in linears for s in linear.sites if target in (s.name, linear.path)]
    if named:
        return named
    try:
        expression = re.compile(target)
    except re.error:
        return []
    return [
        site
        for linear in linears
        for site in linear.sites
        if any(
            name.endswith(f".{target}") or expression.fullmatch(name)
            for name in (site.name, linear.path)
        )
    ]
