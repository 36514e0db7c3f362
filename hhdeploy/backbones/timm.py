"""The frozen timm model: creation, checkpoint, digest, facts. Needs torch and timm."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.facts import BASE_MODEL_ARGS, BackboneFacts
from hhdeploy.backbones.sites import LinearSpec, linear_spec
from hhdeploy.errors import BackboneError, require
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    import torch
    from torch import nn

# Left out of the digest: what differs between tasks (classifier), is resampled to the image
# size, or follows from the architecture (buffers).
_RESAMPLED = ("pos_embed", "relative_position", "rel_pos")


@dataclass(frozen=True)
class BackboneSpec:
    """How to get the frozen model.

    Attributes:
        model: timm name, with or without ``.tag``.
        args: further arguments of ``timm.create_model``, from `BASE_MODEL_ARGS`.
        checkpoint: a file that timm can load; None: weights come from timm's hub.
        pretrained: False gives random weights (``seed``), for benchmarks and tests.
        seed: of the random weights.
    """

    model: str
    args: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    pretrained: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Backbone:
    """A loaded timm model in eval mode, float32, and what planning needs to know of it.

    ``model`` always has a classifier Linear; ``facts.classes`` is 0 when it is a placeholder.
    """

    model: nn.Module
    facts: BackboneFacts


def load_backbone(spec: BackboneSpec) -> Backbone:
    """Create the timm model and load its weights as timm does it.

    Raises:
        BackboneError: an unknown model, arguments outside the allow-list, a checkpoint that
            does not fit (missing and unexpected keys are named), several classifiers.
    """
    if unknown := set(spec.args) - BASE_MODEL_ARGS:
        raise BackboneError(
            f"model arguments {', '.join(sorted(unknown))} are not allowed. Expected some of: "
            f"{', '.join(sorted(BASE_MODEL_ARGS))}."
        )
    if spec.checkpoint is not None:
        model, classes = _from_checkpoint(spec)
    else:
        model, classes = _from_timm(spec)
    model.eval().requires_grad_(False)
    return Backbone(model, _facts(model, spec, classes))


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
    """Load a file through timm's reader and the architecture's own checkpoint filter."""
    timm = _timm()
    assert spec.checkpoint is not None
    if not spec.checkpoint.is_file():
        raise BackboneError(f"`checkpoint`: {spec.checkpoint} does not exist.")
    try:
        state = timm.models.load_state_dict(str(spec.checkpoint), use_ema=True)
    except Exception as error:
        raise BackboneError(
            f"`checkpoint`: {spec.checkpoint} cannot be read: {error}. Expected a safetensors "
            "file or a PyTorch state dict without other pickled objects."
        ) from error
    template = _create(spec, pretrained=False, num_classes=1)
    classifier = classifier_path(template)
    filter_fn = getattr(sys.modules[type(template).__module__], "checkpoint_filter_fn", None)
    if filter_fn is not None:
        state = filter_fn(state, template)
    head = state.get(f"{classifier}.weight")
    classes = 0 if head is None else int(head.shape[0])
    model = _create(spec, pretrained=False, num_classes=classes) if classes > 1 else template
    _load_strictly(model, state, classifier, spec)
    return model, classes


def _load_strictly(
    model: nn.Module, state: Mapping[str, torch.Tensor], classifier: str, spec: BackboneSpec
) -> None:
    """load_state_dict where only the classifier may be missing."""
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.startswith(f"{classifier}.")]
    # Buffers that follow from the architecture are often left out of, or left over in, files.
    persistent = dict(model.named_parameters())
    missing = [k for k in missing if k in persistent]
    unexpected = [k for k in state if k not in own and not _derived(k)]
    wrong = [
        f"{k} (expected {list(own[k].shape)}, found {list(state[k].shape)})"
        for k in own
        if k in state and own[k].shape != state[k].shape and k in persistent
    ]
    if missing or unexpected or wrong:
        problems = [
            f"{title}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            for title, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", wrong),
            )
            if names
        ]
        raise BackboneError(
            f"`checkpoint`: {spec.checkpoint} does not fit {spec.model} with {dict(spec.args)}; "
            f"keys {'; '.join(problems)}. Is it this model's, with these arguments?"
        )
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)


def _derived(key: str) -> bool:
    return any(name in key for name in ("relative_position_index", "attn_mask", "mask_token"))


def classifier_path(model: nn.Module) -> str:
    """timm's path of the classifier. Raises `BackboneError` unless it is a single Linear."""
    from torch import nn

    path = getattr(model, "pretrained_cfg", {}).get("classifier")
    if not isinstance(path, str):
        raise BackboneError(
            f"{type(model).__name__}: expected one classifier, timm names {path!r}. Models "
            "with several heads (distilled or auxiliary) are not supported."
        )
    module = dict(model.named_modules()).get(path)
    if not isinstance(module, nn.Linear):
        raise BackboneError(
            f"{type(model).__name__}: the classifier {path} is {type(module).__name__}; "
            "expected a Linear."
        )
    return path


