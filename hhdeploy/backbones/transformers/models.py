"""``transformers:DIR_OR_HUB_ID``: image models of transformers, traced as they are.

No code of a repository is ever run (``trust_remote_code=False``), and a pickled file of weights
is read with ``weights_only=True``.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from hhdeploy.backbones.licences import CARD, Licences, licences_of_card
from hhdeploy.backbones.meaning import Meaning, meaning_beside, meaning_of
from hhdeploy.backbones.outputs import returns_tensor
from hhdeploy.backbones.spec import OFFLINE, BackboneSpec, Loaded, seeded
from hhdeploy.backbones.structure import classifier_path
from hhdeploy.backbones.transformers.fitting import check_loading, check_unquantised, left_out
from hhdeploy.backbones.transformers.transforms import transform_of
from hhdeploy.backbones.weights import (
    State,
    read_state,
    state_of,
)
from hhdeploy.errors import BackboneError, first_line, require
from hhdeploy.files.bundle_json import CONFIG_FILE
from hhdeploy.files.plain import what_instead
from hhdeploy.files.weights import files_of, named_type, not_floats, weights_in

if TYPE_CHECKING:
    from torch import nn

# The exporter writes attention out; with the fused kernels some models do not trace.
_ATTENTION = "eager"
_CLASSIFIER = "ForImageClassification"
_PROJECTION = "VisionModelWithProjection"
_TEACHER = "WithTeacher"
# What models of images call these, and what those call it that take patches of any number of sizes.
_IMAGES, _SHAPES = "pixel_values", "spatial_shapes"
# What configurations call the number of images that a video has.
_FRAMES = ("num_frames", "frames_per_clip")


def load_transformers(spec: BackboneSpec, where: str) -> Loaded:
    """A classifier (AutoModelForImageClassification), or a model of features (AutoModel).

    Args:
        spec: ``args`` replace entries of the configuration.
        where: a directory of ``save_pretrained``, or an id of the hub.

    Raises:
        BackboneError: no such directory or id, a configuration that needs code of its own,
            weights that do not fit.
    """
    transformers = require("transformers", "transformers", "loading a model of transformers")
    with _quiet(transformers):
        return _loaded(transformers, spec, where)


def _loaded(transformers: Any, spec: BackboneSpec, where: str) -> Loaded:
    config = _config(transformers, spec, where)
    classifies = _classifies(config, where)
    _check_no_video(config, where)
    model, given, taken = _model(transformers, spec, where, config, classifies)
    _check_inputs(model, where)
    path = classifier_path(model) if classifies else ""
    classes = int(config.num_labels) if classifies and f"{path}.weight" in given else 0
    preprocess, notes = transform_of(config, spec, where, model)
    traced_with = (f"transformers {transformers.__version__}", _ATTENTION, config.to_json_string())
    name = f"transformers:{type(model).__name__ if Path(where).is_dir() else where}"
    return Loaded(
        returns_tensor(model),
        name,
        path,
        classes,
        preprocess,
        (*taken, *notes),
        traced_with,
        license=_licences(where) if spec.pretrained and spec.checkpoint is None else (),
        meaning=_meaning(config, spec, classes),
    )


def _meaning(config: Any, spec: BackboneSpec, classes: int) -> Meaning:
    """What the configuration says of the classifier; of weights that came from elsewhere what
    theirs does, beside them. Arguments have the last word."""
    if spec.checkpoint is None:
        return meaning_of(config.to_dict(), classes)
    beside = meaning_beside(spec.checkpoint, classes)
    asked = meaning_of(spec.args, classes)
    return Meaning(
        asked.class_names or beside.class_names, asked.problem_type or beside.problem_type
    )


def _licences(where: str) -> Licences:
    """What the card beside the weights states: of the hub's, where it lies in its cache."""
    folder = _folder(where, CARD)
    return () if folder is None else licences_of_card(folder)


def _folder(where: str, name: str) -> Path | None:
    """The directory of a model, of the hub's the cache's where that has a file of this name."""
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(where, name)
    return Path(found).parent if isinstance(found, str) else None


def _not_floats(where: str) -> dict[str, str]:
    """Name -> type of what the files of a model that was read hold beside floating-point numbers;
    empty where they are called otherwise than save_pretrained calls them."""
    folder = _folder(where, "config.json")
    file = None if folder is None else weights_in(folder)
    return not_floats(file) if file is not None and file.is_file() else {}


