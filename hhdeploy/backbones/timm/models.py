"""timm models: creation, checkpoint, image transform. Needs torch and timm."""

from __future__ import annotations

import difflib
import inspect
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.converting import agree, agree_on_clip, is_transformers, timm_state
from hhdeploy.backbones.facts import check_timm_args, transform_of
from hhdeploy.backbones.licences import Licences, licences_of, licences_of_card, together
from hhdeploy.backbones.meaning import Meaning, meaning_beside, meaning_of
from hhdeploy.backbones.spec import OFFLINE, BackboneSpec, Loaded, seeded
from hhdeploy.backbones.structure import classifier_path
from hhdeploy.backbones.timm.arrays import load_arrays
from hhdeploy.backbones.timm.geometry import resampled
from hhdeploy.backbones.transformers.processors import PROCESSOR, processor_beside
from hhdeploy.backbones.weights import State, load_strictly, passed_over, read_state, state_of
from hhdeploy.errors import BackboneError, abbreviate, require
from hhdeploy.files.bundle_json import json_problem
from hhdeploy.files.plain import read_plain
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

# What timm makes a model from, beside its name.
_FROM = ("hf-hub:", "local-dir:")
# What timm's folders call their weights.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# A layer between the features and the classifier that timm's ViTs had once.
_LAYER = "pre_logits."


def load_timm(spec: BackboneSpec) -> Loaded:
    """Create the timm model and load its weights as timm does it.

    Raises:
        BackboneError: an unknown model, arguments that timm does not take or that do not shape
            the model, a checkpoint that does not fit (missing and unexpected keys are named),
            several classifiers, an ``input_size`` that is not the model's, an image processor
            beside the checkpoint whose steps cannot be expressed.
    """
    check_timm_args(spec.args)
    notes: list[str] = []
    converted = False
    traced_with = [f"timm {_timm().__version__}"]
    if spec.checkpoint is not None and spec.checkpoint.suffix == ".npz":
        model, classes, said = load_arrays(spec, _create_empty)
        notes += said
    elif spec.checkpoint is not None:
        model, classes, converted, said = _from_checkpoint(spec)
        notes += said
        if converted:
            lines, eps = agree(model, spec.checkpoint)
            notes += lines
            traced_with.append(f"norm eps {eps!r}")
    else:
        model, classes = _from_timm(spec)
    preprocess, line = _transform(spec, model, converted)
    _check_input_size(spec, model, preprocess)
    return Loaded(
        model,
        resolved_name(model, spec.model),
        classifier_path(model),
        classes,
        preprocess,
        (*notes, *line),
        traced_with=tuple(traced_with),
        license=_licences(spec, model),
        meaning=_meaning(spec, model, classes),
    )


def _transform(
    spec: BackboneSpec, model: nn.Module, converted: bool
) -> tuple[Preprocess, tuple[str, ...]]:
    """The image transform, and a line about one that is assumed, or not the model's own: what is
    said beside a checkpoint goes before. ``converted``: weights of transformers."""
    own = preprocess_of(model, spec.args)
    found = transform_beside(spec.checkpoint, model, spec.args) if spec.checkpoint else None
    if found is not None:
        stated, name = found
        line = f"image transform taken from {name} beside the weights: {stated.described()}"
        return stated, () if stated == own else (line,)
    if converted:
        return own, (f"image transform assumed, for want of {PROCESSOR}: {own.described()}",)
    return own, (f"image transform assumed: {own.described()}",) if own.input_size[0] != 3 else ()


def transform_beside(
    checkpoint: Path, model: nn.Module, args: Mapping[str, Any]
) -> tuple[Preprocess, str] | None:
    """What is said beside a file of weights of how images become inputs, as of a folder that is
    itself the model: timm's config.json, or transformers' image processor.

    Args:
        checkpoint: the file.
        model: of timm.
        args: that it was made with.

    Returns:
        The transform, and the file that says it; None where nothing does.

    Raises:
        BackboneError: what is said is no transform of this model's images.
    """
    size = preprocess_of(model, args).input_size
    if (stated := _timm_config(checkpoint.parent)) is not None:
        made = preprocess_of(model, args, stated)
        # Of a model that is made for one size, arguments and weights say which.
        fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size")
        return replace(made, input_size=size) if fixed else made, "config.json"
    return processor_beside(checkpoint, size)


