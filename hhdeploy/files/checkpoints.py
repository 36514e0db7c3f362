"""The state dict that a training's checkpoint means, out of what the training put around it.

Pure functions of what a file held: which of several state dicts counts, what is beside it, and what
compiled, distributed and checkpointed modules write into names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hhdeploy.errors import abbreviate

# Where trainings keep the weights in a larger checkpoint; the averaged ones first, as timm does.
_ENTRIES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema"),
    *("state_dict", "model", "module"),
)
# What an average of the weights is called, as a word of a name; the best weights are no average.
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|averages|shadow|polyak)(?![a-z])")
# Where a word begins in a name such as modelEma or EMAModel.
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
# What every optimizer's state has; what it keeps of a weight has that weight's shape.
_OPTIMIZED = "param_groups"
# What a loss or a metric is called, as a word of a name: their numbers are those of a training.
_JUDGING = re.compile(r"(?<![a-z])(loss|losses|criterion|criteria|metrics?)(?![a-z])")
# Beside the weights in what torch's AveragedModel saves: how many they are the average of.
_COUNTER = "n_averaged"
# What to do with a model in several parts.
_ONE = (
    "Parts of one model, as a classifier apart, go into one state dict, by the names that the "
    "model has for them (head.weight, head.bias); what computes no answers is left out of the file"
)
# What modules call their parameters.
_OF_MODULES = ("weight", "bias")
# What to do with tensors that are more than numbers in a shape.
_DISTRIBUTED = (
    "Each process has a part of it. Save whole tensors: those of get_model_state_dict of "
    "torch.distributed.checkpoint.state_dict, with StateDictOptions(full_state_dict=True)"
)
_NOT_PLAIN = "Bring the weights as they were trained, as plain tensors"
# Components that torch.compile, FSDP and activation checkpointing put anywhere into a path.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What DistributedDataParallel puts first; further inside it would be a module of the user's.
DISTRIBUTED = "module"


def unwrapped(content: Any) -> tuple[Any, tuple[str, ...]]:
    """The state dict inside a checkpoint, its keys without what a wrapper put before them all.

    Returns:
        The state dict, and a line where there are others beside it.

    Raises:
        ValueError: there are several, and none by a name that is known; or other parts of a model
            are beside the one that is; or a tensor of it has no values, or no one shape.
    """
    if not isinstance(content, Mapping) or not content:
        return content, ()
    _check_values(content)
    state, path = _taken(content)
    notes = _beside(content, path) if path else ()
    state = {str(key): _dense(key, value) for key, value in state.items() if key != _COUNTER}
    starts = [f"{wrapper}." for wrapper in (DISTRIBUTED, *_WRAPPERS)]
    while start := next((s for s in starts if state and all(k.startswith(s) for k in state)), ""):
        state = {key.removeprefix(start): value for key, value in state.items()}
    return state, notes


def _check_values(content: Mapping[Any, Any]) -> None:
    """What is called the weights has values: those of DeepSpeed's third stage are empty tensors."""
    import torch

    held = {f"tensors of its {entry}": content.get(entry) for entry in _ENTRIES}
    for what, state in ({"tensors": content} | held).items():
        tensors = list(state.values()) if isinstance(state, Mapping) else []
        if tensors and all(torch.is_tensor(v) and v.numel() == 0 for v in tensors):
            raise ValueError(
                f"the {what} are empty. DeepSpeed's ZeRO-3 leaves the values in "
                "files of its processes: put them together first, with the zero_to_fp32.py that it "
                "writes beside them"
            )


def _dense(key: Any, value: Any) -> Any:
    """A tensor that is stored as a sparse or quantised one as the numbers that it stands for;
    anything else as it is."""
    import torch

    if not torch.is_tensor(value):
        return value
    own = type(value)
    if own not in (torch.Tensor, torch.nn.Parameter):
        advice = _DISTRIBUTED if own.__name__ == "DTensor" else _NOT_PLAIN
        raise ValueError(
            f"{key}: expected a plain tensor, found a {own.__module__}.{own.__name__}. {advice}"
        )
    if value.is_meta or value.is_nested:
        kind = "of the device meta, which has none" if value.is_meta else "a nested one"
        raise ValueError(f"{key}: expected a tensor with values in one shape, found one {kind}")
    if value.is_quantized:
        return value.dequantize()
    return value if value.layout == torch.strided else value.to_dense()


