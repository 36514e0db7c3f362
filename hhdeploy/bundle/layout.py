"""The row of the bank: one adapter as one flat float32 vector.

Layout, C order, per adapted Linear in execution order (additive before sequential):
``diag`` [n, min(out, in)], ``right`` [n, k, in], ``left_t`` [n, k, out] with n = 3 for q, k, v
of a fused qkv, else 1, and in an additive branch that has room for them ``s_in`` [1, in],
``s_out`` [n, out] (both less one) and ``db`` [n, out]; then ``head.weight`` [classes, dim],
``head.bias`` [classes] and ``head.own`` [1]. A sequential part holds M - I, so a row of zeros is
the bare backbone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.format import PARTS, Adapter, Part
from hhdeploy.algebra import SiteDelta
from hhdeploy.backbones.sites import Form
from hhdeploy.choices import Precision
from hhdeploy.errors import CapacityError
from hhdeploy.files.bundle_json import unknown_keys

FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Branch:
    """The side branch of one form at one Linear.

    Attributes:
        linear: module path of the Linear.
        form: ``additive`` or ``sequential``.
        sites: names of its n sites (q, k, v of a fused qkv, else the path itself).
        out: output features of one site.
        in_: input features of one site (equal to ``out`` for the sequential form).
        rank: k, the room for the thin product.
        extras: which of s_in, s_out and db it has room for, in this order; additive only.
        unknown: JSON keys that this version does not know, kept as they are.
    """

    linear: str
    form: Form
    sites: tuple[str, ...]
    out: int
    in_: int
    rank: int
    extras: tuple[Part, ...] = ()
    unknown: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """``<linear>/<form>``, the prefix of its parts and of its nodes in the graph."""
        return f"{self.linear}/{self.form}"

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the parts, in row order."""
        n = len(self.sites)
        extras = {"s_in": (1, self.in_), "s_out": (n, self.out), "db": (n, self.out)}
        return {
            f"{self.name}/diag": (n, min(self.out, self.in_)),
            f"{self.name}/right": (n, self.rank, self.in_),
            f"{self.name}/left_t": (n, self.rank, self.out),
            **{f"{self.name}/{part}": extras[part] for part in self.extras},
        }


