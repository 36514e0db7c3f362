"""A model and its modules in what compiles, distributes or checkpoints it, or a part of it."""

from __future__ import annotations

import contextlib
import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.backbones.facts import BackboneFacts, BaseAnswer
from hhdeploy.backbones.module import stated_size
from hhdeploy.backbones.outputs import base_answer, computing
from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.backbones.structure import (
    bare_model,
    base_sha256,
    buffers_sha256,
    check_values,
    classifier_path,
    find_linears,
    parameters_of,
    quantised_part,
    signs_sha256,
    states_transform,
)
from hhdeploy.backbones.timm import preprocess_of, resolved_name
from hhdeploy.errors import AdapterError
from hhdeploy.files.checkpoints import without_wrappers
from hhdeploy.preprocess import Preprocess

# Types of weights that numbers can be added to; another one has a scale elsewhere.
_TRAINED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What to do with a model of images of another size.
_MADE_FOR = (
    "of another size, say with what it was made in the configuration's base_model_args, such as "
    '{"img_size": 192}'
)


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


def without_values(model: nn.Module) -> str | None:
    """What is wrong with a model that has a tensor on torch's meta device, and what to do; None
    where it has none there. Its parameters can be counted, and an adapter's values are lost."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            return (
                f"{type(model).__name__}: {name}: expected a tensor with values, found one of "
                "torch's meta device, which has none: those of an adapter would be lost there. "
                "Make the model on the CPU or the GPU, load its weights, and attach the adapter "
                "after that."
            )
    return None


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


def check_computed(
    model: nn.Module, linears: Sequence[LinearSpec], size: tuple[int, int, int] | None
) -> None:
    """What the model computes with the weights to be changed is what a Linear does: one product.

    The packed weight of a MultiheadAttention is one Linear where q, k and v have one input: that
    of a pooling, or of another's tokens, is none in a graph. Nor is a Linear whose weight goes
    into something else than x Wᵀ (`_OTHERWISE`).

    Args:
        model: tried on an image; one that does not run here, but timm's, may where it is exported.
        linears: those to be changed.
        size: (channels, height, width) of its images; None: not known, and nothing is tried.

    Raises:
        AdapterError: naming the first one that is none.
        BackboneError: a model of timm does not run on images of that size.
    """
    if size is None:
        return
    places = {x.path: parameters_of(model, x.path) for x in linears}
    packed = {p: m for p, (m, *_) in places.items() if isinstance(m, nn.MultiheadAttention)}
    parted: list[str] = []

    def watch(path: str, given: Mapping[str, Any]) -> None:
        if not given["query"] is given["key"] is given["value"]:
            parted.append(path)

    like = next(model.parameters())
    readings = _Readings(places)
    with contextlib.ExitStack() as stack:
        for path, module in packed.items():
            hook = module.register_forward_pre_hook(
                lambda _, args, named, path=path: watch(
                    path, {**dict(zip(("query", "key", "value"), args, strict=False)), **named}
                ),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        with _tried(model, size), evaluated(model), readings:
            model(torch.zeros(1, *size, device=like.device, dtype=like.dtype))
    if parted:
        raise AdapterError(
            f"{parted[0]}: q, k and v have inputs of their own there (attention that pools, or "
            "looks at other tokens), so that its packed weight is not one Linear, and no export "
            "can change it. Leave it out of target_modules."
        )
    for path, function in readings.otherwise.items():
        raise AdapterError(
            f"{path}: expected a Linear whose weight and bias the model's forward pass uses as "
            f"that alone, found {function} of one of them: in a graph it is not one Linear, and no "
            "export can change it. Leave it out of target_modules, or call the Linear there."
        )


def _tried(model: nn.Module, size: tuple[int, int, int]) -> contextlib.AbstractContextManager[None]:
    """What becomes of its error: of timm's, in one type, that the size is wrong."""
    config = getattr(model, "pretrained_cfg", {})
    types = {parameter.dtype for parameter in model.parameters()}
    if "architecture" not in config or len(types) > 1 or without_values(model) is not None:
        return contextlib.suppress(Exception)
    return computing(str(config["architecture"]), (1, *size), _MADE_FOR)


# Of a weight or a bias: what is no product with a weight as a graph has Linears.
_OTHERWISE = frozenset(
    """addbmm addmm baddbmm bmm cat chunk concat conv1d conv2d conv3d div einsum embedding inner mul
    multiply narrow neg norm select split stack sub tensor_split tensordot truediv unbind
    vector_norm""".split()
)
_ADDED = frozenset(("add", "iadd"))  # to a weight; to a product its bias is
_PRODUCTS = frozenset(("matmul", "mm"))
_REVERSIBLE = _OTHERWISE | _ADDED | _PRODUCTS
_WATCHED = _REVERSIBLE | {"getitem"}