def _timm_config(folder: Path) -> Mapping[str, Any] | None:
    """What timm's config.json in a folder states of images; None without, or of another's."""
    try:
        content = json.loads(read_plain(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        return None
    stated = content.get("pretrained_cfg", content)  # older ones have all in one
    return stated if isinstance(stated, dict) and "mean" in stated else None


def _check_input_size(spec: BackboneSpec, model: nn.Module, preprocess: Preprocess) -> None:
    """Of timm's models the arguments, if they take such, make the size: one that is asked for
    beside them would mean nothing.

    Raises:
        BackboneError: it is another one.
    """
    made, asked = preprocess.input_size, spec.input_size
    if asked is None or tuple(asked) == made:
        return
    args: dict[str, Any] = {}
    if tuple(asked[1:]) != made[1:]:
        args["img_size"] = asked[1] if asked[1] == asked[2] else list(asked[1:])
    if asked[0] != made[0]:
        args["in_chans"] = asked[0]
    way = f"have the model made for that size: `model_args={args}`, beside its other arguments"
    if "img_size" in args.keys() - inspect.signature(type(model).__init__).parameters.keys():
        way = (
            f"as {type(model).__name__} takes no img_size, write a function that returns "
            "timm.create_model(...), and load that for that size: python:package.module:function"
        )
    raise BackboneError(
        f"`input_size`: expected {list(made)}, as timm makes {spec.model} with these arguments, "
        f"found {list(asked)}. Leave it out, or {way}."
    )


def _meaning(spec: BackboneSpec, model: nn.Module, classes: int) -> Meaning:
    """What is said beside the weights of their classifier, or by timm of its own."""
    if spec.checkpoint is not None:
        return meaning_beside(spec.checkpoint, classes)
    stated = getattr(model, "pretrained_cfg", {}) if spec.pretrained else {}
    return meaning_of(stated, classes)


def _licences(spec: BackboneSpec, model: nn.Module) -> Licences:
    """What timm, or a folder of its, states of the weights that were loaded: nothing of random
    ones, and of a file of weights nothing that is said of others."""
    stated = licences_of(getattr(model, "pretrained_cfg", {}).get("license"))
    folder = Path(spec.model.removeprefix("local-dir:"))
    if folder != Path(spec.model):
        own = spec.checkpoint is not None and spec.checkpoint.parent == folder
        return together(stated, licences_of_card(folder)) if own else ()
    return stated if spec.pretrained and spec.checkpoint is None else ()


def named_as_timm_does(spec: BackboneSpec) -> BackboneSpec:
    """The spec with the hub's names of timm's models as timm's own, and a folder read.

    ``timm/NAME`` and ``hf_hub:timm/NAME`` are ``NAME``. A folder has timm's config.json and
    weights; its arguments join those of the spec. One without config.json that is called as a
    model of timm (a bundle of it, say) is none.

    Raises:
        BackboneError: a folder that is not timm's.
    """
    folder = Path(spec.model)
    known = _timm().is_model(spec.model.partition(".")[0])
    if folder.is_dir() and (not known or (folder / "config.json").is_file()):
        return _of_folder(spec, folder)
    name = spec.model.replace("hf_hub:", "hf-hub:", 1)
    plain = name.removeprefix("hf-hub:")
    return replace(spec, model=plain.removeprefix("timm/") if plain[:5] == "timm/" else name)


def _of_folder(spec: BackboneSpec, folder: Path) -> BackboneSpec:
    try:
        config = json.loads(read_plain(folder / "config.json"))
        kind, architecture = config.get("model_type"), config.get("architecture")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise BackboneError(
            f"{folder} has no config.json that can be read: {json_problem(error)}. Expected a "
            "model's directory, as timm or transformers saved it, or timm's name of a model."
        ) from error
    if not isinstance(architecture, str):
        hint = f" Is it a model of transformers? Pass transformers:{folder}." if kind else ""
        raise BackboneError(
            f"{folder}/config.json: expected timm's architecture, found none.{hint}"
        )
    found = [f for f in (folder / n for n in _WEIGHTS) if f.is_file()]
    if spec.checkpoint is None and spec.pretrained and not found:
        raise BackboneError(f"{folder} has no weights: expected {' or '.join(_WEIGHTS)}.")
    args = {**config.get("model_args", {}), **spec.args}
    if "num_classes" in config:
        args.setdefault("num_classes", config["num_classes"])
    weights = found[0] if found and spec.pretrained else None
    return replace(
        spec, model=f"local-dir:{folder}", args=args, checkpoint=spec.checkpoint or weights
    )


def _timm() -> Any:
    require("torch", "export", "loading a backbone")
    return require("timm", "export", "loading a backbone")


def _meant(model: str, timm: Any) -> str:
    """What to give in the place of a name that timm does not know."""
    if Path(model).is_file():
        return ": that is a file. Name the model, and pass the file as `checkpoint`."
    close = difflib.get_close_matches(model.rpartition(":")[2].lower(), timm.list_models(), 5)
    hints = [f"Did you mean {', '.join(close)}?"] if close else []
    if {":", "/"} & set(model):
        hints.append(
            "A model of transformers is transformers:DIR_OR_HUB_ID, one of timm's from the hub "
            "hf-hub:OWNER/NAME, your own python:package.module:function."
        )
    hints.append("All: python -c \"import timm; print(*timm.list_models(), sep='\\n')\"")
    return " ".join([f" (timm {timm.__version__}).", *hints])


def _create(spec: BackboneSpec, *, pretrained: bool, num_classes: int | None = None) -> nn.Module:
    """timm.create_model with its errors mapped; ``num_classes`` None: the model's default."""
    timm = _timm()
    name, _, tag = spec.model.partition(".")
    if not spec.model.startswith(_FROM) and not timm.is_model(name):
        raise BackboneError(f"unknown timm model {spec.model!r}{_meant(spec.model, timm)}")
    kwargs = dict(spec.args)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    try:
        with seeded(spec.seed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)
            return timm.create_model(spec.model, pretrained=pretrained, **kwargs)  # type: ignore[no-any-return]
    except Exception as error:
        if "Invalid pretrained tag" in str(error):
            known = " or ".join(timm.list_pretrained(f"{name}.*")) or f"{name} alone"
            raise BackboneError(
                f"timm {timm.__version__} has no weights {tag!r} of {name}. Expected {known}."
            ) from error
        what, more = f"create {spec.model} with {dict(spec.args)}", ""
        if pretrained:
            what, more = f"load {spec.model} with pretrained weights", f" {OFFLINE}"
            more += " Or pass the weights with `checkpoint`."
        elif spec.model.startswith("hf-hub:"):
            more = f" {OFFLINE}"
        raise BackboneError(f"timm could not {what}: {str(error).rstrip('.')}.{more}") from error


def _create_empty(spec: BackboneSpec, num_classes: int) -> nn.Module:
    """A model for weights that come from elsewhere."""
    return _create(spec, pretrained=False, num_classes=num_classes)


def _from_timm(spec: BackboneSpec) -> tuple[nn.Module, int]:
    model = _create(spec, pretrained=spec.pretrained)
    classes = int(getattr(model, "num_classes", 0))
    if classes == 0:
        # A placeholder classifier keeps one shape of graph for all backbones.
        del model  # never two of them in memory
        return _create(spec, pretrained=spec.pretrained, num_classes=1), 0
    return model, classes


def _from_checkpoint(spec: BackboneSpec) -> tuple[nn.Module, int, bool, list[str]]:
    """Load a file through the architecture's own checkpoint filter; also whether its names were
    those of transformers, and lines about which weights were taken and what was resampled."""
    assert spec.checkpoint is not None
    state, taken = read_state(spec.checkpoint)
    model = _create_empty(spec, 1)
    classifier = classifier_path(model)
    state, part = state_of(model, state, classifier, spec.checkpoint)
    converted = is_transformers(state)
    if converted:
        state = timm_state(state, model, classifier, spec.checkpoint)
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    state, behind = _without_layer(state, model, classifier)
    said = [*taken, *part, *behind]
    if filter_fn is not None:
        given, state = state, filter_fn(dict(state), model)  # timm's may take out of what it gets
        said += resampled(given, state, spec)
        said += passed_over(model, given, state, classifier)
        said += agree_on_clip(model, given, spec.checkpoint)
    head = state.get(f"{classifier}.weight")
    classes = 0 if head is None else int(head.shape[0])
    if classes > 1:
        del model  # never two of them in memory
        model = _create_empty(spec, classes)
    load_strictly(model, state, classifier, spec)
    return model, classes, converted, said


def _without_layer(
    state: State, model: nn.Module, classifier: str
) -> tuple[State, tuple[str, ...]]:
    """The weights without a layer that timm's ViTs once had in front of the classifier, and without
    that one, which says nothing of other features than the layer's; and a line about both."""
    if any(name.startswith(_LAYER) for name in model.state_dict()):
        return state, ()
    layer = [key for key in state if key.startswith(_LAYER)]
    left = [key for key in state if layer and key.startswith(f"{classifier}.")] + layer
    line = f"left out of the checkpoint: {abbreviate(left, 4)}, which timm's models no longer have"
    kept = {key: value for key, value in state.items() if key not in left}
    return kept, (line,) if left else ()


def resolved_name(model: nn.Module, name: str) -> str:
    """The timm name with the tag that was used (timm's default one if none was given)."""
    config = getattr(model, "pretrained_cfg", {})
    tag = config.get("tag")
    if name.startswith("local-dir:"):
        name = str(config["architecture"])
    return name if "." in name or not tag else f"{name}.{tag}"


def preprocess_of(
    model: nn.Module, args: Mapping[str, Any], stated: Mapping[str, Any] | None = None
) -> Preprocess:
    """timm's evaluation transform of a model, its images as ``args`` made them.

    Channels that are not red, green and blue have the average of their mean and std each.

    Args:
        model: of timm, or with a ``pretrained_cfg`` as theirs.
        args: that it was made with.
        stated: what another ``pretrained_cfg`` than the model's says.

    Raises:
        BackboneError: what its configuration states is no such transform.
    """
    config: dict[str, Any] = _timm().data.resolve_model_data_config(model, pretrained_cfg=stated)
    height, width = config["input_size"][1:]
    if "img_size" in args:
        img = args["img_size"]
        height, width = (img, img) if isinstance(img, int) else img
    channels = args.get("in_chans", 3)
    if channels != 3:
        config |= {k: [sum(config[k]) / len(config[k])] * channels for k in ("mean", "std")}
    size = (channels, height, width)
    try:
        return transform_of(config, size)
    except (ValueError, TypeError) as error:
        raise BackboneError(
            f"{type(model).__name__} of timm: its pretrained_cfg: {error}."
        ) from error
