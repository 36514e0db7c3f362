"""Which modules a configuration of PEFT names, by PEFT's rules, and whether the file has them.

Source: PEFT, ``tuners/tuners_utils.py`` (check_target_module_exists).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.adapters.importers.keys import numbers_filled, numbers_in, numbers_open
from hhdeploy.adapters.importers.naming import Names
from hhdeploy.backbones.sites import KINDS, kind_of, sites_of
from hhdeploy.errors import AdapterError, abbreviate

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone

ALL_LINEAR = "all-linear"
# What other implementations call the Linears of a block, of each of `KINDS`.
_LAYOUTS = (
    # transformers since 5; CLIP and SigLIP; Swin before 5; HTA's authors.
    "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2",
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj mlp.fc1 mlp.fc2",
    "attention.self.query attention.self.key attention.self.value "
    "attention.output.dense intermediate.dense output.dense",
    "attn.query attn.key attn.value attn.out ffn.fc1 ffn.fc2",
)
# transformers before 5: ViT, DeiT and BEiT; and DINOv2, which a parameter tells from them.
_BEFORE = (
    "attention.attention.query attention.attention.key attention.attention.value "
    "attention.output.dense"
)
_VIT_BEFORE = f"{_BEFORE} intermediate.dense output.dense"
_DINOV2_BEFORE = f"{_BEFORE} mlp.fc1 mlp.fc2"
_DINOV2_S = (".ls1.gamma", ".layer_scale1.lambda1")
# How transformers' paths of a block begin, numbers left open.
_BLOCK = re.compile(r"(encoder\.)?layers?\.\*(\.blocks\.\*)?$")


def names_module(config: Mapping[str, Any], path: str) -> bool | None:
    """Whether the configuration adapts the module at ``path``; None: it does not say.

    It does not for ``all-linear`` (a question of the module's type) and without targets (PEFT then
    goes by the architecture), but for what is excluded.
    """
    targets = config.get("target_modules")
    if fits(config.get("exclude_modules") or (), path) or saves_module(config, path):
        return False
    if targets is None or _all_linear(config):
        return None if _in_layers(config, path) else False
    return fits(targets, path) and (isinstance(targets, str) or _in_layers(config, path))


def saves_module(config: Mapping[str, Any], path: str) -> bool:
    """Whether ``modules_to_save`` names the module, or one that it is in."""
    return any(
        re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.get("modules_to_save") or ()
    )


def _all_linear(config: Mapping[str, Any]) -> bool:
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def in_saved_module(config: Mapping[str, Any], name: str) -> bool:
    """Whether a parameter is of a module that ``modules_to_save`` names by the end of its path.

    Source: PEFT, ``utils/other.py`` (_set_trainable).
    """
    saved = tuple(config.get("modules_to_save") or ())
    owner = name
    while saved and "." in owner:
        owner = owner.rpartition(".")[0]
        if owner.endswith(saved):
            return True
    return False


def saved_in_saved(config: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    """Of a parameter: a saved module and one right inside of it that is saved too, or None.

    PEFT then writes a copy of the inner one that nothing computes with and no training changed, in
    the place of what the outer one's copy has. ``embeddings`` is the end of patch_embeddings, too.

    Source: as `in_saved_module`; the copy becomes a part of the outer one's wrapper.
    """
    saved = tuple(config.get("modules_to_save") or ())
    found, inner = None, name.rpartition(".")[0]
    while saved and inner:
        outer = inner.rpartition(".")[0]
        if inner.endswith(saved) and outer.endswith(saved):
            found = outer, inner
        inner = outer
    return found


def compare_targets(
    config: Mapping[str, Any], found: Iterable[str], names: Names, backbone: Backbone, file: Path
) -> None:
    """The modules that the configuration names are those that the file has tensors of.

    Args:
        config: of PEFT.
        found: module paths as the file has them.
        names: how they are to be read.
        backbone: the model.
        file: for messages.

    Raises:
        AdapterError: naming the modules that one has and the other lacks.
    """
    found = sorted(found)
    extra = [path for path in found if names_module(config, path) is False]
    if names.translated:
        ways = (
            [
                *_missing(config, found, [*linears, *others], linears),
                *_unknown(config, [*linears, *others, *found]),
            ]
            for linears, others in _of_others(found, backbone)
        )
        missing = min(ways, key=len)
    else:
        own = [names.prefix + path for path in sorted(names.modules)]
        linears = [names.prefix + path for path in _linears(backbone)]
        # As the model would have them all: what is outside of a prefix belongs to it, too.
        inside = [names.prefix + names.here(path) for path in found]
        missing = _missing(config, inside, own, linears)
    targets = config.get("target_modules")
    said = (
        "of what other blocks have" if targets is None else f"target_modules {targets} names them,"
    )
    for title, paths in (
        (f"{said} the file lacks", missing),
        ("the file has tensors that target_modules does not name:", extra),
    ):
        if paths:
            raise AdapterError(
                f"{file}: {title} {abbreviate(paths, 5)}. Without "
                "them the numbers would be those of another adapter: save it whole, or correct "
                "the configuration."
            )


def _missing(
    config: Mapping[str, Any], found: Sequence[str], paths: Iterable[str], linears: Iterable[str]
) -> list[str]:
    """The modules of the file's model that the configuration names and the file lacks.

    Without targets: what one block has, all have.

    Args:
        config: of PEFT.
        found: module paths as the file has them.
        paths: all modules, as the file calls them.
        linears: those of them that ``all-linear`` is about.
    """
    if config.get("target_modules") is None:
        alike = set(map(numbers_open, found))
        paths = (path for path in paths if numbers_open(path) in alike)
    elif _all_linear(config):
        paths = linears
    return [p for p in paths if names_module(config, p) is not False and p not in found]


def _unknown(config: Mapping[str, Any], paths: Collection[str]) -> list[str]:
    """Of a list of targets those that no module is called."""
    targets = config.get("target_modules")
    listed = targets if isinstance(targets, list) else []
    return [t for t in listed if not any(fits([t], path) for path in paths)]


def _linears(backbone: Backbone) -> list[str]:
    """Paths of the Linears but the output layer. A MultiheadAttention's is no module that is
    called, so that PEFT adapts none there."""
    from torch import nn

    within = nn.modules.linear.NonDynamicallyQuantizableLinear
    return [
        path
        for path, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, within)
        and path != backbone.facts.classifier
    ]


def _of_others(found: Sequence[str], backbone: Backbone) -> Iterator[tuple[list[str], list[str]]]:
    """The Linears of all blocks as another implementation of the model calls them, that of the
    file, and its other modules that are known: once for each implementation whose names those of
    the file may be. Where it is none that is known: what one block has, all have."""
    sites = sites_of(backbone.facts.linears).values()
    blocks = [(numbers_in(site.name), site.kind) for site in sites if site.kind]
    kinds = {path: kind for path in found if (kind := kind_of(path))}
    others = [
        numbers_filled(numbers_open(path), numbers)
        for path in found
        for numbers in dict(blocks)
        if path not in kinds and len(numbers) == len(numbers_in(path))
    ]
    parameters = (name for name, _ in backbone.model.named_parameters())
    dinov2 = any(name.endswith(_DINOV2_S) for name in parameters)
    known = False
    for words in (*_LAYOUTS, _DINOV2_BEFORE if dinov2 else _VIT_BEFORE):
        ends = {k: f".{end}" for k, end in zip(KINDS, words.split(), strict=True)}
        starts = {
            numbers_open(path.removesuffix(ends[kind])) if path.endswith(ends[kind]) else None
            for path, kind in kinds.items()
        }
        start = starts.pop() if len(starts) == 1 else None
        if start is not None:
            known = True
            linears = [numbers_filled(start, n) + ends[kind] for n, kind in blocks]
            patches = "patch_embedding" if "self_attn" in words else "patch_embeddings.projection"
            yield linears, [*others, *_around(start, patches)]
    if not known:
        alike = sorted({(numbers_open(path), kind) for path, kind in kinds.items()})
        yield [numbers_filled(p, n) for p, k in alike for n, kind in blocks if kind == k], others


def _around(start: str, patches: str) -> list[str]:
    """What transformers has beside the blocks, whose paths start so, and LoRA can adapt: the
    patches, and the classifier of a model that has the blocks in a part of it."""
    before = _BLOCK.sub("", start)
    if before == start:
        return []
    return [f"{before}embeddings.{patches}", *(["classifier"] if before else [])]


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first of ``rank_pattern``'s expressions that fits the end of a path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def fits(targets: str | Collection[str], path: str) -> bool:
    """Whether one of a configuration's names, or its expression, is about the module at a path."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return path in targets or any(path.endswith(f".{target}") for target in targets)


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns: str | Sequence[str] = config.get("layers_pattern") or ()
    named = [patterns] if isinstance(patterns, str) else patterns
    starts = [rf"(?:^|.*?\.){pattern}" for pattern in named] or [r".*?\.[^.]*"]
    for start in starts:
        found = re.match(rf"{start}\.(?P<layer>\d+)\.", path)
        if found:
            layer = int(found["layer"])
            return layer == wanted if isinstance(wanted, int) else layer in wanted
    return False
