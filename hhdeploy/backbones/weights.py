"""Files of weights: state dicts, out of what a training wrapped them in, into a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.errors import BackboneError
from hhdeploy.files.weights import content_of

if TYPE_CHECKING:
    import torch
    from torch import nn

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
# Statistics of batch norms, which an average of the parameters alone does not have.
_COUNTED = ("running_mean", "running_var")
# Components that torch.compile, FSDP and activation checkpointing put anywhere into a path.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What DistributedDataParallel puts first; further inside it would be a module of the user's.
DISTRIBUTED = "module"
# In the names of a model that PEFT wraps; lora_A.weight is in those of own modules as well.
_PEFT = re.compile(r"(^|\.)base_model\.model\.|\.(base_layer|modules_to_save|lora_[AB]\.default)\.")
State = dict[str, "torch.Tensor"]


def read_state(path: Path) -> tuple[State, tuple[str, ...]]:
    """The state dict of a .safetensors file or of a file of torch.save.

    Nothing is unpickled but tensors and plain values. Of a training's checkpoint the averaged
    weights (EMA) are taken where there are some; prefixes of distributed and compiled modules are
    cut. The list of a divided model's files (``model.safetensors.index.json``) stands for them all.

    Returns:
        The state dict, and a line where the file has others beside it.

    Raises:
        BackboneError: there is no such file, or it holds something else.
    """
    import torch

    if not path.is_file():
        raise BackboneError(f"`checkpoint`: {path} does not exist.")
    try:
        state, notes = unwrapped(content_of(path))
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise BackboneError(
            f"`checkpoint`: {path} cannot be read: {error}. Expected a safetensors file "
            "or a PyTorch state dict without other pickled objects."
        ) from error
    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise BackboneError(f"`checkpoint`: {path}: expected a state dict of tensors.")
    return dict(state), notes


def unwrapped(content: Any) -> tuple[Any, tuple[str, ...]]:
    """The state dict inside a checkpoint, its keys without what a wrapper put before them all.

    Returns:
        The state dict, and a line where there are others beside it.

    Raises:
        ValueError: there are several, and none by a name that is known; or a tensor of it has no
            values, or no one shape.
    """
    if not isinstance(content, Mapping) or not content:
        return content, ()
    state, path = _taken(content)
    notes = _beside(content, path) if path else ()
    state = {str(key): _dense(key, value) for key, value in state.items() if key != _COUNTER}
    starts = [f"{wrapper}." for wrapper in (DISTRIBUTED, *_WRAPPERS)]
    while start := next((s for s in starts if state and all(k.startswith(s) for k in state)), ""):
        state = {key.removeprefix(start): value for key, value in state.items()}
    return state, notes


def _dense(key: Any, value: Any) -> Any:
    """A tensor that is stored as a sparse or quantised one as the numbers that it stands for;
    anything else as it is."""
    import torch

    if not torch.is_tensor(value):
        return value
    if value.is_meta or value.is_nested:
        kind = "of the device meta, which has none" if value.is_meta else "a nested one"
        raise ValueError(f"{key}: expected a tensor with values in one shape, found one {kind}")
    if value.is_quantized:
        return value.dequantize()
    return value if value.layout == torch.strided else value.to_dense()


def advice_on_peft(keys: Iterable[str]) -> str:
    """What to do with tensors of a model that PEFT wraps, behind a message that they do not fit;
    "" of others."""
    if not any(map(_PEFT.search, keys)):
        return ""
    return (
        " They are of a model that PEFT wraps. Save its adapter there (save_pretrained) and bring "
        "that directory: `import_adapter()`; the adapter's tensors alone are the adapter_model.bin "
        "of one, beside its adapter_config.json. Or merge it there (merge_and_unload) and bring "
        "the checkpoint: `extract_adapter()`."
    )


def without_wrappers(key: str) -> str:
    """A key without what torch.compile, FSDP and activation checkpointing put into it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _taken(content: Mapping[Any, Any], path: str = "") -> tuple[Mapping[Any, Any], str]:
    """The state dict of a checkpoint that is meant by its name, and where that is."""
    entries = {str(key): value for key, value in content.items() if _is_state(key, value)}
    entries = {key: value for key, value in entries.items() if _is_meant(key, entries, content)}
    known = [entry for entry in _ENTRIES if entry in entries]
    averaged = [entry for entry in (*known, *entries) if _averaged(entry)]
    taken = next(iter((*averaged, *known)), None)
    if taken is None and entries and not any(map(_is_weight, content.values())):
        if len(entries) > 1:
            raise ValueError(
                f"it has several state dicts, {', '.join(entries)}: keep one of them, as state_dict"
            )
        (taken,) = entries
    return (content, path) if taken is None else _taken(entries[taken], _inside(path, taken))