def with_classifier(spec: BackboneSpec) -> BackboneSpec:
    """A model of transformers that was saved without a classifier (ViTModel) as one with a place
    for it, which its arguments then say; anything else as it is."""
    source, _, where = spec.model.partition(":")
    if source != "transformers" or "architectures" in spec.args:
        return spec
    transformers = require("transformers", "transformers", "loading a model of transformers")
    with _quiet(transformers):
        config = _config(transformers, spec, where)
    known = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    names = known.get(config.model_type)
    if names is None or _classifies(config, where):
        return spec
    name = names if isinstance(names, str) else names[0]
    return replace(spec, args={**spec.args, "architectures": [name]})


def _classifies(config: Any, where: str) -> bool:
    """Whether the configuration names a model with a classifier.

    Raises:
        BackboneError: it has two, whose answers are averaged.
    """
    names = [str(name) for name in config.architectures or ()]
    for name in names:
        kind, found, more = name.partition(_CLASSIFIER)
        if found and more != "" and more != _TEACHER:
            raise BackboneError(
                f"transformers:{where}: {name} is none of the classes that are loaded here: "
                f"expected one of {_CLASSIFIER}, or of features. Write a function that returns the "
                "model, and load that: python:package.module:function."
            )
        if more == _TEACHER:
            raise BackboneError(
                f"transformers:{where}: {name} averages the answers of two classifiers, and an "
                "adapter has one. Take it with a single one, for adapters that bring theirs: "
                f"`model_args={{'architectures': ['{kind}{found}']}}`."
            )
    return any(name.endswith(_CLASSIFIER) for name in names)


def _check_no_video(config: Any, where: str) -> None:
    """Raise `BackboneError` for a model that takes several images for one."""
    for said in (config, getattr(config, "vision_config", None)):
        for name in _FRAMES:
            if (count := getattr(said, name, None)) is not None:
                raise BackboneError(
                    f"transformers:{where}: {config.model_type} takes videos ({name} of its "
                    f"configuration is {count}), and a bundle answers for an image at a time. "
                    "Expected a model of images."
                )