class _Readings(TorchFunctionMode):
    """Watches what becomes of weights and biases while a model is called.

    Attributes:
        otherwise: path -> of its Linear, the first function that made something else of one.
    """

    def __init__(self, places: Mapping[str, tuple[nn.Module, str, str]]) -> None:
        super().__init__()
        self.otherwise: dict[str, str] = {}
        # By where a tensor lies in memory: it comes as itself, detached or turned.
        self._straight: dict[_Place, str] = {}
        self._turned: dict[_Place, str] = {}
        for path, (module, weight, bias) in places.items():
            own = module.get_parameter(weight).detach()
            if own.is_meta or own.numel() == 1:
                continue
            self._straight[_place(own)] = path
            self._turned[_place(own.t())] = path
            if isinstance(added := getattr(module, bias), torch.Tensor):
                self._straight[_place(added)] = path

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and note what it was given."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_").removeprefix("linalg_")
        turned = name.startswith("r") and name[1:] in _REVERSIBLE
        name = name[1:] if turned else name  # of w.__rmul__(x)
        if name in _WATCHED:
            given = [*args, *(kwargs or {}).values()]
            flat = [x for g in given for x in (g if isinstance(g, list | tuple) else [g])]
            for index, tensor in enumerate(flat):
                if isinstance(tensor, torch.Tensor) and tensor.ndim in (1, 2):
                    self._note(name, tensor, first=(index == 0) is not turned, result=result)
        return result

    def _note(self, name: str, tensor: torch.Tensor, *, first: bool, result: Any) -> None:
        place = _place(tensor)
        straight, turned = self._straight.get(place), self._turned.get(place)
        whole = name == "getitem" and getattr(result, "shape", None) == tensor.shape
        right = name in _PRODUCTS and straight is None and not first
        if whole or right or (name in _ADDED and tensor.ndim == 1):
            return
        if (path := straight or turned) is not None:
            self.otherwise.setdefault(path, name)


_Place: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]


def _place(tensor: torch.Tensor) -> _Place:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def preprocess_stated(model: nn.Module, config: AdapterConfig) -> Preprocess:
    """The transform that a model states, as timm's do; of another one that nothing is compared
    with."""
    if not states_transform(model):
        return Preprocess((3, 1, 1), (0.5,) * 3, (0.5,) * 3)
    made: dict[str, Any] = {}
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    # timm says "" or [] of a model whose first convolution is not of the images (CSATv2's DCT).
    stem = getattr(model, "pretrained_cfg", {}).get("first_conv", True)
    if stem and first is not None and first.groups == 1:
        made["in_chans"] = first.in_channels
    # Itself or its patches: what is further inside may have the size of a map.
    sizes = (getattr(m, "img_size", None) for m in model.modules())
    if (size := next(filter(None, sizes), None)) is not None:
        made["img_size"] = size
    return preprocess_of(model, {**made, **config.base_model_args})


def size_of_images(
    model: nn.Module, facts: BackboneFacts, config: AdapterConfig
) -> tuple[int, int, int] | None:
    """(channels, height, width) as the adapter or the model states them; None: neither does."""
    known = config.preprocess is not None or states_transform(model)
    return facts.preprocess.input_size if known else stated_size(model)


def bare_answer(
    model: nn.Module, classifier: str, size: tuple[int, int, int] | None
) -> BaseAnswer | None:
    """What a model, without the adapter that is attached to it, computes of the fixed image.

    Args:
        model: as it is, which it is again after that.
        classifier: its path; "" without one.
        size: (channels, height, width) of its images; None: not known, and nothing is tried.

    Returns:
        None where it does not run here, or tells nothing certain; see `base_answer`.
    """
    if size is None:
        return None
    with contextlib.suppress(Exception), evaluated(model), _without_adapter(model):
        return base_answer(model, classifier, size, certain=True)
    return None


@contextlib.contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    """The weights are the backbone's, whatever is computed from them otherwise."""
    modules = model.modules()
    chains = [m for m in modules if isinstance(m, parametrize.ParametrizationList)]
    try:
        for chain in chains:
            chain.__dict__["forward"] = partial(getattr, chain, "original")
        # What was compiled has the adapter in it.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for chain in chains:
            chain.__dict__.pop("forward", None)


def facts_of(model: nn.Module, config: AdapterConfig) -> BackboneFacts:
    """What a model in hand says of itself; what it does not say is taken from the adapter.

    Its digest is that of float32 weights, which a bundle has; of other types it is the signs'.
    """
    path = classifier_path(model)
    classifier: Any = model.get_submodule(path) if path else None
    digest, signs, buffers = config.base_sha256, "", config.base_buffers
    if not any(p.is_meta for p in model.parameters()):
        signs = signs_sha256(model, path)
        if all(p.dtype in (torch.float32, torch.float64) for p in model.parameters()):
            digest, buffers = base_sha256(model, path), buffers_sha256(model, path)
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    return BackboneFacts(
        model=resolved_name(model, name) if name else config.base_model,
        args=config.base_model_args,
        sha256=digest or "",
        signs=signs,
        buffers=buffers or "",
        linears=find_linears(model, path),
        classifier=path,
        dim=int(classifier.in_features) if path else 0,
        classes=int(classifier.out_features) if path else 0,
        preprocess=config.preprocess or preprocess_stated(model, config),
    )


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model as it answers, without gradients; its modes, random states and warnings after it
    as before."""
    modes = [(module, module.training) for module in model.modules()]
    places = (p.device for p in model.parameters())
    devices = {place.index or 0 for place in places if place.type == "cuda"}
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=sorted(devices)),
            warnings.catch_warnings(),
        ):
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
            f"{moved[0]}: expected the module that the adapter was attached to, found {found} "
            f"({len(moved)} of {len(places)} such modules). What was trained there would be lost: "
            "take off what wraps a part of the model, but for torch.compile and torch's "
            "checkpoint_wrapper, or attach once all modules are in their places."
        )