def without_wrappers(key: str) -> str:
    """A key without what torch.compile, FSDP and activation checkpointing put into it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _taken(content: Mapping[Any, Any], path: str = "") -> tuple[Mapping[Any, Any], str]:
    """The state dict of a checkpoint that is meant by its name, and where that is."""
    entries = {str(key): value for key, value in content.items() if _is_state(key, value)}
    entries = {key: value for key, value in entries.items() if _is_meant(key, entries, content)}
    known = [entry for entry in _ENTRIES if entry in entries]
    averaged = [entry for entry in (*known, *entries) if is_averaged(entry)]
    taken = next(iter((*averaged, *known)), None)
    if taken is None and entries and not any(map(_is_weight, content.values())):
        if len(entries) > 1:
            raise ValueError(
                f"it has several state dicts, {', '.join(entries)}: keep one of them, as "
                f"state_dict. {_ONE}"
            )
        (taken,) = entries
    if taken is not None:
        _check_apart(content, taken)
    return (content, path) if taken is None else _taken(entries[taken], _inside(path, taken))


def _check_apart(content: Mapping[Any, Any], taken: str) -> None:
    """Nothing beside the state dict that is meant looks like another part of the model, as a
    head does, without which the answers would be those of another one.

    What has most shapes of those that are meant is a copy of them, of which `_beside` says a line.

    Raises:
        ValueError: naming what does.
    """
    entries = {str(key): value for key, value in content.items()}
    mine = _shapes([entries.pop(taken)])
    apart: list[str] = []
    for path, group in _groups(entries):
        copy = 2 * len(_shapes([group]) & mine) > len(mine)
        whole = path in entries and not is_averaged(path)
        if not copy and not is_judging(path) and _of_modules(group, whole=whole):
            apart += [path] if path else map(str, group)
    if apart:
        raise ValueError(f"it has {abbreviate(apart, 4)} beside {taken}. {_ONE}")


def _of_modules(group: Mapping[Any, Any], *, whole: bool) -> bool:
    """Whether weights are of modules: by what they are called, or by one that is a matrix where
    they are ``whole`` an entry of the checkpoint."""
    names = [key for key in group if isinstance(key, str)]
    called = any("." in name or name in _OF_MODULES for name in names)
    return called or (whole and bool(names) and any(v.ndim > 1 for v in group.values()))


def _is_meant(entry: str, entries: Mapping[str, Any], content: Mapping[Any, Any]) -> bool:
    """Whether an entry that is called an average is one of weights, where others tell: losses over
    a training have averages, too, and the shapes of no weights."""
    if not is_averaged(entry):
        return True
    own = {key: value for key, value in content.items() if _is_weight(value)}
    rest = {key: value for key, value in entries.items() if key != entry}
    plain = [value for key, value in rest.items() if not is_averaged(key)]
    others = _shapes([own, *plain]) or _shapes(rest.values())
    mine, matrices = _shapes([entries[entry]]), {shape for shape in others if len(shape) > 1}
    if matrices:
        return not mine.isdisjoint(matrices)
    # Of vectors alone are the smallest adapters.
    return any(len(shape) > 1 for shape in mine) or not others or not mine.isdisjoint(others)


def _shapes(contents: Iterable[Any]) -> set[tuple[int, ...]]:
    groups = (group for content in contents for _, group in _groups(content))
    return {tuple(tensor.shape) for group in groups for tensor in group.values()}


def _beside(content: Any, taken: str) -> tuple[str, ...]:
    """A line where a checkpoint has weights of the shapes of those that were taken elsewhere, too,
    however deep: torch_ema keeps a list of them, Lightning what its callbacks have."""
    groups = {path: _shapes([group]) for path, group in _groups(content)}
    shapes = groups.pop(taken, set())
    others = [path or "its own tensors" for path, found in groups.items() if found & shapes]
    if not others:
        return ()
    return (f"weights taken from {taken} of the checkpoint, not from {abbreviate(others, 4)}",)


def _groups(content: Any, path: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """Where in a checkpoint weights are, mappings and lists of them, and which."""
    if isinstance(content, Mapping) and _OPTIMIZED not in content:
        members = dict(content)
    elif isinstance(content, (list, tuple)):
        members = dict(enumerate(content))
    else:
        return
    if weights := {key: value for key, value in members.items() if _is_weight(value)}:
        yield path, weights
    for key, value in members.items():
        yield from _groups(value, _inside(path, key))


def _inside(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def is_averaged(name: str) -> bool:
    """Whether it is called an average of the weights."""
    return _AVERAGED.search(_WORD.sub("_", name).lower()) is not None


def is_judging(name: str) -> bool:
    """Whether it is called a loss or a metric."""
    return _JUDGING.search(_WORD.sub("_", name).lower()) is not None


def _is_state(key: Any, value: Any) -> bool:
    """Whether an entry of a checkpoint holds weights, or has them inside by its name."""
    if not isinstance(value, Mapping):
        return False
    named = key in _ENTRIES or is_averaged(str(key))
    inside = named and any(_is_state(k, v) for k, v in value.items())
    return inside or any(map(_is_weight, value.values()))


def _is_weight(value: Any) -> bool:
    """Whether it is a tensor that may be of weights: one number is a count or a score, and whole
    numbers are the state of a random generator."""
    import torch

    if not torch.is_tensor(value) or value.numel() < 2:
        return False
    return value.is_floating_point() or value.is_quantized
