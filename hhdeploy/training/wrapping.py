"""A model and its modules in what compiles, distributes or checkpoints it, or a part of it."""

from __future__ import annotations

import contextlib
import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.module import stated_size
from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.backbones.structure import (
    bare_model,
    check_values,
    parameters_of,
    quantised_part,
    states_transform,
)
from hhdeploy.backbones.timm import preprocess_of
from hhdeploy.errors import AdapterError
from hhdeploy.files.checkpoints import without_wrappers
from hhdeploy.preprocess import Preprocess

# Types of weights that numbers can be added to; another one has a scale elsewhere.
_TRAINED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_bare(model: nn.Module) -> None:
    """An adapter's sites are called what the modules of the model alone are called, and change
    weights that are numbers.

    Raises:
        AdapterError: it is no model, is wrapped or quantised, or a part of it is, or was made in
            torch's inference mode.
        BackboneError: it has not got all of its values yet.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"expected the model, a torch.nn.Module, found {type(model).__name__} "
            f"{reprlib.repr(model)}."
        )
    check_values(model)
    frozen = next((path for path, p in model.named_parameters() if p.is_inference()), None)
    if frozen is not None and not torch.is_inference_mode_enabled():
        raise AdapterError(
            f"{frozen} was made in torch.inference_mode(), where nothing can be trained. Make or "
            "load the model outside of it, or attach to copy.deepcopy(model)."
        )
    if (fault := quantised_part(model)) is not None:
        raise AdapterError(
            f"{fault}. Attach the adapter to the model as it was before; the bundle that is "
            "exported can be quantised."
        )
    paths = ((path, without_wrappers(path)) for path, _ in model.named_modules())
    wrapped = next((own for path, own in paths if own != path), None)
    if bare_model(model) is not model:
        what = f"{type(model).__name__} wraps the model"
    elif wrapped is not None:
        what = f"{wrapped or type(model).__name__}: a part of the model is wrapped"
    else:
        return
    raise AdapterError(
        f"{what}: attach the adapter to the model itself, and compile or wrap it after that."
    )


def check_weights(model: nn.Module, linears: Sequence[LinearSpec]) -> None:
    """Each Linear's weight is a parameter of its own, and so is its bias, which other modules may
    not have too: an adapter's files and the graphs know no other. Raises `AdapterError`."""
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    for linear in linears:
        module, weight, bias = parameters_of(model, linear.path)
        found = dict(module.named_parameters(recurse=False))
        if weight not in found:
            raise AdapterError(
                f"{linear.path}: its weight is computed from other parameters (weight norm, or "
                "another parametrization), which no adapter holds. Remove that before attach, or "
                "leave the Linear out of target_modules."
            )
        if (kind := found[weight].dtype) not in _TRAINED:
            raise AdapterError(
                f"{linear.path}: expected a weight of numbers as they were trained, found "
                f"{str(kind).removeprefix('torch.')}, as quantisation leaves it. Attach the "
                "adapter to the model as it was before; the bundle that is exported can be "
                "quantised."
            )
        for name in filter(found.__contains__, (weight, bias)):
            if len(names := paths[id(found[name])]) > 1:
                raise AdapterError(
                    f"{linear.path}: one parameter is the {'weight' if name == weight else 'bias'} "
                    f"of several modules ({', '.join(names)}), and an adapter changes one Linear. "
                    "Give each a copy, or leave them out of target_modules."
                )


def check_packed(
    model: nn.Module, linears: Sequence[LinearSpec], size: tuple[int, int, int] | None
) -> None:
    """The packed weight of a MultiheadAttention is one Linear where q, k and v have one input: that
    of a pooling, or of another's tokens, is none in a graph.

    Args:
        model: tried on an image; one that does not run here may do so where it is exported.
        linears: those to be changed.
        size: (channels, height, width) of its images; None: not known, and nothing is tried.

    Raises:
        AdapterError: naming the first one that is none.
    """
    owners = {x.path: parameters_of(model, x.path)[0] for x in linears}
    packed = {path: m for path, m in owners.items() if isinstance(m, nn.MultiheadAttention)}
    if not packed or size is None:
        return
    parted: list[str] = []

    def watch(path: str, given: Mapping[str, Any]) -> None:
        if not given["query"] is given["key"] is given["value"]:
            parted.append(path)

    like = next(model.parameters())
    with contextlib.ExitStack() as stack:
        for path, module in packed.items():
            hook = module.register_forward_pre_hook(
                lambda _, args, named, path=path: watch(
                    path, {**dict(zip(("query", "key", "value"), args, strict=False)), **named}
                ),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        with contextlib.suppress(Exception), evaluated(model):
            model(torch.zeros(1, *size, device=like.device, dtype=like.dtype))
    if parted:
        raise AdapterError(
            f"{parted[0]}: q, k and v have inputs of their own there (attention that pools, or "
            "looks at other tokens), so that its packed weight is not one Linear, and no export "
            "can change it. Leave it out of target_modules."
        )


def preprocess_stated(model: nn.Module, config: AdapterConfig) -> Preprocess:
    """The transform that a model states, as timm's do; of another one that nothing is compared
    with."""
    if not states_transform(model):
        return Preprocess((3, 1, 1), (0.5,) * 3, (0.5,) * 3)
    made: dict[str, Any] = {}
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.groups == 1:
        made["in_chans"] = first.in_channels
    if (size := getattr(getattr(model, "patch_embed", None), "img_size", None)) is not None:
        made["img_size"] = size
    return preprocess_of(model, {**made, **config.base_model_args})


def size_of_images(
    model: nn.Module, facts: BackboneFacts, config: AdapterConfig
) -> tuple[int, int, int] | None:
    """(channels, height, width) as the adapter or the model states them; None: neither does."""
    known = config.preprocess is not None or states_transform(model)
    return facts.preprocess.input_size if known else stated_size(model)


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model as it answers, without gradients; its modes, random states and warnings after it
    as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, training in modes:
            module.training = training


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by the paths that they have where no part of it is wrapped."""
    # What is in a wrapper comes after it.
    return {without_wrappers(path): module for path, module in model.named_modules()}


def check_places(places: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> None:
    """What an adapter changed is still where it was.

    Args:
        places: path -> module, when it was attached.
        modules: `own_modules` now.

    Raises:
        AdapterError: naming the first one that is not there.
    """
    moved = [path for path, module in places.items() if modules.get(path) is not module]
    if moved:
        found = "another one" if moved[0] in modules else "nothing"
        raise AdapterError(
            f"{moved[0]}: expected the module that the adapter was attached to, found {found} (of "
            f"{len(places)} such modules {len(moved)} are not in their places). The adapter would "
            "be saved without what was trained there: take off what wraps a part of the model, but "
            "for torch.compile and torch's checkpoint_wrapper, or call attach once all modules are "
            "in their places."
        )
