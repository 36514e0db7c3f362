"""What LoRA's, rsLoRA's and HRA's tensors mean. PEFT itself is not needed for these three.

An option that is not known to leave the weights at W + scale B A (LoRA) or W R (HRA) is a case
for PEFT itself (`hhdeploy.adapters.importers.merging`), also one that a later version invents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import CONFIG_FILE
from hhdeploy.adapters.importers.targets import pattern_value
from hhdeploy.adapters.importers.template import Tensors, low_rank_pair
from hhdeploy.algebra import Array
from hhdeploy.errors import AdapterError

LORA, HRA = "LORA", "HRA"

# Keys of adapter_config.json that do not change what the tensors mean, or are read.
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
# Initialisations after which the adapter still belongs to the backbone as it was.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Of |B| |A|: float32 leaves 1e-7 of a product that is none, as PEFT's orthogonal start.
_NO_PRODUCT = 1e-6

_TENSOR = re.compile(r"(?P<module>.+)\.(?:(?P<pair>lora_[AB])\.weight|(?P<hra>hra_u))")


@dataclass(frozen=True)
class TunedTensor:
    """A tensor of LoRA or HRA: of which module, and which one."""

    module: str
    name: str


def tuned_tensor(key: str) -> TunedTensor | None:
    """What a key says, None if it is no tensor of LoRA or HRA."""
    found = _TENSOR.fullmatch(key)
    if found is None:
        return None
    return TunedTensor(found["module"], found["pair"] or found["hra"])


def tuned_groups(tuned: Tensors, file: Path) -> dict[str, Tensors]:
    """Tensors of LoRA or HRA by module path of the file and name."""
    groups: dict[str, Tensors] = {}
    for key, tensor in tuned.items():
        found = tuned_tensor(key)
        if found is None:
            raise AdapterError(
                f"{file}: unknown tensor key {key}. Expected <module>.lora_A.weight, "
                ".lora_B.weight or .hra_u, and what modules_to_save and bias name."
            )
        check_float(key, tensor, file)
        groups.setdefault(found.module, {})[found.name] = tensor
    return groups


def check_float(key: str, tensor: NDArray[Any], file: Path) -> None:
    """Raise `AdapterError` for whole numbers where an adapter has weights."""
    if tensor.dtype.kind != "f":
        raise AdapterError(
            f"{file}: {key}: expected a float tensor, found {tensor.dtype}, as quantisation leaves "
            "it. Bring the tensors as they were trained."
        )


def unknown_option(config: Mapping[str, Any]) -> str | None:
    """What is not known to leave the weights at W + scale B A or W R; None: all is known."""
    kind = config.get("peft_type")
    if kind not in _KNOWN_KEYS:
        return f"peft_type {kind}"
    for key, value in config.items():
        if key not in _KNOWN_KEYS[kind] and value not in (None, False, {}, []):
            return f"{key} {value!r}"
    init = initialisation(config)
    if kind == LORA and init not in _PLAIN_INITS:
        return f"init_lora_weights {init!r}"
    return None


def initialisation(config: Mapping[str, Any]) -> object:
    """What LoRA began with, in lower case: PEFT takes some of the names in any."""
    init = config.get("init_lora_weights", True)
    return init.lower() if isinstance(init, str) else init


def low_rank_of(
    config: Mapping[str, Any], module: str, group: Tensors, weight: Array | None, file: Path
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A (r, in) and B (out, r), float64, with W' = W + B A; a kernel counts as (out, in kh kw).

    Args:
        config: of PEFT.
        module: path of the adapted module as the configuration's patterns know it.
        group: its tensors by name.
        weight: of the module, (out, in kh kw); HRA multiplies it.
        file: for messages.

    Raises:
        AdapterError: tensors that are missing or do not fit each other, or another rank.
    """
    if config["peft_type"] == HRA:
        assert weight is not None
        return _hra_pair(group, module, weight, file, bool(config.get("apply_GS")))
    a, b = low_rank_pair(group, module, file)
    a, b = (t.reshape(t.shape[0], -1).astype(np.float64) if t.ndim > 2 else t for t in (a, b))
    where = file.with_name(CONFIG_FILE)
    if a.ndim == b.ndim == 2 and b.shape[1] != a.shape[0]:
        raise AdapterError(
            f"{file}: {module}: expected lora_A [r, in] and lora_B [out, r] of one rank, found "
            f"{list(a.shape)} and {list(b.shape)}. Save it whole; LoRA of a convolution in "
            "groups has no product that could be merged: leave such modules out of its targets."
        )
    # A wrong shape is no rank: whoever adds the product refuses it.
    scale = lora_scale(config, module, a.shape[0], where) if a.ndim == 2 else 1.0
    return a.astype(np.float64), b.astype(np.float64) * scale


def changes_weight(a: Array, b: Array) -> bool:
    """Whether B A is more than what rounding leaves of an adapter that never learnt anything."""
    return bool(np.linalg.norm(b @ a) > _NO_PRODUCT * np.linalg.norm(a) * np.linalg.norm(b))


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
    expected = pattern_value(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if rank != expected or rank < 1:
        raise AdapterError(
            f"{where}: {module}: expected rank {expected} (r and rank_pattern), found {rank} rows "
            "of lora_A."
        )
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise AdapterError(f"{where}: lora_alpha: expected a number, found {alpha!r}.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _hra_pair(
    group: Tensors, module: str, weight: Array, file: Path, gram_schmidt: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """W R = W + B A; the thirds of a fused qkv share R."""
    u = group.get("hra_u")
    if u is None or len(group) != 1 or u.ndim != 2 or u.shape[0] != weight.shape[1]:
        found = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(group.items()))
        raise AdapterError(
            f"{file}: {module}: expected hra_u of shape [{weight.shape[1]}, r], found {found}."
        )
    try:
        a, c = hra_low_rank(u.astype(np.float64), gram_schmidt=gram_schmidt)
    except ValueError as error:
        raise AdapterError(f"{file}: {module}.hra_u: {error}") from error
    return a, weight @ c


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