def find_linears(model: nn.Module) -> tuple[LinearSpec, ...]:
    """The Linears that adapters can change, in registration order."""
    from torch import nn

    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and "rel_pos" not in path:  # makes a table of positions
            spec = linear_spec(path, module.out_features, module.in_features)
            if spec is not None and (len(spec.sites) == 1 or _in_thirds(model, path)):
                found.append(spec)
    return tuple(found)


def _in_thirds(model: nn.Module, path: str) -> bool:
    """Whether the rows of a fused qkv are all of q, then all of k, then all of v.

    MaxViT and TinyViT keep q, k and v together head by head, and the global blocks of GCViT
    have k and v only: their thirds would not be what their names say.
    """
    attention = model.get_submodule(path.rpartition(".")[0])
    head_by_head = getattr(attention, "head_first", False) or hasattr(attention, "val_dim")
    return not (head_by_head or getattr(attention, "use_global", False))


def _facts(model: nn.Module, spec: BackboneSpec, classes: int) -> BackboneFacts:
    path = classifier_path(model)
    classifier = model.get_submodule(path)
    return BackboneFacts(
        model=resolved_name(model, spec.model),
        args=dict(spec.args),
        sha256=base_sha256(model, path),
        linears=find_linears(model),
        classifier=path,
        dim=int(classifier.in_features),  # type: ignore[arg-type]
        classes=classes,
        preprocess=preprocess_of(model, spec.args),
    )


def resolved_name(model: nn.Module, name: str) -> str:
    """The timm name with the tag that was used (timm's default one if none was given)."""
    tag = getattr(model, "pretrained_cfg", {}).get("tag")
    return name if "." in name or not tag else f"{name}.{tag}"


def preprocess_of(model: nn.Module, args: Mapping[str, Any]) -> Preprocess:
    """timm's evaluation transform of a model, its image size as ``args`` made it."""
    config: dict[str, Any] = _timm().data.resolve_model_data_config(model)
    size = config["input_size"]
    if "img_size" in args:
        img = args["img_size"]
        size = (3, img, img) if isinstance(img, int) else (3, *img)
    return Preprocess.from_json({**config, "input_size": size, "exif": True})


def base_sha256(model: nn.Module, classifier: str) -> str:
    """Digest of the frozen weights: what an adapter was trained on.

    sha256 over the sorted (name, dtype, shape, little-endian bytes) of the state dict without
    classifier, position embeddings, relative-position tables and buffers.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(), key=lambda item: item[0]):
        if name.startswith(f"{classifier}.") or any(part in name for part in _RESAMPLED):
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{kind}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention as MatMul, Softmax, MatMul while in the block.

    timm's fused attention does not trace with a dynamic batch for every architecture (BEiT,
    MaxViT, Hiera), and compilers fuse the plain form themselves.
    """
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]
