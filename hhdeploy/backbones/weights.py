"""Files of weights: state dicts, out of what a training wrapped them in, into a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.backbones.structure import is_table
from hhdeploy.errors import BackboneError, abbreviate
from hhdeploy.files.checkpoints import (
    is_averaged,
    is_judging,
    unwrapped,
    without_wrappers,
)
from hhdeploy.files.weights import advice_on_directory, content_of, named_type
from hhdeploy.files.writing import is_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

# In the names of tensors that are an adapter's alone, of whatever library.
_OF_ADAPTER = re.compile(
    r"(^|[._])(lora_(A|B|up|down)|lora\.(up|down)|hada_w\d_\w|lokr_w\d)(\.|_|$)"
)
# In the names of a model that PEFT wraps; lora_A.weight is in those of own modules as well.
_PEFT = re.compile(r"(^|\.)base_model\.model\.|\.(base_layer|modules_to_save|lora_[AB]\.default)\.")
# Integers are another's quantised weights without their scales; torch would copy the numbers.
NO_WEIGHTS = "of a type that no weights have"
# What to do then, behind a message that names some.
AS_TRAINED = (
    " Numbers of such types are what quantisation leaves of weights: bring those that were "
    "trained; the bundle that is exported can be quantised."
)
# What to do with what a training saved of a model: its biases, say.
_A_PART = (
    " The file has a part of the model alone. Is it this model's, with these arguments? What a "
    "training saved of a model load there into the whole (load_state_dict(PART, strict=False)), "
    "and save that."
)
# In the names of a model that `hhdeploy.training.attach` changed.
_ATTACHED = re.compile(
    r"\.parametrizations\.\w+\.\d+\.((matrices\.\d+|matrix)\.(u|v|d|lora_[AB])|s_in|s_out|db)$"
)
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

    if is_folder(path, BackboneError):
        raise BackboneError(
            f"`checkpoint`: {path} is a directory. Expected a file of weights."
            f"{advice_on_directory(path)}"
        )
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
        raise BackboneError(
            f"`checkpoint`: {path}: expected a state dict, tensors by name, found {_shown(state)}. "
            "Keep that of the model alone in another file: torch.save(STATE_DICT, 'weights.pth')."
        )
    return dict(state), notes


def _shown(content: object) -> str:
    """What there is instead of a state dict."""
    if not isinstance(content, Mapping):
        return type(content).__name__
    return abbreviate([f"{key} ({type(value).__name__})" for key, value in content.items()], 4)


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


def advice_on_adapters(keys: Iterable[str]) -> str:
    """What to do with an adapter's tensors in a file that has none of a model's own, behind a
    message that they do not fit; "" of others."""
    if not any(map(_OF_ADAPTER.search, keys)):
        return ""
    return (
        " They are an adapter's tensors alone. Those of LoRA and HTA come in with "
        "`import_adapter()`; others merge where they were trained, and bring the whole model's "
        "checkpoint."
    )


def advice_on_parametrized(keys: Iterable[str]) -> str:
    """What to do with tensors that torch makes a weight of, behind a message that they do not fit;
    "" of others."""
    keys = list(keys)
    if any(map(_ATTACHED.search, keys)):
        return (
            " They are of a model that attach changed. Call attach with the same configuration on "
            "the backbone that it was, load the file into that model (load_state_dict, without "
            "what may stand before its names), and save the adapter there: "
            "hhdeploy.training.save(model, DIR)."
        )
    if not any(".parametrizations." in key for key in keys):
        return ""
    return (
        " A weight of .parametrizations. is made of several tensors (weight norm, minLoRA). Where "
        "it was trained call torch.nn.utils.parametrize.remove_parametrizations(MODULE, 'weight') "
        "for each such module, and save the whole model: `extract_adapter()`."
    )


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
    chosen = [start for start in starts if is_averaged(start)] if len(starts) > 1 else starts
    if len(chosen) != 1:
        raise BackboneError(
            f"`checkpoint`: {file} has this model several times, as {', '.join(starts)}: expected "
            "one. Keep the tensors of one of them, without what stands before."
        )
    rest = {key: value for key, value in state.items() if not key.startswith(tuple(starts))}
    # A whole number beside a wrapper's tensors is its count of steps; another one is computed with.
    kept = {k: v for k, v in rest.items() if v.numel() > 1 or v.is_floating_point()}
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
    found = set(filter(is_judging, firsts - matrices))
    left = sorted(key for key in state if key.partition(".")[0] in found)
    if not left:
        return state, ()
    line = f"left out of the checkpoint, as of a loss or a metric: {abbreviate(left, 4)}"
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


def passed_over(
    model: nn.Module, given: State, fitted: Mapping[str, torch.Tensor], classifier: str
) -> list[str]:
    """A line about what timm's reader of an architecture leaves out of a file that has all of the
    model's own names, where there is nothing to translate: a layer that the model had once.

    Args:
        model: whose names are looked for.
        given: the state dict of the file.
        fitted: what the reader made of it.
        classifier: path of the model's, which may be called something else.
    """
    own = {n for n, _ in model.named_parameters() if not n.startswith(f"{classifier}.")}
    left = [k for k, v in given.items() if k not in fitted and v.is_floating_point()]
    left = [key for key in left if not derived(key)]
    if not left or not own <= given.keys():
        return []
    return [f"left out of the checkpoint, as timm does: {abbreviate(left, 4)}"]


def load_strictly(
    model: nn.Module, state: Mapping[str, torch.Tensor], classifier: str, spec: BackboneSpec
) -> None:
    """load_state_dict where only the classifier, whose path is given, may be missing, and whole.

    Raises:
        BackboneError: naming the keys that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    missing = besides_classifier([k for k in own if k not in state], own, classifier)
    # Buffers that follow from the architecture are often left out of, or left over in, files.
    # Statistics of a norm are none of them, which an average of the parameters does not have.
    named = model.named_buffers(remove_duplicate=False)
    tables = {name for name, _ in named if is_table(name)}
    persistent = own.keys() - tables
    missing = [k for k in missing if k in persistent]
    unexpected = [k for k in state if k not in own and not derived(k)]
    wrong = [
        f"{k} (expected {list(own[k].shape)}, found {list(state[k].shape)})"
        for k in own
        if k in state and own[k].shape != state[k].shape and k in persistent
    ]
    untrue = [
        f"{k} ({named_type(state[k].dtype)})"
        for k in own
        if k in persistent and k in state
        if own[k].is_floating_point() and not state[k].is_floating_point()
    ]
    if missing or unexpected or wrong or untrue:
        problems = [
            f"{title}: {abbreviate(names, 5)}"
            for title, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", wrong),
                (NO_WEIGHTS, untrue),
            )
            if names
        ]
        whole = not (missing or wrong or untrue)
        part = any(not key.startswith(f"{classifier}.") for key in missing)
        fits = any(k in own and not k.startswith(f"{classifier}.") for k in state)
        advice = (
            advice_on_peft(unexpected)
            or advice_on_parametrized(unexpected)
            or (advice_on_more(classifier) if whole else "")
            or (_A_PART if part and not (unexpected or wrong or untrue) else "")
            or (advice_on_adapters(unexpected) if not fits else "")
            or (AS_TRAINED if untrue else "")
            or " Is it this model's, with these arguments?"
        )
        raise BackboneError(
            f"`checkpoint`: {spec.checkpoint} does not fit {spec.model} with {dict(spec.args)}; "
            f"keys {'; '.join(problems)}.{advice}{half_classifier(missing, classifier)}"
        )
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)


