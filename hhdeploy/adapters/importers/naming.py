"""Which module of the backbone a path of a file means.

Three ways that names differ: not at all; by the name of the user's outer module before them all;
or because the file was trained on another implementation of the same architecture (transformers'
names of either generation, those of HTA's authors, on a timm model). Then the number of the block
and the kind of the Linear (q, k, v, proj, fc1, fc2) tell which is which; of other modules of
transformers (norms, patches, the classifier) the table by which its checkpoints become timm's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hhdeploy.adapters.importers.keys import numbers_in, outer_prefix, owner_of
from hhdeploy.backbones.converting import marked, timm_name
from hhdeploy.backbones.sites import kind_of, sites_of
from hhdeploy.errors import AdapterError, abbreviate

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone


@dataclass(frozen=True)
class Names:
    """How a file's paths are those of the backbone.

    Attributes:
        prefix: before every path of the file, "" or ending in a dot.
        modules: paths of the backbone's modules that have parameters of their own.
        translated: path of the file -> site, module or parameter of the backbone; empty where the
            names are the backbone's own.
    """

    prefix: str
    modules: frozenset[str]
    translated: Mapping[str, str] = field(default_factory=dict)

    def here(self, name: str) -> str:
        """A path or tensor name of the file as the backbone has it."""
        own = name.removeprefix(self.prefix)
        owner = owner_of(f"{own}.", self.translated)
        return own if owner is None else self.translated[owner] + own.removeprefix(owner)

    def owner(self, name: str) -> str | None:
        """The longest path of the file, in its own words, that a tensor's name starts with and
        that is a module of the backbone; None without one."""
        if self.translated:
            return owner_of(name, self.translated)
        found = owner_of(name.removeprefix(self.prefix), self.modules)
        if found is None or not name.startswith(self.prefix):
            return found
        return self.prefix + found


def names_of(names: Collection[str], backbone: Backbone, file: Path, start: str = "") -> Names:
    """How the tensors ``names`` of a file (all of them inside the backbone) are to be read.

    Args:
        names: of the file.
        backbone: the model.
        file: for messages.
        start: what is known to stand before those of the model; not before all of them, perhaps.

    Raises:
        AdapterError: they are neither the backbone's nor those of a known implementation of it, or
            two modules of the file would be one of the backbone.
    """
    parameters = (name for name, _ in backbone.model.named_parameters())
    # Modules that have parameters of their own: any name starts with that of some outer one.
    modules = frozenset(name.rpartition(".")[0] for name in parameters) - {""}
    inner = {name.removeprefix(start): name for name in names}
    prefix = outer_prefix(inner, modules)
    if prefix is not None:
        cut = any(own != name for own, name in inner.items())
        return Names((start if cut else "") + prefix, modules)
    sites = {
        (numbers_in(site.name), site.kind): site.name
        for site in sites_of(backbone.facts.linears).values()
        if site.kind
    }
    found: dict[str, tuple[str, str]] = {}
    for name in inner:
        path = _by_kind(name)
        target = sites.get((numbers_in(path), kind_of(path))) if path else None
        if target is not None:
            found[name] = path, target
    rest = [name for name in inner if name not in found]
    if rest:
        table = _Table(backbone)
        tries = [{n: p for n in rest if (p := table.find(n, s))} for s in _starts(inner)]
        tries.sort(key=len)
        found |= tries[-1]
        alike = {name: _alike(name, modules) for name in rest if name not in found}
        found |= {name: pair for name, pair in alike.items() if pair is not None}
    translated: dict[str, str] = {}
    paths: dict[str, str] = {}
    for own, name in inner.items():
        path, target = found.get(own, ("", ""))
        path = name.removesuffix(own) + path
        if not target:
            raise AdapterError(
                f"{file}: {name}: {backbone.facts.model} has no such module. Its own names are "
                f"those of {abbreviate(sites_of(backbone.facts.linears), 4)}. Give the model that "
                "the adapter was trained on (transformers:DIR), or merge it there and bring the "
                "checkpoint: `extract_adapter()`. Keys of an outer module are stripped with "
                "`prefix`."
            )
        if paths.setdefault(target, path) != path:
            raise AdapterError(
                f"{file}: {paths[target]} and {path} would both be {target} of "
                f"{backbone.facts.model}: expected the adapter of one encoder, found those of two. "
                "Say with `prefix` which part of the model is meant, or leave the other's tensors "
                "out of the file."
            )
        translated[path] = target
    return Names("", modules, translated)


def _by_kind(name: str) -> str:
    """The longest start of a tensor's name that is the path of a Linear of some kind, or ""."""
    path = name
    while path and not kind_of(path):
        path = path.rpartition(".")[0]
    return path


def _alike(name: str, modules: Collection[str]) -> tuple[str, str] | None:
    """The part of a tensor's name that is a module by that very path, or, inside of a block, the
    end of one module's path alone: DINOv3's blocks have one name more before them since
    transformers 5."""
    path = name
    while "." in path:
        path = path.rpartition(".")[0]
        ends = [own for own in modules if numbers_in(path) and own.endswith(f".{path}")]
        if path in modules or len(ends) == 1:
            return path, path if path in modules else ends[0]
    return None


def _starts(names: Collection[str]) -> Collection[str]:
    """What may stand before all names of a model: components that no number precedes."""
    starts = {"": None}
    for name in names:
        parts = name.split(".")[:-1]
        count = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        starts |= dict.fromkeys(f"{'.'.join(parts[: i + 1])}." for i in range(count))
    return starts


class _Table:
    """transformers' names of what no kind stands for, as the backbone has it."""

    def __init__(self, backbone: Backbone) -> None:
        own = [name for name, _ in backbone.model.named_parameters()]
        prefix, _ = marked(own) or ("", "")
        self._classifier = backbone.facts.classifier
        self._own = {timm_name(name.removeprefix(prefix)) or name: name for name in own}

    def find(self, name: str, start: str) -> tuple[str, str] | None:
        """The part of a tensor's name that is a module, or else a parameter, and what it is here.

        Args:
            name: of the file.
            start: what stands before all its names but the classifier's.
        """
        if name.startswith("classifier.") and self._classifier:
            return "classifier", self._classifier
        if not name.startswith(start):
            return None
        path = name.removeprefix(start)
        whole = self._own.get(timm_name(path) or "")
        while "." in path:
            path = path.rpartition(".")[0]
            weight = self._own.get(timm_name(f"{path}.weight") or "", "")
            if weight.endswith(".weight"):
                return start + path, weight.removesuffix(".weight")
        return None if whole is None else (name, whole)
