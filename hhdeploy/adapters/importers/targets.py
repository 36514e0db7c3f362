"""Which modules a configuration of PEFT names, by PEFT's rules, and whether the file has them.

Source: PEFT, ``tuners/tuners_utils.py`` (check_target_module_exists).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.adapters.importers.keys import numbers_in, numbers_open
from hhdeploy.adapters.importers.naming import Names
from hhdeploy.backbones.sites import kind_of, sites_of
from hhdeploy.errors import AdapterError

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone

ALL_LINEAR = "all-linear"


def names_module(config: Mapping[str, Any], path: str) -> bool | None:
    """Whether the configuration adapts the module at ``path``; None: it does not say.

    It does not for ``all-linear`` (a question of the module's type) and without targets (PEFT then
    goes by the architecture).
    """
    targets = config.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return None
    if _fits(config.get("exclude_modules") or (), path) or saves_module(config, path):
        return False
    if not _fits(targets, path):
        return False
    return isinstance(targets, str) or _in_layers(config, path)


def saves_module(config: Mapping[str, Any], path: str) -> bool:
    """Whether ``modules_to_save`` names the module, or one that it is in."""
    return any(
        re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.get("modules_to_save") or ()
    )


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
        missing = _missing_of_others(config, found, backbone)
    else:
        own = (names.prefix + path for path in sorted(names.modules))
        missing = [path for path in own if names_module(config, path) and path not in found]
    for title, paths in (
        (f"target_modules {config.get('target_modules')} names them, the file lacks", missing),
        ("the file has tensors that target_modules does not name:", extra),
    ):
        if paths:
            raise AdapterError(
                f"{file}: {title} {', '.join(paths[:5])}{' …' if len(paths) > 5 else ''}. Without "
                "them the numbers would be those of another adapter: save it whole, or correct "
                "the configuration."
            )


def _missing_of_others(
    config: Mapping[str, Any], found: Sequence[str], backbone: Backbone
) -> list[str]:
    """What names of another implementation of the model lack: a target, or some of its blocks."""
    targets = config.get("target_modules")
    if targets is None or isinstance(targets, str):
        return []
    missing = [t for t in targets if not any(_fits([t], path) for path in found)]
    if config.get("layers_to_transform") is None and not any(map(numbers_in, targets)):
        blocks = {(numbers_in(s.name), s.kind) for s in sites_of(backbone.facts.linears).values()}
        for start, kind in {numbers_open(path): kind_of(path) for path in found}.items():
            has = {numbers_in(path) for path in found if numbers_open(path) == start}
            lacking = sorted({n for n, k in blocks if k == kind} - has)
            missing += [f"{start} of block {'.'.join(map(str, n))}" for n in lacking]
    return missing


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first of ``rank_pattern``'s expressions that fits the end of a path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _fits(targets: str | Collection[str], path: str) -> bool:
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
