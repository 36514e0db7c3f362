"""Weights that transformers saved, for the timm model of the same architecture.

ViT, DeiT, DINOv2, BEiT, Swin and the image towers of CLIP and SigLIP are the same function under
other names, so their weights are renamed and q, k and v put together. What weights do not show
(heads, activation, the norms' epsilon) is compared with the config.json beside them; without one
it is assumed, which a note says.
Sources: the conversion scripts of transformers, ``convert_*_timm_to_pytorch.py``, and what its
models compute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.weights import advice_on_peft
from hhdeploy.errors import BackboneError, abbreviate
from hhdeploy.files.bundle_json import object_in

if TYPE_CHECKING:
    import torch
    from torch import nn

# What every file of these models has, whatever stands before it; the second of CLIP and SigLIP.
_TOWER = "embeddings.patch_embedding.weight"
_MARKS = ("embeddings.patch_embeddings.projection.weight", _TOWER)
# Pattern -> timm's name, the first that fits the whole; names before transformers 5 and since.
_BLOCK = r"(?:encoder\.)?layers?\.(\d+)\."
_STAGE = r"encoder\.layers\.(\d+)\.blocks\.(\d+)\."
_OUTSIDE = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.(\w+)": r"patch_embed.proj.\1",
    r"embeddings\.norm\.(\w+)": r"patch_embed.norm.\1",
    r"layernorm\.(\w+)": r"norm.\1",
    r"pooler\.layernorm\.(\w+)": r"fc_norm.\1",
    # After the class token: to timm a register.
    r"embeddings\.distillation_token": "reg_token",
    # CLIP and SigLIP.
    r"embeddings\.class_embedding": "cls_token",
    r"embeddings\.position_embedding\.weight": "pos_embed",
    r"embeddings\.patch_embedding\.(\w+)": r"patch_embed.proj.\1",
    r"pre_layrnorm\.(\w+)": r"norm_pre.\1",
    r"post_layernorm\.(\w+)": r"norm.\1",
    r"head\.probe": "attn_pool.latent",
    r"head\.attention\.in_proj_(\w+)": r"attn_pool.qkv.\1",
    r"head\.attention\.out_proj\.(\w+)": r"attn_pool.proj.\1",
    r"head\.layernorm\.(\w+)": r"attn_pool.norm.\1",
    r"head\.mlp\.(fc[12])\.(\w+)": r"attn_pool.mlp.\1.\2",
}
_INSIDE = {
    r"(?:self_attn|attention)\.(?:attention\.|self\.)?(?:query|q_proj)\.(\w+)": r"attn.q.\1",
    r"(?:self_attn|attention)\.(?:attention\.|self\.)?(?:key|k_proj)\.(\w+)": r"attn.k.\1",
    r"(?:self_attn|attention)\.(?:attention\.|self\.)?(?:value|v_proj)\.(\w+)": r"attn.v.\1",
    r"(?:self_attn|attention)\.(?:output\.dense|o_proj|out_proj)\.(\w+)": r"attn.proj.\1",
    r"(?:attention\.)?(?:attention\.|self\.)?(?:relative_position_bias\.)?"
    r"relative_position_bias_table": "attn.relative_position_bias_table",
    r"(?:layernorm_before|layer_norm1|norm1)\.(\w+)": r"norm1.\1",
    r"(?:layernorm_after|layer_norm2|norm2)\.(\w+)": r"norm2.\1",
    r"(?:intermediate\.dense|mlp\.fc1)\.(\w+)": r"mlp.fc1.\1",
    r"(?:output\.dense|mlp\.fc2)\.(\w+)": r"mlp.fc2.\1",
    r"layer_scale([12])\.lambda1": r"ls\1.gamma",
    r"lambda_([12])": r"gamma_\1",
}
# Not in timm's graph: of the pre-training, or what transformers' classifiers do not use either.
# Of CLIP and SigLIP that is the text, and what compares images with it.
_LEFT_OUT = (
    *("embeddings.mask_token", "pooler.dense.", "embeddings.position_ids"),
    *("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias"),
)
# Before version 5 saved with BEiT and Swin: it follows from the window, as it does in timm.
_INDEX = ".relative_position_index"
# What transformers' classifiers, and its features, read of CLIP's and SigLIP's tokens: timm's
# global_pool, whether its last norm comes before, and the arguments that make a timm model so. Its
# fc_norm, behind the pooling, is none of theirs.
_Reads = tuple[str, bool, Mapping[str, Any]]
_READS: Mapping[tuple[str, str], _Reads] = {
    ("CLIP", "classifier"): ("avg", False, {"global_pool": "avg", "final_norm": False}),
    ("CLIP", "features"): ("token", True, {"global_pool": "token"}),
    ("SigLIP", "classifier"): ("avg", True, {"global_pool": "avg", "fc_norm": False}),
    ("SigLIP", "features"): ("map", True, {"global_pool": "map"}),
}
_TOKEN: _Reads = ("token", True, {"global_pool": "token"})
# The same of transformers' classes of which it is known, whatever a checkpoint was saved as.
CLASSIFIERS: Mapping[str, _Reads] = {
    "CLIPForImageClassification": _READS["CLIP", "classifier"],
    "DeiTForImageClassification": _TOKEN,
    "IJepaForImageClassification": _READS["SigLIP", "classifier"],
    "SiglipForImageClassification": _READS["SigLIP", "classifier"],
    "ViTForImageClassification": _TOKEN,
    "ViTMSNForImageClassification": _TOKEN,
}
_SAVED_FIRST = (
    " For an adapter that was trained on transformers' class with a classifier, save the "
    "checkpoint as that class first."
)
# Within the config.json of a whole CLIP or SigLIP what is the default is left out.
_TOWER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip": {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": {
        "num_attention_heads": 12,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
# Norms of Swin that have torch's epsilon whatever config.json says.
_FIXED_EPS = ("patch_embed.norm", "downsample.norm")
# Activations of config.json as timm's modules.
_ACTIVATIONS = {
    "gelu": ("GELU",),
    "gelu_new": ("GELUTanh",),
    "gelu_pytorch_tanh": ("GELUTanh",),
    "quick_gelu": ("QuickGELU",),
}
# What marks the names of OpenAI's ViTs, what its own files have beside them, and OpenCLIP's
# configuration.
_CLIP_MARK, _OPENAI = "visual.class_embedding", "input_resolution"
_OPEN_CLIP = "open_clip_config.json"


def marked(names: Iterable[str]) -> tuple[str, str] | None:
    """What stands before all of transformers' names of such a model, and the name that marks it;
    None if these are no such names."""
    found = ((name.removesuffix(m), m) for name in names for m in _MARKS if name.endswith(m))
    return next(found, None)


def is_transformers(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict has transformers' names of a ViT, DeiT, DINOv2, BEiT, Swin, CLIP or
    SigLIP."""
    return marked(state) is not None