def _check_inputs(model: nn.Module, where: str) -> None:
    """Raise `BackboneError` for a model that takes something else than images as they are."""
    main: str = getattr(model, "main_input_name", _IMAGES)
    takes = inspect.signature(type(model).forward).parameters
    if main == _IMAGES and _SHAPES not in takes:
        return
    what = main if main != _IMAGES else f"patches of images and their {_SHAPES}"
    raise BackboneError(
        f"transformers:{where}: {type(model).__name__} takes {what}, and a bundle's graph takes "
        "images alone. Of a model of texts and images, save its tower (vision_model) by itself "
        "and pass that; of another, write a function that returns a module which makes "
        f"{what.partition(' ')[0]} of images of one size: python:package.module:function."
    )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and reports of its own: what is wrong with the weights is an error here."""
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def _config(transformers: Any, spec: BackboneSpec, where: str) -> Any:
    """The configuration, entries of it replaced by ``spec.args``."""
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # of whatever it makes of values that are none
        raise BackboneError(
            f"transformers:{where} has no configuration that can be read: {first_line(error)}. "
            "Expected a directory with config.json, or an id of the hub; code that comes with a "
            f"model is never run.{_offline(where)}"
        ) from error
    for name, value in spec.args.items():
        if name.startswith("_") or not hasattr(config, name):
            raise BackboneError(
                f"transformers:{where}: its configuration has no entry {name!r}. Expected some of "
                f"{', '.join(sorted(k for k in config.to_dict() if not k.startswith('_')))}."
            )
        setattr(config, name, value)
    return config


def _offline(where: str) -> str:
    """What helps without a network, of an id of the hub; nothing of a directory."""
    return "" if Path(where).is_dir() else f" {OFFLINE}"


def _model(
    transformers: Any, spec: BackboneSpec, where: str, config: Any, classifies: bool
) -> tuple[nn.Module, frozenset[str], tuple[str, ...]]:
    """The model, which of its tensors are more than random, and which were taken of several.

    Weights go through transformers' own reader also from ``spec.checkpoint``: files keep the
    names of older versions.
    """
    import torch

    kind = _class(transformers, config, classifies)
    taken: tuple[str, ...] = ()
    file, adapter = spec.checkpoint, _adapter_beside(spec, where)
    if file is None and adapter:
        file = weights_in(Path(where))
    try:
        with seeded(spec.seed):
            if spec.checkpoint is None and not spec.pretrained:
                model: nn.Module = _fresh(kind, config)
                return model, frozenset(model.state_dict()), ()
            check_unquantised(config, where)
            common = {
                "config": config,
                "attn_implementation": _ATTENTION,
                "dtype": torch.float32,
                "output_loading_info": True,
                "ignore_mismatched_sizes": True,  # named by `check_loading`, not in a report
            }
            if file is not None:
                with torch.device("meta"):
                    empty = _fresh(kind, config)
                state, taken = _state(file, empty, classifies)
                kinds = {k: v.dtype for k, v in state.items() if not v.is_floating_point()}
                types = {key: named_type(kind) for key, kind in kinds.items()}
                model, loading = type(empty).from_pretrained(None, state_dict=state, **common)
            else:
                model, loading = kind.from_pretrained(
                    where, weights_only=True, trust_remote_code=False, **common
                )
                types = _not_floats(where)
    except (
        OSError, ValueError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError,
        SafetensorError, EOFError, AttributeError, ArithmeticError, ImportError,
    ) as error:  # fmt: skip
        raise BackboneError(
            f"transformers:{where} cannot be loaded: {_in_the_way(spec, where, error)}"
            f"{_offline(where)}"
        ) from error
    check_loading(
        spec.checkpoint or f"transformers:{where}",
        loading,
        model,
        classifier_path(model) if classifies else "",
        types,
        whole=spec.checkpoint is not None and classifies,
    )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BackboneError(
            f"transformers:{where} is a model with an adapter of PEFT on it ({CONFIG_FILE}). "
            "Expected the model alone: have it in a directory of its own, and bring the adapter by "
            "`import_adapter()`."
        )
    given = frozenset(model.state_dict()) - frozenset(loading["missing_keys"])
    return model, given, (*taken, *left_out(loading), *adapter)


def _adapter_beside(spec: BackboneSpec, where: str) -> tuple[str, ...]:
    """A line where a directory has an adapter beside the model's weights, which are read without
    it: transformers would, with PEFT installed, return the model that the adapter makes of it."""
    folder = Path(where)
    beside = (folder / CONFIG_FILE).is_file() and weights_in(folder).is_file()
    if spec.checkpoint not in (None, weights_in(folder)) or not spec.pretrained or not beside:
        return ()
    return ("an adapter of PEFT beside the model is left out: it has to be imported",)


def _in_the_way(spec: BackboneSpec, where: str, error: Exception) -> str:
    """What keeps weights from being read; torch's own words advise options that nobody has here."""
    weights = weights_in(Path(where))
    if spec.checkpoint is None and weights.is_file():
        try:
            files = files_of(weights)
        except ValueError as unlisted:
            return f"{weights.name}: {unlisted}."
        for file in filter(Path.is_file, files):
            if instead := what_instead(file):
                return f"{file.name}: {instead}."
    reason = "a file of weights ends early" if isinstance(error, EOFError) else first_line(error)
    if isinstance(error, pickle.UnpicklingError):
        reason = reason.partition(". ")[0]
    return f"{reason}."


def _class(transformers: Any, config: Any, classifies: bool) -> Any:
    """What makes and loads the model. An image tower with a projection is no model of AutoModel,
    which makes the tower alone of it."""
    for name in map(str, config.architectures or ()):
        kind = getattr(transformers, name, None) if name.endswith(_PROJECTION) else None
        if kind is not None and isinstance(config, kind.config_class):
            return kind
    return transformers.AutoModelForImageClassification if classifies else transformers.AutoModel


def _fresh(kind: Any, config: Any) -> Any:
    """A model with random weights, of a class of transformers or one that chooses it."""
    if hasattr(kind, "from_config"):
        return kind.from_config(config, attn_implementation=_ATTENTION, trust_remote_code=False)
    return kind._from_config(config, attn_implementation=_ATTENTION)


def _state(file: Path, model: Any, classifies: bool) -> tuple[State, tuple[str, ...]]:
    """The weights of a file, without what a module around the model put before all names.

    A file may have names of older versions, which are not the model's own: what nothing of the
    model is called is such a prefix as well.
    """
    state, taken = read_state(file)
    state, part = state_of(model, state, classifier_path(model) if classifies else "", file)
    first = {key.partition(".")[0] for key in state}
    if len(first) == 1 and not hasattr(model, (outer := first.pop())):
        state = {key.removeprefix(f"{outer}."): value for key, value in state.items()}
    return state, (*taken, *part)
