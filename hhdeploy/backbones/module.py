"""``python:package.module:function``: a model that a function of the user's returns."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.facts import transform_of
from hhdeploy.backbones.outputs import returns_tensor
from hhdeploy.backbones.spec import BackboneSpec, Loaded, seeded
from hhdeploy.backbones.structure import (
    bare_model,
    check_values,
    classifier_path,
    quantised_part,
)
from hhdeploy.backbones.weights import load_strictly, read_state, state_of
from hhdeploy.errors import BackboneError, abbreviate
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn


def load_module(spec: BackboneSpec, name: str) -> Loaded:
    """Call ``package.module:function`` with ``spec.args``; it returns the model.

    The module is looked for as Python does it, then in the current directory. The model takes
    images and returns logits: a tensor, or an object with ``logits``. What `torch.compile` or data
    parallelism wrapped is taken out of it.

    Args:
        spec: ``pretrained`` and ``seed`` mean nothing here but the seed that torch has while the
            function runs; ``checkpoint`` is loaded into what it returns.
        name: what stands behind ``python:``.

    Raises:
        BackboneError: no such module or function, arguments it does not take, a result that is no
            ``nn.Module``, one without all of its values, or whose image size is not known.
    """
    from torch import nn

    function = _function(name)
    with seeded(spec.seed):
        model = function(**_arguments(function, spec.args, name))
    if not isinstance(model, nn.Module):
        raise BackboneError(
            f"python:{name} returned {type(model).__name__}; expected a torch.nn.Module."
        )
    model = bare_model(model)
    check_values(model)
    if (fault := quantised_part(model)) is not None:
        raise BackboneError(
            f"python:{name}: {fault}. Return the model as it was before; the bundle that is "
            "exported can be quantised."
        )
    path = classifier_path(model)
    classifier = model.get_submodule(path) if path else None
    classes = classifier.out_features if isinstance(classifier, nn.Linear) else 0
    said: tuple[str, ...] = ()
    if spec.checkpoint is not None:
        state, taken = read_state(spec.checkpoint)
        state, part = state_of(model, state, path, spec.checkpoint)
        load_strictly(model, state, path, spec)
        classes = classes if f"{path}.weight" in state else 0
        said = (*taken, *part)
    preprocess, notes = _preprocess(model, spec, name)
    return Loaded(
        returns_tensor(model), f"python:{name}", path, classes, preprocess, (*said, *notes)
    )


def _function(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise BackboneError(
            f"python:{name}: expected python:package.module:function, the function that returns "
            "the model."
        )
    with _current_directory_last():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise BackboneError(
                f"python:{name}: {error}. Expected a module that Python finds, installed, on "
                f"PYTHONPATH or in {Path.cwd()}."
            ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise BackboneError(
            f"python:{name}: {module_name} has no function {attribute!r}. It has "
            f"{abbreviate(found) or 'none'}."
        )
    return function


@contextmanager
def _current_directory_last() -> Iterator[None]:
    """A console script does not look there. Last, so that no file shadows a package; where it is
    in the path already, which may be the caller's script's place, it stays where it is."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        with suppress(ValueError):  # the module took it out
            sys.path.remove(here)


def _arguments(function: Any, args: Mapping[str, Any], name: str) -> dict[str, Any]:
    try:
        inspect.signature(function).bind(**args)
    except (TypeError, ValueError) as error:
        raise BackboneError(
            f"python:{name} does not take the arguments {dict(args)}: {error}."
        ) from error
    return dict(args)


def _preprocess(
    model: nn.Module, spec: BackboneSpec, name: str
) -> tuple[Preprocess, tuple[str, ...]]:
    """The transform that the module states as ``pretrained_cfg``, else what has to be assumed."""
    config = getattr(model, "pretrained_cfg", None)
    stated = config if isinstance(config, Mapping) and "mean" in config else {}
    size = spec.input_size or stated_size(model) or stated.get("input_size")
    if size is None:
        raise BackboneError(
            f"python:{name}: the size of its images is not known. Pass `input_size`, (channels, "
            "height, width), or give the module an attribute of that name."
        )
    if stated:
        try:
            return transform_of(stated, size), ()
        except (ValueError, TypeError) as error:
            raise BackboneError(f"python:{name}: its pretrained_cfg: {error}.") from error
    channels = size[0]
    assumed = Preprocess(size, (0.5,) * channels, (0.5,) * channels, "bicubic", 1.0, exif=True)
    return assumed, (f"image transform assumed: {assumed.described()}",)


def stated_size(model: nn.Module) -> tuple[int, int, int] | None:
    """``input_size`` of the module, or transformers' ``config.image_size``."""
    config = getattr(model, "config", None)
    size = getattr(model, "input_size", None) or getattr(config, "image_size", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, (tuple, list)) or not all(isinstance(n, int) for n in size):
        return None
    channels = getattr(config, "num_channels", 3)
    whole = tuple(size) if len(size) == 3 else (channels, *size)
    return (whole[0], whole[1], whole[2]) if len(whole) == 3 else None
