"""RLRR and ARC files of HTA's authors' group, by what their papers' equations say.

Both train a ViT whose blocks are those of the JAX checkpoints, query, key and value apart. RLRR
(arXiv 2403.10030) keeps W + diag(line) W diag(col) of every Linear, its shifted bias, and scaled
and shifted norms: to be folded. ARC (arXiv 2310.06234) changes what the Linears after a norm read:
h + (h U diag(s)) Uᵀ + b, with U shared by all blocks: a product of low rank and a bias, live.
Images are resized to a square without a crop.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.applying import path_of_parameters, values_of
from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter
from hhdeploy.adapters.importers.difference import changed_parameters
from hhdeploy.adapters.importers.template import ImportOptions, Tensors, finish, largest_rank
from hhdeploy.algebra import Array
from hhdeploy.backbones.sites import LinearSpec, kind_of
from hhdeploy.errors import AdapterError, abbreviate
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5,) * 3, (0.5,) * 3)

_RLRR = re.compile(
    r"transformer\.encoder\.layer\.(?P<block>\d+)\.(?P<linear>(attn|ffn)\.\w+)\."
    r"(?P<part>scale_col|scale_line|shift_bias)"
)
_SSF = re.compile(
    r"transformer\.(?:encoder\.(?:layer\.(?P<block>\d+)\.)?|embeddings\.)"
    r"ssf_(?P<part>scale|shift)_(?P<where>attn_norm|ffn_norm|enc_norm|patch)"
)
# What files of the methods have, once or in every block.
_RLRR_PARTS = (
    *("q", "k", "v", "proj", "fc1", "fc2"),
    *("attn_norm", "ffn_norm", "enc_norm", "patch", "head"),
)
_ARC_PARTS = ("att", "mlp", "head")
_HEADS = ("head", "head_mlp.head")
_ARC_SHARED = {
    "att": ("att_down_projection", "left_u_att"),
    "mlp": ("mlp_down_projection", "left_u_mlp"),
}
_ARC = re.compile(
    r"transformer\.layer\.(?P<block>\d+)\.(?:(?P<where>att|mlp)_adapter\.adapter_(?P<part>rescale|bias)"
    r"|(?P<short>att|mlp)_scale(?P<bias>_bias)?)"
)


def is_rlrr(tensors: Mapping[str, Any]) -> bool:
    """Whether a file is one of RLRR."""
    return any(_RLRR.fullmatch(key) for key in tensors)


def is_arc(tensors: Mapping[str, Any]) -> bool:
    """Whether a file is one of ARC."""
    return any(_ARC.fullmatch(key) for key in tensors)


def import_rlrr(
    tensors: Tensors, path: Path, backbone: Backbone, options: ImportOptions
) -> Adapter:
    """RLRR: every key belongs to a Linear, to a norm (as SSF scales it) or to the head.

    Raises:
        AdapterError: a key that does not, a backbone without these modules, or modules that some
            blocks lack.
    """
    where = _Backbone(backbone, path)
    after: dict[str, Array] = {}
    groups: dict[tuple[str, str, str], Tensors] = {}
    for key, tensor in tensors.items():
        wide = tensor.astype(np.float64)
        linear, ssf = _RLRR.fullmatch(key), _SSF.fullmatch(key)
        if linear:
            groups.setdefault(("linear", linear["block"], linear["linear"]), {})[linear["part"]] = (
                wide
            )
        elif ssf:
            groups.setdefault(("ssf", ssf["block"] or "", ssf["where"]), {})[ssf["part"]] = wide
        elif not where.head(key, wide, after):
            raise AdapterError(
                f"{path}: {key}: expected a key of RLRR (scale_line, scale_col, shift_bias, "
                "ssf_scale_*, ssf_shift_*, head), found another."
            )
    for (kind, block, name), group in groups.items():
        if kind == "linear":
            where.need(group, ("scale_col", "scale_line", "shift_bias"), f"{block}.{name}")
            where.change(
                int(block),
                kind_of(f"{block}.{name}"),
                lambda w, b, g=group: (
                    w + g["scale_line"].reshape(-1, 1) * w * g["scale_col"].reshape(1, -1),
                    b + g["shift_bias"].reshape(-1),
                ),
                after,
            )
        else:
            where.need(group, ("scale", "shift"), f"{block}.{name}")
            where.scale(block, name, group["scale"], group["shift"], after)
    where.complete({(int(block), name) for _, block, name in groups if block})
    has = {kind_of(f"{block}.{name}") if k == "linear" else name for k, block, name in groups}
    absent = where.absent(_RLRR_PARTS, has, after)
    return _finished("RLRR", after, absent, path, backbone, options, _HALF)


def import_arc(tensors: Tensors, path: Path, backbone: Backbone, options: ImportOptions) -> Adapter:
    """ARC, in either of its code's namings; the state dict has the backbone's weights too, and
    these have to be the backbone's, whatever they are called.

    Raises:
        AdapterError: a shared projection that is missing, other weights, keys that are neither
            ARC's nor hold a parameter of the backbone, a backbone without these modules, or modules
            that some blocks lack.
    """
    where = _Backbone(backbone, path)
    after: dict[str, Array] = {}
    shared = {
        name: tensors[f"transformer.{key}"].astype(np.float64)
        for name, keys in _ARC_SHARED.items()
        for key in keys
        if f"transformer.{key}" in tensors
    }
    groups: dict[tuple[int, str], Tensors] = {}
    ours = {f"transformer.{key}" for keys in _ARC_SHARED.values() for key in keys}
    unread = []
    for key, tensor in tensors.items():
        found = _ARC.fullmatch(key)
        if found:
            part = "bias" if found["bias"] or found["part"] == "bias" else "scale"
            name = found["where"] or found["short"]
            groups.setdefault((int(found["block"]), name), {})[part] = tensor.astype(np.float64)
        elif key not in ours and not where.head(key, tensor.astype(np.float64), after):
            where.same(key, tensor)
            unread += [] if where.holds(tensor) else [key]
    if unread:
        raise AdapterError(
            f"{path}: {abbreviate(unread)}: expected keys of ARC, the classifier's, and the "
            f"parameters of {backbone.facts.model}; nothing reads these, and no parameter has "
            "their values. Remove what is not the model's, or say what they mean with `key_map`."
        )
    for (block, name), group in groups.items():
        where.need(group, ("scale", "bias"), f"{block}.{name}")
        if name not in shared:
            raise AdapterError(f"{path}: expected transformer.{_ARC_SHARED[name][0]}, found none.")
        u, scale, bias = shared[name], group["scale"].reshape(1, -1), group["bias"]
        read = np.eye(len(u)) + (u * scale) @ u.T
        for kind in ("q", "k", "v") if name == "att" else ("fc1",):
            where.change(block, kind, lambda w, b, r=read, c=bias: (w @ r, b + w @ c), after)
    where.complete(set(groups))
    absent = where.absent(_ARC_PARTS, {name for _, name in groups}, after)
    return _finished("ARC", after, absent, path, backbone, options, _IMAGENET)


class _Backbone:
    """The backbone's parameters by block and kind, and its norms as timm's ViTs name them."""

    def __init__(self, backbone: Backbone, file: Path) -> None:
        self.backbone, self.file = backbone, file
        self.own = values_of(backbone.model)
        self.sites = {
            (int(site.name.split(".")[1]), site.kind): (linear, index)
            for linear in backbone.facts.linears
            for index, site in enumerate(linear.sites)
            if site.kind and site.name.startswith("blocks.")
        }

    def change(self, block: int, kind: str, changed: Any, after: dict[str, Array]) -> None:
        """Replace a Linear's (or a third's) weight and bias by ``changed`` of them."""
        if (block, kind) not in self.sites:
            raise AdapterError(
                f"{self.file}: block {block} has a {kind or 'Linear'}, {self.backbone.facts.model} "
                "has none there. Expected a ViT of timm, of the shape that was trained."
            )
        linear, index = self.sites[block, kind]
        weight, bias = path_of_parameters(self.backbone, linear)
        rows = self._rows(linear, index)
        for name in (weight, bias):
            if name not in self.own:
                raise AdapterError(
                    f"{self.file}: block {block}, {kind}: expected the parameter {name}, which "
                    f"{self.backbone.facts.model} does not have: the file belongs to a plain ViT."
                )
            after.setdefault(name, self.own[name].copy())
        try:
            new = changed(self.own[weight][rows], self.own[bias][rows])
            after[weight][rows], after[bias][rows] = new
        except ValueError as error:
            raise AdapterError(
                f"{self.file}: block {block}, {kind}: the tensors do not fit a Linear of "
                f"{linear.sites[index].out} x {linear.in_}: {error}"
            ) from error

    def scale(
        self, block: str, where: str, scale: Array, shift: Array, after: dict[str, Array]
    ) -> None:
        """x * scale + shift after a norm, or after the patch embedding."""
        module = {
            "attn_norm": f"blocks.{block}.norm1",
            "ffn_norm": f"blocks.{block}.norm2",
            "enc_norm": "norm",
            "patch": "patch_embed.proj",
        }[where]
        names = (f"{module}.weight", f"{module}.bias")
        if any(name not in self.own or len(self.own[name]) != len(scale) for name in names):
            raise AdapterError(
                f"{self.file}: expected {module} with {len(scale)} values in "
                f"{self.backbone.facts.model}: the file belongs to a plain ViT of timm."
            )
        weight, bias = (self.own[name] for name in names)
        after[names[0]] = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        after[names[1]] = bias * scale + shift

    def head(self, key: str, value: Array, after: dict[str, Array]) -> bool:
        """Take a tensor of the classifier; False if it is none."""
        owner, _, leaf = key.rpartition(".")
        if owner not in _HEADS or leaf not in ("weight", "bias"):
            return False
        after[f"{self.backbone.facts.classifier}.{leaf}"] = value
        return True

    def same(self, key: str, tensor: NDArray[Any]) -> None:
        """A Linear's weight in the file is the backbone's own."""
        owner, _, leaf = key.rpartition(".")
        found = re.fullmatch(r"transformer\.layer\.(\d+)\.(.*)", owner)
        if leaf != "weight" or found is None:
            return
        site = self.sites.get((int(found[1]), _ARC_KINDS.get(found[2], "")))
        if site is None:
            return
        weight, _ = path_of_parameters(self.backbone, site[0])
        expected = self.own[weight][self._rows(*site)]
        if expected.shape != tensor.shape or not np.allclose(
            expected, tensor, rtol=1e-3, atol=1e-5
        ):
            raise AdapterError(
                f"{self.file}: {key} is not the backbone's {weight}: it was trained on other "
                "weights. Give these with `checkpoint`."
            )

    def holds(self, tensor: NDArray[Any]) -> bool:
        """Whether a parameter of the backbone, or a third of one, has a tensor's values."""
        for value in self.own.values():
            parts = np.split(value, 3) if value.size == 3 * tensor.size else [value]
            for part in parts:
                if part.size == tensor.size and np.allclose(
                    part.reshape(-1), tensor.reshape(-1), rtol=1e-3, atol=1e-5
                ):
                    return True
        return False

    def need(self, group: Tensors, parts: tuple[str, ...], what: str) -> None:
        """All parts of one module are there."""
        if missing := [part for part in parts if part not in group]:
            raise AdapterError(
                f"{self.file}: {what}: expected {', '.join(parts)}, found no {', '.join(missing)}."
            )

    def complete(self, found: Collection[tuple[int, str]]) -> None:
        """What one block has, all have: no configuration says what was trained."""
        blocks = sorted({block for block, _ in self.sites})
        names = dict.fromkeys(name for _, name in sorted(found))
        lacking = [f"{n} of block {b}" for b in blocks for n in names if (b, n) not in found]
        if lacking:
            raise AdapterError(
                f"{self.file}: expected what one block has in all {len(blocks)} blocks of "
                f"{self.backbone.facts.model}, found no {abbreviate(lacking)}. Without them the "
                "numbers would be those of another adapter: save it whole."
            )

    def absent(
        self, expected: Sequence[str], has: Collection[str], after: Mapping[str, Array]
    ) -> list[str]:
        """Parts of the method that the file has nowhere."""
        head = any(name.startswith(f"{self.backbone.facts.classifier}.") for name in after)
        known = {*has, "head"} if head else has
        return [part for part in expected if part not in known]

    def _rows(self, linear: LinearSpec, index: int) -> slice:
        out = linear.sites[index].out
        return slice(index * out, (index + 1) * out)


# Of ARC's state dict: its own names of the Linears.
_ARC_KINDS = {
    "attention.query": "q",
    "attention.key": "k",
    "attention.value": "v",
    "attention.projective": "proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}


def _finished(
    method: str,
    after: dict[str, Array],
    absent: list[str],
    path: Path,
    backbone: Backbone,
    options: ImportOptions,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> Adapter:
    if not options.weights_known:
        raise AdapterError(
            f"{path}: {method} multiplies the backbone's weights and cannot be converted without "
            "them. Pass them with `checkpoint`."
        )
    tensors = changed_parameters(backbone, after, {}, path)
    line = f"the file has no {', '.join(absent)}, which {method} trains: taken as untrained"
    assumed = {"assumed": [line]} if absent else {}
    config = AdapterConfig(
        backbone.facts.model,
        r=largest_rank(tensors),
        extra={"imported_from": {"format": "torch.save", "method": method, **assumed}},
    )
    size = backbone.facts.preprocess.input_size
    stated = Preprocess(size, *statistics, "bicubic", 1.0, "squash")
    return finish(tensors, config, path, backbone, options, stated)