def timm_state(
    state: Mapping[str, torch.Tensor], model: nn.Module, classifier: str, file: Path
) -> dict[str, torch.Tensor]:
    """The weights by timm's names.

    Args:
        state: as transformers saved it.
        model: of timm, for which ones.
        classifier: path of its classifier.
        file: for messages.

    Raises:
        BackboneError: tensors that no module of the timm model stands for, or a classifier that
            reads something else than timm's.
    """
    found_mark = marked(state)
    assert found_mark is not None
    prefix, mark = found_mark
    found: dict[str, torch.Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        inside = key.removeprefix(prefix)
        if inside.startswith(_LEFT_OUT) or inside.endswith(_INDEX):
            continue
        if key.startswith("classifier."):
            found[key.replace("classifier", classifier, 1)] = tensor
            continue
        name = timm_name(inside)
        if name is None:
            unknown.append(key)
        else:
            found[name] = tensor
    _check_two(unknown, file)
    if "reg_token" in found and getattr(model, "reg_token", None) is None:
        raise BackboneError(
            f"`checkpoint`: {file} has a distillation token, and {type(model).__name__} as "
            "created has no place for it: to timm it is a register. Pass "
            "`model_args={'reg_tokens': 1}`."
        )
    if unknown:
        raise BackboneError(
            f"`checkpoint`: {file} has transformers' names, and timm's {type(model).__name__} has "
            f"nothing for {abbreviate(unknown, 4)}."
            + (
                advice_on_peft(unknown)
                or " Give the directory that it was saved in as the model: transformers:DIR."
            )
        )
    if mark == _TOWER:
        found = _as_read(found, model, classifier, file)
    return _fused(found, model)


def _check_two(unknown: Sequence[str], file: Path) -> None:
    if any(key.startswith("distillation_classifier.") for key in unknown):
        raise BackboneError(
            f"`checkpoint`: {file} has two classifiers, whose answers DeiT averages (its teacher's "
            "and its own), and an adapter has one. Take them out of the file, for adapters that "
            "bring theirs."
        )


def _as_read(
    found: Mapping[str, torch.Tensor], model: nn.Module, classifier: str, file: Path
) -> dict[str, torch.Tensor]:
    """The weights of a CLIP or SigLIP tower that its classifier, or its features, depend on, in
    timm's shapes."""
    kind = "CLIP" if "norm_pre.weight" in found else "SigLIP"
    purpose = "classifier" if f"{classifier}.weight" in found else "features"
    pool, normed, args = _READS[kind, purpose]
    if reads(model) != (pool, normed, False):
        raise BackboneError(
            f"`checkpoint`: {file} is of a {kind} whose {purpose} read other tokens than the timm "
            f"model's. Pass `model_args={args}`, or give transformers:DIR as the model."
            + (_SAVED_FIRST if purpose == "features" else "")
        )
    unread = [] if pool == "map" else ["attn_pool."]
    unread += [] if normed else ["norm."]
    state = {name: t for name, t in found.items() if not name.startswith(tuple(unread))}
    for name in ("cls_token", "pos_embed"):
        if name in state:
            state[name] = state[name].reshape(1, -1, state[name].shape[-1])
    for leaf in ("weight", "bias"):
        if (packed := state.pop(f"attn_pool.qkv.{leaf}", None)) is not None:
            width = len(packed) // 3
            state[f"attn_pool.q.{leaf}"] = packed[:width]
            state[f"attn_pool.kv.{leaf}"] = packed[width:]
    return state


def reads(model: nn.Module) -> tuple[str | None, bool, bool]:
    """What the classifier of a timm model reads: its pooling, and whether a norm comes before it
    and behind it."""
    from torch import nn

    norm, late = (
        not isinstance(getattr(model, name, nn.Identity()), nn.Identity)
        for name in ("norm", "fc_norm")
    )
    return getattr(model, "global_pool", None), norm, late


def timm_name(key: str) -> str | None:
    """timm's name of one tensor of transformers', without what stands before them all; q, k and v
    are apart. None if there is none."""
    for pattern, name in _OUTSIDE.items():
        if found := re.fullmatch(pattern, key):
            return found.expand(name)
    for start, path in ((_STAGE, r"layers.\1.blocks.\2."), (_BLOCK, r"blocks.\1.")):
        block = re.match(start, key)
        for pattern, name in _INSIDE.items() if block else ():
            if block and (found := re.fullmatch(pattern, key[block.end() :])):
                return block.expand(path) + found.expand(name)
    # Swin: transformers ends a stage with what timm begins the next one.
    if found := re.fullmatch(r"encoder\.layers\.(\d+)\.downsample\.(.+)", key):
        return f"layers.{int(found[1]) + 1}.downsample.{found[2]}"
    return None


def _fused(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """q, k and v of each block in one tensor; BEiT's two biases apart, as timm has them."""
    import torch

    own = dict(model.named_parameters())
    result = {k: t for k, t in state.items() if not re.search(r"attn\.[qkv]\.\w+$", k)}
    for key in state:
        if not key.endswith("attn.q.weight"):
            continue
        path = key.removesuffix("q.weight")
        for leaf in ("weight", "bias"):
            parts = [
                state[f"{path}{part}.{leaf}"] for part in "qkv" if f"{path}{part}.{leaf}" in state
            ]
            if len(parts) == 3:
                result[f"{path}qkv.{leaf}"] = torch.cat(parts)
            elif len(parts) == 2 and f"{path}q_bias" in own:
                result[f"{path}q_bias"], result[f"{path}v_bias"] = parts
    return result


def agree(model: nn.Module, file: Path) -> tuple[tuple[str, ...], float]:
    """Make a timm model what the config.json beside its weights says, as far as weights do not.

    Its norms get the configuration's epsilon, in place.

    Args:
        model: of timm.
        file: the weights.

    Returns:
        A line about what had to be assumed, if anything; and the epsilon.

    Raises:
        BackboneError: heads or activation are not the model's, or its classifier reads something
            else than timm's.
    """
    from torch import nn

    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    if not norms:
        raise BackboneError(
            "`model_args`: expected LayerNorms, as transformers' model has, found none. Leave "
            "norm_layer out."
        )
    path, own = file.parent / "config.json", next(iter(norms.values())).eps
    try:
        config: Mapping[str, Any] = object_in(path, BackboneError)
    except FileNotFoundError:
        return (
            f"weights of transformers without their config.json: norm eps {own:g}, "
            f"{', '.join(_heads(model))} heads and timm's activation and pooling assumed",
        ), own
    config = _of_images(config, path)
    _check(model, config, path)
    if (eps := config.get("layer_norm_eps")) is None:
        return (f"{path} says no layer_norm_eps: timm's {own:g} assumed",), own
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise BackboneError(f"{path}: layer_norm_eps: expected a small number, found {eps!r}.")
    for name, norm in norms.items():
        norm.eps = norm.eps if name.endswith(_FIXED_EPS) else float(eps)
    return (), float(eps)


def agree_on_clip(
    model: nn.Module, given: Mapping[str, torch.Tensor], file: Path
) -> tuple[str, ...]:
    """Compare the activation of a timm model with that of a ViT's weights in the names of OpenAI's
    CLIP, which OpenCLIP's have as well: OpenAI's is QuickGELU, OpenCLIP's is in the configuration
    beside them (open_clip_config.json).

    Returns:
        A line about what had to be assumed, if anything; none of weights in other names.

    Raises:
        BackboneError: it is another one, or the configuration cannot be read.
    """
    if not any(name.endswith(_CLIP_MARK) for name in given):
        return ()
    acts, path = _activations(model), file.parent / _OPEN_CLIP
    if _OPENAI in given:
        activation, where = "quick_gelu", f"{file}, a file of OpenAI's CLIP"
    elif path.is_file():
        try:
            quick = object_in(path, BackboneError)["model_cfg"].get("quick_gelu", False)
        except (KeyError, AttributeError) as error:
            raise BackboneError(f"{path}: expected OpenCLIP's model_cfg, found none.") from error
        activation, where = "quick_gelu" if quick else "gelu", str(path)
    else:
        assumed = ", ".join(sorted(acts))
        return (f"weights of CLIP without their {_OPEN_CLIP}: activation {assumed} assumed",)
    if acts and not acts <= set(_ACTIVATIONS[activation]):
        raise BackboneError(
            f"{where}: the activation is {activation}, the timm model's "
            f"{', '.join(sorted(acts))}. Pass `model_args={{'act_layer': '{activation}'}}`, beside "
            "its other arguments."
        )
    return ()


def _activations(model: nn.Module) -> set[str]:
    """What the MLPs of a timm model have between their Linears."""
    return {
        type(m.act).__name__ for m in model.modules() if hasattr(m, "act") and hasattr(m, "fc1")
    }


def _of_images(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Of a CLIP's or SigLIP's configuration what is said of its tower; else all of it."""
    name = str(config.get("model_type")).removesuffix("_vision_model")
    if not isinstance(inner := config.get("vision_config", config), dict):
        raise BackboneError(f"{path}: vision_config: expected an object, found {inner!r}.")
    return {**_TOWER_DEFAULTS.get(name, {}), **inner, "model_type": name}


def _heads(model: nn.Module) -> list[str]:
    """Heads of each attention, every number once."""
    found = [m.num_heads for m in model.modules() if hasattr(m, "num_heads") and hasattr(m, "qkv")]
    return list(map(str, dict.fromkeys(found)))


def _check(model: nn.Module, config: Mapping[str, Any], path: Path) -> None:
    """Heads, activation and pooling of config.json are those of the timm model."""
    heads = config.get("num_attention_heads", config.get("num_heads"))
    stated = [str(n) for n in dict.fromkeys(heads if isinstance(heads, list) else [heads])]
    if heads is not None and stated != _heads(model):
        raise BackboneError(
            f"{path}: {', '.join(stated)} heads, the timm model has {', '.join(_heads(model))}. "
            "Pass `model_args` with the right num_heads."
        )
    activation = str(config.get("hidden_act", "gelu"))
    acts = _activations(model)
    if acts and not acts <= set(_ACTIVATIONS.get(activation, ())):
        raise BackboneError(
            f"{path}: the activation is {activation}, the timm model's {', '.join(sorted(acts))}. "
            "Pass `model_args` with the right act_layer, or give transformers:DIR as the model."
        )
    if config["model_type"] in _TOWER_DEFAULTS:
        return  # `_as_read` knows what these read
    averages = bool(config.get("use_mean_pooling", False)) or config.get("model_type") == "swin"
    if (getattr(model, "global_pool", "avg") == "avg") != averages:
        raise BackboneError(
            f"{path}: the classifier reads {'the mean of the tokens' if averages else 'a token'}, "
            f"the timm model's global_pool is {model.global_pool!r}. Pass `model_args` with the "
            "right global_pool, or give transformers:DIR as the model."
        )
