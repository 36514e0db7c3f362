"""What PEFT's LoRA, rsLoRA and HRA files mean: configuration, tensor keys, scale, reflections.

PEFT itself is not needed. An option that is not known to leave the weights at W + scale B A
(LoRA) or W R (HRA) is refused, also one that a later version of PEFT invents.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE, AdapterConfig
from hhdeploy.adapters.format import Adapter
from hhdeploy.adapters.importers.pth import read_pth
from hhdeploy.adapters.importers.template import (
    ImportOptions,
    Tensors,
    finish,
    head_keys,
    linear_of,
    low_rank_pair,
    split_thirds,
)
from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.errors import AdapterError
from hhdeploy.files.tensors import read_tensors

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone

LORA, HRA = "LORA", "HRA"
_PREFIX = "base_model.model."

# Keys of adapter_config.json that do not change what the tensors mean, or are read below.
_COMMON_KEYS = frozenset(
    """auto_mapping base_model_name_or_path bias exclude_modules inference_mode layers_pattern
    layers_to_transform modules_to_save peft_type peft_version r revision target_modules
    task_type""".split()
)
_KNOWN_KEYS = {
    LORA: _COMMON_KEYS
    | frozenset(
        """alpha_pattern ensure_weight_tying eva_config init_lora_weights lora_alpha lora_dropout
        megatron_core qalora_group_size rank_pattern runtime_config use_rslora""".split()
    ),
    HRA: _COMMON_KEYS | {"apply_GS", "init_weights"},
}
# Initialisations after which the adapter still belongs to the backbone as it was. PiSSA, OLoRA,
# CorDA, LoftQ and LoRA-GA change the base weights first.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_FACTS = (
    *("peft_type", "peft_version", "base_model_name_or_path", "r", "lora_alpha", "use_rslora"),
    *("rank_pattern", "alpha_pattern", "apply_GS"),
)
_TENSORS = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "hra_u": "hra_u"}
# What `modules_to_save` names; a raw state dict says so in the key.
_MODULES_TO_SAVE = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)")


def read_peft_config(path: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a PEFT directory. Raises `AdapterError` naming the file."""
    file = path / CONFIG_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{file} does not exist. Expected a PEFT directory ({CONFIG_FILE} and {TENSOR_FILE})."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise AdapterError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{file}: expected a JSON object, found {type(content).__name__}.")
    return content


def check_config(config: Mapping[str, Any], where: Path) -> None:
    """Refuse every method and variant whose meaning is not known for certain.

    Raises:
        AdapterError: naming ``where``, the key and its value.
    """
    kind = config.get("peft_type")
    if kind == "HTA":
        raise AdapterError(f"{where}: peft_type is HTA: this adapter needs no import.")
    if kind not in _KNOWN_KEYS:
        raise AdapterError(
            f"{where}: peft_type: expected {LORA} or {HRA}, found {kind!r}. Other methods of PEFT "
            "are not supported."
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{where}: bias: expected 'none', found {config['bias']!r}. Adapters that train the "
            "backbone's biases are not supported; train again with bias='none'."
        )
    for key, value in config.items():
        if key not in _KNOWN_KEYS[kind] and value not in (None, False, {}, []):
            raise AdapterError(
                f"{where}: {key}: expected it off, found {value!r}. This variant of {kind} is not "
                f"a plain {'product with the weight' if kind == HRA else 'low-rank sum'} and is "
                "not supported."
            )
    init = config.get("init_lora_weights", True)
    if kind == LORA and init not in _PLAIN_INITS:
        raise AdapterError(
            f"{where}: init_lora_weights: expected true, found {init!r}. It changed the backbone's "
            "weights before training; save the adapter again as plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion."
        )