def _is_meant(entry: str, entries: Mapping[str, Any], content: Mapping[Any, Any]) -> bool:
    """Whether an entry that is called an average is one of weights, where others tell: losses over
    a training have averages, too, and the shapes of no weights."""
    if not _averaged(entry):
        return True
    own = {key: value for key, value in content.items() if _is_weight(value)}
    rest = {key: value for key, value in entries.items() if key != entry}
    plain = [value for key, value in rest.items() if not _averaged(key)]
    others = _shapes([own, *plain]) or _shapes(rest.values())
    mine, matrices = _shapes([entries[entry]]), {shape for shape in others if len(shape) > 1}
    if matrices:
        return not mine.isdisjoint(matrices)
    # Of vectors alone are the smallest adapters.
    return any(len(shape) > 1 for shape in mine) or not others or not mine.isdisjoint(others)


def _shapes(contents: Iterable[Any]) -> set[tuple[int, ...]]:
    return {shape for content in contents for _, found in _groups(content) for shape in found}


def _beside(content: Any, taken: str) -> tuple[str, ...]:
    """A line where a checkpoint has weights of the shapes of those that were taken elsewhere, too,
    however deep: torch_ema keeps a list of them, Lightning what its callbacks have."""
    groups = dict(_groups(content))
    shapes = groups.pop(taken, set())
    others = [path or "its own tensors" for path, found in groups.items() if found & shapes]
    if not others:
        return ()
    more = " …" if len(others) > 4 else ""
    return (
        f"weights taken from {taken} of the checkpoint, not from {', '.join(others[:4])}{more}",
    )


def _groups(content: Any, path: str = "") -> Iterator[tuple[str, set[tuple[int, ...]]]]:
    """Where in a checkpoint weights are, mappings and lists of them, and their shapes."""
    if isinstance(content, Mapping) and _OPTIMIZED not in content:
        members = dict(content)
    elif isinstance(content, (list, tuple)):
        members = dict(enumerate(content))
    else:
        return
    if shapes := {tuple(value.shape) for value in members.values() if _is_weight(value)}:
        yield path, shapes
    for key, value in members.items():
        yield from _groups(value, _inside(path, key))