@dataclass(frozen=True)
class RowLayout:
    """Where everything stands in a row.

    Attributes:
        branches: in execution order, additive before sequential.
        classes: room for classes of the adapters' own heads; 0: no head parts.
        dim: features that the classifier sees.
        backbone_head: True if the backbone's own classifier is in the graph.
        unknown: as of `Branch`.
    """

    branches: tuple[Branch, ...]
    classes: int
    dim: int
    backbone_head: bool
    unknown: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @cached_property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every part, in row order."""
        parts: dict[str, tuple[int, ...]] = {}
        for branch in self.branches:
            parts |= branch.parts
        if self.classes:
            parts |= {
                "head.weight": (self.classes, self.dim),
                "head.bias": (self.classes,),
                "head.own": (1,),
            }
        return parts

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Name -> first index of every part."""
        offsets, position = {}, 0
        for name, shape in self.parts.items():
            offsets[name] = position
            position += math.prod(shape)
        return offsets

    @property
    def has_extras(self) -> bool:
        """Whether a row has room for s_in, s_out or db anywhere."""
        return any(branch.extras for branch in self.branches)

    @property
    def size(self) -> int:
        """Floats in a row."""
        return sum(math.prod(shape) for shape in self.parts.values())

    def views(self, row: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Writable views of all parts of a row."""
        return {
            name: row[offset : offset + math.prod(self.parts[name])].reshape(self.parts[name])
            for name, offset in self.offsets.items()
        }

    def misfit(
        self, bank: NDArray[np.float32], row: int | None, classes: int, backbone: int
    ) -> str | None:
        """What is wrong with the row and the number of classes that an adapter is said to have in
        a bank, or None: a softmax over a part of its classes would be wrong without a word.

        ``backbone``: classes of the backbone's classifier, with which an adapter answers that has
        none of its own; 0 where there is none.
        """
        if row is None or not 0 < row < len(bank):
            return f"expected a row from 1 to {len(bank) - 1}, found {row!r}"
        own_head = float(bank[row, self.offsets["head.own"]]) if self.classes else 0.0
        if own_head not in (0.0, 1.0):  # runtimes differ in what they make of NaN
            return f"expected a head.own of 0 or 1 in its row, found {own_head:g}"
        if not own_head:
            wrong = f"expected the backbone's {backbone} classes, found {classes}"
            return wrong if backbone and classes != backbone else None
        # Not `views`, all of whose parts a bank of a thousand adapters would have to make.
        bias = bank[row, self.offsets["head.bias"] :][: self.classes]
        # Columns that are none of its own have a bias of -inf.
        beyond = np.flatnonzero(bias[classes:] != -np.inf)
        if beyond.size:
            own = classes + int(beyond[-1]) + 1
            return f"expected {own} classes, which its row has, found {classes}"
        return None

    def pack(self, name: str, adapter: Adapter) -> NDArray[np.float32]:
        """One adapter as a row: canonical deltas in float64, cast once to float32.

        Requires that `hhdeploy.adapters.checks.check` has passed.

        Raises:
            CapacityError: naming the flag of ``hhdeploy export`` that would have made room.
        """
        row = np.zeros(self.size, np.float32)
        parts = self.views(row)
        where = {(site, b.form): (b, i) for b in self.branches for i, site in enumerate(b.sites)}
        for site, tensors in adapter.sites.items():
            if tensors.shape is not None:
                _pack_delta(name, adapter, site, _place(where, name, site, adapter.form), parts)
            if tensors.parts:
                # A sequential branch alone has no room for them, which is what there is to say.
                form: Form = "additive" if (site, "additive") in where else adapter.form
                _pack_parts(name, adapter, site, _place(where, name, site, form), parts)
        bad = row.size - int(np.count_nonzero(np.isfinite(row)))
        if bad:
            raise CapacityError(
                f"adapter {name!r}: {bad} values of its row leave the range of float32 "
                "(products of very large u, v and d). Train it again with smaller steps."
            )
        self._pack_head(name, adapter, parts)
        return row

    def _pack_head(
        self, name: str, adapter: Adapter, parts: Mapping[str, NDArray[np.float32]]
    ) -> None:
        head = adapter.head
        if head is None:
            if not self.backbone_head:
                raise CapacityError(
                    f"adapter {name!r} has no classifier and the bundle did not keep the "
                    "backbone's. Export with `keep_backbone_head=True`."
                )
            return
        classes = head.weight.shape[0]
        if classes > self.classes:
            raise CapacityError(
                f"adapter {name!r} has {classes} classes, the bundle has room for {self.classes}. "
                f"Export with `max_classes={classes}`."
            )
        parts["head.weight"][:classes] = head.weight
        parts["head.bias"][:] = -np.inf
        parts["head.bias"][:classes] = head.bias
        parts["head.own"][:] = 1.0

    def known(self) -> RowLayout:
        """The same without keys that this version does not know."""
        branches = tuple(replace(branch, unknown={}) for branch in self.branches)
        return replace(self, branches=branches, unknown={})

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``row`` entry."""
        return {
            "size": self.size,
            "classes": self.classes,
            "dim": self.dim,
            "backbone_head": self.backbone_head,
            "branches": [
                {
                    "linear": b.linear,
                    "form": b.form,
                    "sites": list(b.sites),
                    "out": b.out,
                    "in": b.in_,
                    "rank": b.rank,
                    **({"parts": list(b.extras)} if b.extras else {}),
                    **b.unknown,
                }
                for b in self.branches
            ],
            "parts": [
                {"part": name, "offset": self.offsets[name], "shape": list(shape)}
                for name, shape in self.parts.items()
            ],
            **self.unknown,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RowLayout:
        """Read what `to_json` wrote; the part table and the size are derived again, and have to
        agree."""
        branches: Sequence[Mapping[str, Any]] = content["branches"]
        layout = cls(
            tuple(
                Branch(
                    b["linear"],
                    b["form"],
                    tuple(b["sites"]),
                    b["out"],
                    b["in"],
                    b["rank"],
                    in_row_order(b.get("parts", ())),
                    unknown_keys(b, "branch"),
                )
                for b in branches
            ),
            content["classes"],
            content["dim"],
            content["backbone_head"],
            unknown_keys(content, "row"),
        )
        if layout.to_json()["parts"] != content["parts"]:
            raise ValueError("row.parts: expected those of row.branches, in their order")
        if content["size"] != layout.size:
            found = content["size"]
            raise ValueError(f"row.size: expected {layout.size}, of its parts, found {found!r}")
        return layout


def in_row_order(parts: Iterable[str]) -> tuple[Part, ...]:
    """Some of s_in, s_out and db in the order they have in a row, each once.

    Raises:
        ValueError: naming what is none of them.
    """
    asked = set(parts)
    if unknown := sorted(asked.difference(PARTS)):
        raise ValueError(f"expected some of {', '.join(PARTS)}, found {', '.join(unknown)}")
    return tuple(part for part in PARTS if part in asked)


def check_row_range(name: str, row: NDArray[np.float32], precisions: Iterable[Precision]) -> None:
    """A row is cast after the Gather, so float16 graphs need values that float16 holds.

    Raises:
        CapacityError: naming the adapter and its largest value.
    """
    largest = float(np.max(np.abs(row[np.isfinite(row)]), initial=0.0))
    if "float16" in precisions and largest > FLOAT16_MAX:
        raise CapacityError(
            f"adapter {name!r}: a value of {largest:.3g} in its row is beyond float16's range "
            f"({FLOAT16_MAX:.0f}), and the bundle has a float16 graph. Use bfloat16."
        )


def _place(
    where: Mapping[tuple[str, Form], tuple[Branch, int]], name: str, site: str, form: Form
) -> tuple[Branch, int]:
    """The branch of a site and which of the branch's sites it is."""
    found = where.get((site, form))
    if found is None:
        raise CapacityError(
            f"adapter {name!r} changes {site} ({form}), which this bundle has no "
            "branch for. Export again with this adapter, or reserve it with `sites`."
        )
    return found


def _pack_delta(
    name: str,
    adapter: Adapter,
    site: str,
    place: tuple[Branch, int],
    parts: Mapping[str, NDArray[np.float32]],
) -> None:
    branch, index = place
    delta = adapter.delta(site)
    assert delta is not None
    if adapter.form == "sequential":
        delta = delta.minus_identity()
    if delta.rank > branch.rank:  # what is zero needs no room
        used = delta.left.any(axis=0) & delta.right.any(axis=1)
        delta = SiteDelta(delta.diag, delta.left[:, used], delta.right[used])
    k = delta.rank
    if k > branch.rank:
        raise CapacityError(
            f"adapter {name!r}: {site} needs rank {k} (2 for the reflections + its low-rank "
            f"term), the bundle has room for {branch.rank}. Export with `max_rank={k}`."
        )
    with np.errstate(over="ignore"):  # an overflow is reported by `pack`, with the adapter's name
        parts[f"{branch.name}/diag"][index] = delta.diag
        parts[f"{branch.name}/right"][index, :k] = delta.right
        parts[f"{branch.name}/left_t"][index, :k] = delta.left.T


def _pack_parts(
    name: str,
    adapter: Adapter,
    site: str,
    place: tuple[Branch, int],
    parts: Mapping[str, NDArray[np.float32]],
) -> None:
    """s_in - 1, s_out - 1 and db of one site."""
    branch, index = place
    sizes: dict[Part, int] = {"s_in": branch.in_, "s_out": branch.out, "db": branch.out}
    for part, trained in adapter.sites[site].parts.items():
        if part not in branch.extras:
            raise CapacityError(
                f"adapter {name!r} has {site}.{part}, and the rows of this bundle have no {part} "
                f"at {branch.linear}. Export again with this adapter, or reserve {part} with "
                "`parts`."
            )
        if trained.size != sizes[part]:
            raise CapacityError(
                f"adapter {name!r}: {site}.{part} has {trained.size} values, the backbone's site "
                f"takes {sizes[part]}. The adapter belongs to another model."
            )
        if part == "s_in":
            _check_one_s_in(name, adapter, branch)
        neutral = 0.0 if part == "db" else 1.0
        row = 0 if part == "s_in" else index
        change = adapter.strength * (trained.astype(np.float64) - neutral)
        parts[f"{branch.name}/{part}"][row] = change


def _check_one_s_in(name: str, adapter: Adapter, branch: Branch) -> None:
    """q, k and v of a fused qkv read one input, so a row has one s_in for all three."""
    ones = np.ones(branch.in_, np.float32)
    found = [
        ones if site not in adapter.sites or (s := adapter.sites[site].s_in) is None else s
        for site in branch.sites
    ]
    if any(not np.array_equal(found[0], other) for other in found[1:]):
        raise CapacityError(
            f"adapter {name!r}: s_in of {', '.join(branch.sites)}: expected the same values, found "
            f"different ones: the sites are thirds of one Linear, {branch.linear}, and a side "
            "branch scales its input once for all. Export it with `fold=True`, in a bundle of its "
            "own."
        )