def untrue_of(model: nn.Module, types: Mapping[str, str]) -> list[str]:
    """Which tensors of a file are of `NO_WEIGHTS`, and would be a weight of the model.

    Args:
        model: with names of its own; of a tensor of a file the last part is compared.
        types: name -> type, of those that are no floating-point numbers.
    """
    own = {k.rpartition(".")[2] for k, v in model.state_dict().items() if v.is_floating_point()}
    return [f"{key} ({kind})" for key, kind in types.items() if key.rpartition(".")[2] in own]


def advice_on_more(classifier: str) -> str:
    """What to do where a file has all of the model and something beside it, or inside of it."""
    called = f"{classifier}.weight and {classifier}.bias"
    head = (
        f"If that is a classifier right behind the model, call it {called}. " if classifier else ""
    )
    return (
        f" All of the model is there, and these beside it. {head}What can be merged into its "
        "weights (LoRA, scales, shifts) merge where it was trained, and save those without it. If "
        "more than that computes (prompts, adapters, something on what the model returns), give "
        "the whole as a model of your own, python:MODULE:FUNCTION; what does not compute answers, "
        "leave out of the file."
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


def derived(key: str) -> bool:
    """Whether a tensor is called what follows from the architecture, and what no answer needs."""
    return any(name in key for name in ("relative_position_index", "attn_mask", "mask_token"))
