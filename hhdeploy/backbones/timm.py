"""timm models: creation, checkpoint, image transform. Needs torch and timm."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.facts import check_timm_args
from hhdeploy.backbones.spec import BackboneSpec, Loaded
from hhdeploy.backbones.structure import classifier_path
from hhdeploy.backbones.weights import load_strictly, read_state
from hhdeploy.errors import BackboneError, require
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn


def load_timm(spec: BackboneSpec) -> Loaded:
    """Create the timm model and load its weights as timm does it.

    Raises:
        BackboneError: an unknown model, arguments that timm does not take or that do not shape
            the model, a checkpoint that does not fit (missing and unexpected keys are named),
            several classifiers.
    """
    check_timm_args(spec.args)
    if spec.checkpoint is not None:
        model, classes = _from_checkpoint(spec)
    else:
        model, classes = _from_timm(spec)
    preprocess = preprocess_of(model, spec.args)
    notes: tuple[str, ...] = ()
    if preprocess.input_size[0] != 3:
        notes = (f"image transform assumed: {preprocess.described()}",)
    return Loaded(
        model,
        resolved_name(model, spec.model),
        classifier_path(model),
        classes,
        preprocess,
        notes,
        traced_with=(f"timm {_timm().__version__}",),
    )


def _timm() -> Any:
    require("torch", "export", "loading a backbone")
    return require("timm", "export", "loading a backbone")


def _create(spec: BackboneSpec, *, pretrained: bool, num_classes: int | None = None) -> nn.Module:
    """timm.create_model with its errors mapped; ``num_classes`` None: the model's default."""
    timm = _timm()
    import torch

    name = spec.model.split(".")[0]
    if not timm.is_model(name):
        close = timm.list_models(f"*{name[:12]}*")[:5]
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise BackboneError(
            f"unknown timm model {spec.model!r} (timm {timm.__version__}).{hint} See all names "
            "with: python -c \"import timm; print(*timm.list_models(), sep='\\n')\""
        )
    kwargs = dict(spec.args)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    state = torch.random.get_rng_state()
    torch.manual_seed(spec.seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)
            return timm.create_model(spec.model, pretrained=pretrained, **kwargs)  # type: ignore[no-any-return]
    except Exception as error:
        if pretrained:
            raise BackboneError(
                f"timm could not load {spec.model} with pretrained weights: {error}. Without a "
                "connection to timm's hub, pass the weights with `checkpoint`."
            ) from error
        raise BackboneError(
            f"timm could not create {spec.model} with {dict(spec.args)}: {error}"
        ) from error
    finally:
        torch.random.set_rng_state(state)


def _from_timm(spec: BackboneSpec) -> tuple[nn.Module, int]:
    model = _create(spec, pretrained=spec.pretrained)
    classes = int(getattr(model, "num_classes", 0))
    if classes == 0:
        # A placeholder classifier keeps one shape of graph for all backbones.
        return _create(spec, pretrained=spec.pretrained, num_classes=1), 0
    return model, classes


def _from_checkpoint(spec: BackboneSpec) -> tuple[nn.Module, int]:
    """Load a file through the architecture's own checkpoint filter."""
    assert spec.checkpoint is not None
    state = read_state(spec.checkpoint)
    template = _create(spec, pretrained=False, num_classes=1)
    classifier = classifier_path(template)
    filter_fn = getattr(sys.modules[type(template).__module__], "checkpoint_filter_fn", None)
    if filter_fn is not None:
        state = filter_fn(state, template)
    head = state.get(f"{classifier}.weight")
    classes = 0 if head is None else int(head.shape[0])
    model = _create(spec, pretrained=False, num_classes=classes) if classes > 1 else template
    load_strictly(model, state, classifier, spec)
    return model, classes


def resolved_name(model: nn.Module, name: str) -> str:
    """The timm name with the tag that was used (timm's default one if none was given)."""
    tag = getattr(model, "pretrained_cfg", {}).get("tag")
    return name if "." in name or not tag else f"{name}.{tag}"


def preprocess_of(model: nn.Module, args: Mapping[str, Any]) -> Preprocess:
    """timm's evaluation transform of a model, its images as ``args`` made them.

    Channels that are not red, green and blue have the average of their mean and std each.
    """
    config: dict[str, Any] = _timm().data.resolve_model_data_config(model)
    height, width = config["input_size"][1:]
    if "img_size" in args:
        img = args["img_size"]
        height, width = (img, img) if isinstance(img, int) else img
    channels = args.get("in_chans", 3)
    if channels != 3:
        config |= {k: [sum(config[k]) / len(config[k])] * channels for k in ("mean", "std")}
    size = (channels, height, width)
    return Preprocess.from_json({**config, "input_size": size, "exif": True})