def facts_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the imported adapter remembers of its PEFT configuration."""
    kept = {key: config[key] for key in _FACTS if config.get(key) is not None}
    return {"format": "peft", **kept}


def group_tensors(
    tensors: Mapping[str, NDArray[Any]], file: Path, head_keys: Collection[str], prefix: str
) -> tuple[dict[str, dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    """Tensors by module path and name (``lora_A``, ``lora_B``, ``hra_u``), and the classifier's.

    Raises:
        AdapterError: a key without PEFT's prefix, or one that is neither.
    """
    groups: dict[str, dict[str, NDArray[Any]]] = {}
    head: dict[str, NDArray[Any]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX + prefix):
            raise AdapterError(f"{file}: {key}: expected keys that start with {_PREFIX + prefix}")
        name = _MODULES_TO_SAVE.sub("", key.removeprefix(_PREFIX + prefix))
        ending = next((e for e in _TENSORS if name.endswith(f".{e}")), None)
        if name in head_keys:
            head[name] = tensor
        elif ending is not None:
            groups.setdefault(name.removesuffix(f".{ending}"), {})[_TENSORS[ending]] = tensor
        else:
            raise AdapterError(
                f"{file}: unknown tensor key {key}. Expected <site>.lora_A.weight, "
                f".lora_B.weight or .hra_u, and of the modules to save the classifier alone "
                f"({', '.join(head_keys)})."
            )
    return groups, head


def lora_scale(config: Mapping[str, Any], module: str, rank: int, where: Path) -> float:
    """PEFT's factor of lora_B lora_A: alpha / r, or alpha / sqrt(r) for rsLoRA.

    Args:
        config: the PEFT configuration; its ``rank_pattern`` and ``alpha_pattern`` map regular
            expressions for the end of a module path to a rank or an alpha of its own.
        module: path of the adapted module.
        rank: rows of its lora_A; must be what the configuration says.
        where: for messages.

    Source: PEFT, ``tuners/lora/layer.py`` and ``utils.get_pattern_key``; rsLoRA, arXiv 2312.03732.
    """
    expected = _pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if rank != expected or rank < 1:
        raise AdapterError(
            f"{where}: {module}: expected rank {expected} (r and rank_pattern), found {rank} rows "
            "of lora_A."
        )
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise AdapterError(f"{where}: lora_alpha: expected a number, found {alpha!r}.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def hra_low_rank(
    u: NDArray[np.float64], *, gram_schmidt: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A (r, in) and C (in, r), float64, with R = I + C A for HRA's R, so that W R = W + (W C) A.

    Without Gram-Schmidt R = H_1 H_2 ... H_r of the normalised columns of ``u`` (in, r), each
    H = I - 2 u uᵀ; with it R = I - 2 Q Qᵀ of the orthonormalised columns.

    Raises:
        ValueError: columns that are not finite, zero, or linearly dependent with Gram-Schmidt.

    Source: HRA, arXiv 2405.17484; PEFT, ``tuners/hra/layer.py``.
    """
    unit, c = np.zeros_like(u), np.zeros_like(u)
    for k in range(u.shape[1]):
        column = u[:, k].copy()
        if gram_schmidt:
            for j in range(k):
                column -= (unit[:, j] @ column) * unit[:, j]
        norm, whole = float(np.linalg.norm(column)), float(np.linalg.norm(u[:, k]))
        # Below 1e-7 of the column (float32's resolution) its direction is rounding noise.
        if not math.isfinite(whole) or not norm > 1e-7 * whole:
            raise ValueError(f"column {k} is zero, not finite or depends on the ones before it.")
        unit[:, k] = column / norm
        # R_k = R_{k-1} (I - 2 u uᵀ) = R_{k-1} - 2 (R_{k-1} u) uᵀ, with R_{k-1} = I + C Aᵀ so far.
        # Orthonormal columns make the product over j vanish: that is I - 2 Q Qᵀ.
        c[:, k] = -2.0 * (unit[:, k] + c[:, :k] @ (unit[:, :k].T @ unit[:, k]))
    return unit.T, c


_OLD_TENSOR_FILE = "adapter_model.bin"


def import_peft(path: Path, backbone: Backbone, options: ImportOptions) -> Adapter:
    """Convert a directory of PEFT (LoRA or HRA); see `import_adapter`.

    Raises:
        AdapterError: options that are for .pth files, HRA without the backbone's weights, or
            anything in the directory that is not known for certain.
    """
    if options.form is not None or options.reflection is not None or options.lora_scale != 1.0:
        raise AdapterError(
            f"{path}: form, reflection and lora scale are for .pth files; {CONFIG_FILE} says all "
            "that an adapter of PEFT needs."
        )
    config = read_peft_config(path)
    where = path / CONFIG_FILE
    check_config(config, where)
    kind = config["peft_type"]
    if kind == HRA and not options.weights_known:
        raise AdapterError(
            f"{where}: HRA multiplies the backbone's weights and cannot be converted without "
            "them. Pass them with `checkpoint`."
        )
    file = path / TENSOR_FILE
    if file.is_file() or not (path / _OLD_TENSOR_FILE).is_file():
        tensors, _ = read_tensors(file, AdapterError)
    else:
        file = path / _OLD_TENSOR_FILE
        tensors = read_pth(file)
    groups, head = group_tensors(tensors, file, head_keys(backbone), options.prefix)
    linears = {linear.path: linear for linear in backbone.facts.linears}
    result: Tensors = dict(head)
    for name, group in groups.items():
        linear = linear_of(linears, name, file, backbone)
        if kind == LORA:
            a, b = low_rank_pair(group, name, file)
            # A wrong shape is no rank: it is refused just below.
            scale = lora_scale(config, name, a.shape[0], where) if a.ndim == 2 else 1.0
            b = b.astype(np.float64) * scale
        else:
            a, b = _hra_pair(group, linear, file, backbone, bool(config.get("apply_GS")))
        result |= split_thirds(linear, a, b, file)
    rank = config.get("r")
    described = AdapterConfig(
        backbone.facts.model,
        r=rank if isinstance(rank, int) else 1,
        extra={"imported_from": facts_of(config)},
    )
    return finish(result, described, file, backbone, options)


def _hra_pair(
    group: Tensors, linear: LinearSpec, file: Path, backbone: Backbone, gram_schmidt: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """lora_A, lora_B with W R = W + lora_B lora_A; the thirds of a fused qkv share R."""
    u = group.get("hra_u")
    if u is None or len(group) != 1 or u.ndim != 2 or u.shape[0] != linear.in_:
        found = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(group.items()))
        raise AdapterError(
            f"{file}: {linear.path}: expected hra_u of shape [{linear.in_}, r], found {found}."
        )
    try:
        a, c = hra_low_rank(u.astype(np.float64), gram_schmidt=gram_schmidt)
    except ValueError as error:
        raise AdapterError(f"{file}: {linear.path}.hra_u: {error}") from error
    parameter = backbone.model.get_submodule(linear.path).get_parameter("weight")
    weight: NDArray[np.float64] = parameter.detach().double().cpu().numpy()
    return a, weight @ c