def _inside(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _averaged(name: str) -> bool:
    """Whether it is called an average of the weights."""
    return _AVERAGED.search(_WORD.sub("_", name).lower()) is not None


def _is_state(key: Any, value: Any) -> bool:
    """Whether an entry of a checkpoint holds weights, or has them inside by its name."""
    if not isinstance(value, Mapping):
        return False
    named = key in _ENTRIES or _averaged(str(key))
    inside = named and any(_is_state(k, v) for k, v in value.items())
    return inside or any(map(_is_weight, value.values()))


def _is_weight(value: Any) -> bool:
    """Whether it is a tensor that may be of weights: one number is a count or a score, and whole
    numbers are the state of a random generator."""
    import torch

    if not torch.is_tensor(value) or value.numel() < 2:
        return False
    return value.is_floating_point() or value.is_quantized


def state_of(
    model: nn.Module, state: State, classifier: str, file: Path
) -> tuple[State, tuple[str, ...]]:
    """The state dict of a model that was wrapped when it was saved (compiled, distributed), or a
    part of another module: Lightning's, or an average's. What stands in and before all of its names
    is cut; where several parts are such a model, the averaged one is taken.

    Args:
        model: whose names are looked for.
        state: as it was saved; without a wrapper or prefix it comes back as it is.
        classifier: path of its classifier, which may be called something else.
        file: for the message.

    Returns:
        The state dict, and lines about what is beside it: others, and what is of a loss.

    Raises:
        BackboneError: there are several, or several of one tensor, and nobody knows which is meant.
    """
    import torch

    state, judging = _without_losses(model, _by_names_of(model, state, file))
    own = [n for n, _ in model.named_parameters() if not n.startswith(f"{classifier}.")]
    if not own or all(name in state for name in own):
        return state, judging
    starts = [key.removesuffix(own[0]) for key in state if key.endswith(f".{own[0]}")]
    starts = [start for start in starts if all(start + name in state for name in own)]
    if not starts:
        return state, judging
    chosen = [start for start in starts if _averaged(start)] if len(starts) > 1 else starts
    if len(chosen) != 1:
        raise BackboneError(
            f"`checkpoint`: {file} has this model several times, as {', '.join(starts)}: expected "
            "one. Keep the tensors of one of them, without what stands before."
        )
    rest = {key: value for key, value in state.items() if not key.startswith(tuple(starts))}
    # One number beside a wrapper's tensors is its count of steps.
    kept = {key: value for key, value in rest.items() if value.numel() > 1}
    mine = {k.removeprefix(chosen[0]): v for k, v in state.items() if k.startswith(chosen[0])}
    # A member that is another's of the same module has its values as well.
    if twice := [k for k, v in kept.items() if k in mine and not torch.equal(v, mine[k])]:
        raise BackboneError(
            f"`checkpoint`: {file} has {twice[0]} beside {chosen[0]}{twice[0]}: expected one, the "
            "one that the training computed with. Leave the other out of the file."
        )
    others = [start for start in starts if start != chosen[0]]
    line = f"weights taken from {chosen[0]}* of the checkpoint, not from {', '.join(others)}"
    return kept | mine, (*judging, *((line,) if others else ()))


def _without_losses(model: nn.Module, state: State) -> tuple[State, tuple[str, ...]]:
    """The state dict without what a module of a training has beside the model to judge it: weights
    of a loss (one a class), counts of a metric. A line where there is some.

    A matrix is none of them: what is called a loss may have the classifier in it (ArcFace).
    """
    own = {name.partition(".")[0] for name in model.state_dict()}
    firsts = {key.partition(".")[0] for key in state} - own
    matrices = {key.partition(".")[0] for key, value in state.items() if value.ndim > 1}
    found = {f for f in firsts - matrices if _JUDGING.search(_WORD.sub("_", f).lower())}
    left = sorted(key for key in state if key.partition(".")[0] in found)
    if not left:
        return state, ()
    more = " …" if len(left) > 4 else ""
    line = f"left out of the checkpoint, as of a loss or a metric: {', '.join(left[:4])}{more}"
    return {key: value for key, value in state.items() if key not in left}, (line,)


def _by_names_of(model: nn.Module, state: State, file: Path) -> State:
    """The state dict without what wrappers put into names, but where the model's own have it."""
    own = {without_wrappers(name): name for name in model.state_dict()}
    found: State = {}
    for key, value in state.items():
        bare = without_wrappers(key)
        name = own.get(bare, bare)
        if name in found:
            raise BackboneError(
                f"`checkpoint`: {file}: {key}: expected one tensor for {name}, found two that "
                "differ by a wrapper's prefix. Save the model's tensors once."
            )
        found[name] = value
    return found


def load_strictly(
    model: nn.Module, state: Mapping[str, torch.Tensor], classifier: str, spec: BackboneSpec
) -> None:
    """load_state_dict where only the classifier, whose path is given, may be missing, and whole.

    Raises:
        BackboneError: naming the keys that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    missing = besides_classifier([k for k in own if k not in state], own, classifier)
    # Buffers that follow from the architecture are often left out of, or left over in, files. What
    # a norm has counted is none of them.
    persistent = {*dict(model.named_parameters()), *(k for k in own if k.endswith(_COUNTED))}
    missing = [k for k in missing if k in persistent]
    unexpected = [k for k in state if k not in own and not _derived(k)]
    wrong = [
        f"{k} (expected {list(own[k].shape)}, found {list(state[k].shape)})"
        for k in own
        if k in state and own[k].shape != state[k].shape and k in persistent
    ]
    # Integers are another's quantised weights without their scales; torch would copy the numbers.
    untrue = [
        f"{k} ({str(state[k].dtype).removeprefix('torch.')})"
        for k in own
        if k in persistent and k in state
        if own[k].is_floating_point() and not state[k].is_floating_point()
    ]
    if missing or unexpected or wrong or untrue:
        problems = [
            f"{title}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            for title, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", wrong),
                ("of a type that no weights have", untrue),
            )
            if names
        ]
        whole = not (missing or wrong or untrue)
        advice = advice_on_peft(unexpected) or (
            advice_on_more(classifier) if whole else " Is it this model's, with these arguments?"
        )
        raise BackboneError(
            f"`checkpoint`: {spec.checkpoint} does not fit {spec.model} with {dict(spec.args)}; "
            f"keys {'; '.join(problems)}.{advice}{half_classifier(missing, classifier)}"
        )
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)


def advice_on_more(classifier: str) -> str:
    """What to do where a file has all of the model and something beside it."""
    called = f"{classifier}.weight and {classifier}.bias"
    head = (
        f"If that is a classifier right behind the model, call it {called}. " if classifier else ""
    )
    return (
        f" All of the model is there, and these beside it. {head}If more than that computes on "
        "what the model returns, give the whole as a model of your own, python:MODULE:FUNCTION; "
        "what does not compute answers, leave out of the file."
    )


def besides_classifier(
    missing: Collection[str], own: Collection[str], classifier: str
) -> list[str]:
    """What is missing of a model's ``own`` tensors but its classifier, where that is missing whole:
    half of one beside what the model was initialised with is nobody's."""
    head = {key for key in own if key.startswith(f"{classifier}.")}
    return [key for key in missing if key not in head or not head.issubset(missing)]


def half_classifier(missing: Collection[str], classifier: str) -> str:
    """What to do where half of the classifier is missing, behind a message that names it."""
    if not any(key.startswith(f"{classifier}.") for key in missing):
        return ""
    return (
        " A classifier is there whole or not at all; a bias that the training did not have is one "
        "of zeros."
    )


def _derived(key: str) -> bool:
    return any(name in key for name in ("relative_position_index", "attn_mask", "mask_token"))
