"""Adapter directories: ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT's layout).

Everything that can be checked without the backbone is checked here, loudly; what needs the
backbone (site names, sizes, digest) is checked by `hhdeploy.plan` and by the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.algebra import (
    REFLECTIONS,
    Reflection,
    SiteDelta,
    householder_delta,
    low_rank_delta,
)
from hhdeploy.errors import AdapterError
from hhdeploy.files.directories import Replaceable, atomic_directory
from hhdeploy.files.tensors import read_tensors, tensor_bytes
from hhdeploy.files.writing import json_bytes, write_bytes
from hhdeploy.preprocess import Preprocess
from hhdeploy.sites import FORMS, KINDS, SEQUENTIAL_KINDS, Form

SCHEMA_VERSION = 1
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
# Of `train`: the only file of a linear probe.
METRICS_FILE = "metrics.json"

# Further arguments of timm.create_model that an adapter or a user may name: those that shape
# the architecture. Anything else (checkpoint paths, callables) has no place in a file that
# comes from elsewhere.
BASE_MODEL_ARGS = frozenset(
    {
        "img_size",
        "patch_size",
        "in_chans",
        "num_classes",
        "global_pool",
        "class_token",
        "no_embed_class",
        "reg_tokens",
        "embed_dim",
        "depth",
        "depths",
        "num_heads",
        "mlp_ratio",
        "qkv_bias",
        "init_values",
        "pre_norm",
        "final_norm",
        "fc_norm",
        "window_size",
        "swiglu_mlp",
        "scale_mlp",
        "use_rot_pos_emb",
        "use_abs_pos_emb",
        "dynamic_img_size",
        "dynamic_img_pad",
        "num_reg_tokens",
    }
)

_HTA_TENSORS = ("u", "v", "d")
_LORA_TENSORS = ("lora_A", "lora_B")
_HEAD_TENSORS = ("weight", "bias")


@dataclass(frozen=True)
class AdapterConfig:
    """What ``adapter_config.json`` says; see `load_adapter` for the checks.

    Attributes:
        base_model: timm name, with or without ``.tag``.
        form: ``additive`` or ``sequential``.
        reflection: ``unnormalized`` or ``orthogonal``.
        r: default rank of the low-rank term; the tensors' shapes decide.
        target_modules: kinds (q, k, v, proj, fc1, fc2) or full site names.
        base_model_args: further arguments of ``timm.create_model``.
        base_sha256: digest of the frozen weights, None if unknown.
        num_classes: classes of the adapter's head, None without one.
        class_names: one per class, or None.
        preprocess: how images become inputs, None if unknown.
        extra: JSON keys that this version does not know, kept as they are.
    """

    base_model: str
    form: Form = "additive"
    reflection: Reflection = "unnormalized"
    r: int = 1
    target_modules: tuple[str, ...] = ("q", "k", "v", "proj")
    base_model_args: Mapping[str, Any] = field(default_factory=dict)
    base_sha256: str | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON form, in the order of the format's description."""
        return {
            "peft_type": "HTA",
            "schema_version": SCHEMA_VERSION,
            "base_model_name_or_path": self.base_model,
            "base_model_args": dict(self.base_model_args),
            "base_sha256": self.base_sha256,
            "form": self.form,
            "reflection": self.reflection,
            "r": self.r,
            "target_modules": list(self.target_modules),
            "num_classes": self.num_classes,
            "class_names": list(self.class_names) if self.class_names is not None else None,
            "preprocess": self.preprocess.to_json() if self.preprocess else None,
            **self.extra,
        }


@dataclass(frozen=True)
class SiteTensors:
    """The trained tensors of one site, float32; either group may be absent (None).

    Attributes:
        u: (out,), v: (in,), d: (min(out, in),): the Householder part.
        lora_A: (r, in), lora_B: (out, r): the low-rank part.
    """

    u: NDArray[np.float32] | None = None
    v: NDArray[np.float32] | None = None
    d: NDArray[np.float32] | None = None
    lora_A: NDArray[np.float32] | None = None  # noqa: N815  (PEFT's tensor names)
    lora_B: NDArray[np.float32] | None = None  # noqa: N815

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the site's matrix."""
        if self.u is not None and self.v is not None:
            return self.u.size, self.v.size
        assert self.lora_A is not None and self.lora_B is not None
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        tensors = (self.u, self.v, self.d, self.lora_A, self.lora_B)
        return sum(t.size for t in tensors if t is not None)


@dataclass(frozen=True)
class Head:
    """A trained classifier: float32 weight (classes, dim) and bias (classes,).

    Attributes:
        path: timm's module path of the classifier, e.g. ``head`` or ``head.fc``.
    """

    path: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True)
class Adapter:
    """One adapter: its configuration, the tensors of its sites, and its head if it has one."""

    config: AdapterConfig
    sites: Mapping[str, SiteTensors]
    head: Head | None
    source: str = "<memory>"

    @property
    def parameters(self) -> int:
        """Trained values before the head, the count that the paper's tables give."""
        return sum(site.parameters for site in self.sites.values())

    @property
    def form(self) -> Form:
        """``additive`` or ``sequential``."""
        return self.config.form

    def delta(self, site: str) -> SiteDelta:
        """Canonical float64 delta of one site: added to W (additive), or M (sequential)."""
        t = self.sites[site]
        out, into = t.shape
        lora_a = np.zeros((0, into)) if t.lora_A is None else t.lora_A.astype(np.float64)
        lora_b = np.zeros((out, 0)) if t.lora_B is None else t.lora_B.astype(np.float64)
        if t.u is None or t.v is None or t.d is None:
            return low_rank_delta(lora_a, lora_b)
        u, v, d = (x.astype(np.float64) for x in (t.u, t.v, t.d))
        return householder_delta(u, v, d, lora_a, lora_b, self.config.reflection)


def load_adapter(directory: str | Path) -> Adapter:
    """Read and check an adapter directory.

    Nothing is unpickled; tensors may be float32, float16 or bfloat16 and are widened.

    Raises:
        AdapterError: naming file, key, what was expected and what was found, for a missing or
            truncated file, a newer schema version, unknown or missing tensor keys, wrong
            shapes, NaN or infinity.
    """
    path = Path(directory)
    if not path.is_dir():
        raise AdapterError(
            f"{path} is not a directory. Expected an adapter directory with {CONFIG_FILE} and "
            f"{TENSOR_FILE}."
        )
    config = _read_config(path / CONFIG_FILE)
    tensors, _ = read_tensors(path / TENSOR_FILE, AdapterError)
    return assemble_adapter(config, tensors, path / TENSOR_FILE, str(path))


def save_adapter(adapter: Adapter, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write an adapter directory, atomically; it is read back and checked first.

    Raises:
        WriteError: when the directory exists (without ``overwrite``) or cannot be written.
        AdapterError: when the adapter would not pass the reader's checks.
    """
    with atomic_directory(Path(directory), overwrite=overwrite, kind=ADAPTER) as scratch:
        write_bytes(scratch / CONFIG_FILE, json_bytes(adapter.config.to_json()))
        write_bytes(scratch / TENSOR_FILE, tensor_bytes(_tensors_of(adapter), {"format": "pt"}))
        load_adapter(scratch)


def _foreign(path: Path) -> str | None:
    """Why a directory is neither an adapter nor a linear probe of `train`, or None."""
    found = {entry.name for entry in path.iterdir()}
    if found == {METRICS_FILE}:
        return None
    try:
        _read_config(path / CONFIG_FILE)
    except AdapterError:
        return f"it has no {CONFIG_FILE} of peft_type HTA that can be read"
    other = sorted(found - {CONFIG_FILE, TENSOR_FILE, METRICS_FILE})
    return f"it holds {', '.join(other[:3])}, which no adapter has" if other else None


# What `import`, `train` and `save_adapter` may replace.
ADAPTER = Replaceable("an adapter directory", _foreign)


def _tensors_of(adapter: Adapter) -> dict[str, NDArray[np.float32]]:
    tensors = {}
    for name, site in adapter.sites.items():
        for key in (*_HTA_TENSORS, *_LORA_TENSORS):
            value = getattr(site, key)
            if value is not None:
                tensors[f"{name}.{key}"] = value
    if adapter.head is not None:
        tensors[f"{adapter.head.path}.weight"] = adapter.head.weight
        tensors[f"{adapter.head.path}.bias"] = adapter.head.bias
    return tensors


def _read_config(path: Path) -> AdapterConfig:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{path} does not exist. An adapter directory holds {CONFIG_FILE} and {TENSOR_FILE}."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return parse_config(content, str(path))


def parse_config(content: Mapping[str, Any], where: str) -> AdapterConfig:
    """Check the JSON form of a configuration. Raises `AdapterError` naming ``where`` and key."""

    def fail(key: str, expected: str) -> AdapterError:
        return AdapterError(f"{where}: {key}: expected {expected}, found {content.get(key)!r}.")

    known = set(AdapterConfig("x").to_json())
    if content.get("peft_type") != "HTA":
        raise AdapterError(
            f"{where}: peft_type: expected 'HTA', found {content.get('peft_type')!r}. Adapters of "
            "PEFT (LoRA, HRA) are converted with: hhdeploy adapter import"
        )
    version = content.get("schema_version")
    if not isinstance(version, int) or not _is_count(version):
        raise fail("schema_version", f"an integer up to {SCHEMA_VERSION}")
    if version > SCHEMA_VERSION:
        raise AdapterError(
            f"{where}: schema_version: expected at most {SCHEMA_VERSION}, found {version}. The "
            "adapter was written by a newer hhdeploy: upgrade with pip install -U hhdeploy."
        )
    base_model = content.get("base_model_name_or_path")
    if not isinstance(base_model, str) or not base_model:
        raise fail("base_model_name_or_path", "the name of a timm model")
    args = content.get("base_model_args") or {}
    if not isinstance(args, dict) or (unknown := set(args) - BASE_MODEL_ARGS):
        detail = f" (not allowed: {', '.join(sorted(unknown))})" if isinstance(args, dict) else ""
        raise fail(
            "base_model_args", f"arguments among {', '.join(sorted(BASE_MODEL_ARGS))}{detail}"
        )
    form = content.get("form", "additive")
    if form not in FORMS:
        raise fail("form", f"one of {', '.join(FORMS)}")
    if content.get("reflection", "unnormalized") not in REFLECTIONS:
        raise fail("reflection", f"one of {', '.join(REFLECTIONS)}")
    if not _is_count(content.get("r", 1)):
        raise fail("r", "a rank of 0 or more")
    targets = content.get("target_modules", ["q", "k", "v", "proj"])
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise fail("target_modules", f"a list of {', '.join(KINDS)} or site names")
    allowed = SEQUENTIAL_KINDS if form == "sequential" else KINDS
    for target in targets:
        if "." not in target and target not in allowed:
            raise fail("target_modules", f"{', '.join(allowed)} or site names (form {form})")
    num_classes, class_names = content.get("num_classes"), content.get("class_names")
    if num_classes is not None and (not _is_count(num_classes) or num_classes == 0):
        raise fail("num_classes", "a positive integer or null")
    if class_names is not None:
        if not isinstance(class_names, list) or not all(isinstance(n, str) for n in class_names):
            raise fail("class_names", "a list of strings or null")
        if num_classes is not None and len(class_names) != num_classes:
            raise AdapterError(
                f"{where}: class_names: expected {num_classes} names (num_classes), "
                f"found {len(class_names)}."
            )
    base_sha256 = content.get("base_sha256")
    if base_sha256 is not None and not isinstance(base_sha256, str):
        raise fail("base_sha256", "64 hex digits or null")
    return AdapterConfig(
        base_model=base_model,
        form=form,
        reflection=content.get("reflection", "unnormalized"),
        r=content.get("r", 1),
        target_modules=tuple(targets),
        base_model_args=args,
        base_sha256=base_sha256,
        num_classes=num_classes,
        class_names=tuple(class_names) if class_names is not None else None,
        preprocess=_parse_preprocess(content, where, args),
        extra={key: value for key, value in content.items() if key not in known},
    )


def _parse_preprocess(
    content: Mapping[str, Any], where: str, args: Mapping[str, Any]
) -> Preprocess | None:
    if content.get("preprocess") is None:
        return None
    try:
        preprocess = Preprocess.from_json(content["preprocess"])
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{where}: {error}") from error
    img_size = args.get("img_size")
    if img_size is not None:
        expected = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if preprocess.input_size[1:] != expected:
            raise AdapterError(
                f"{where}: the image sizes disagree: base_model_args.img_size is {img_size}, "
                f"preprocess.input_size is {list(preprocess.input_size)}."
            )
    return preprocess


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def assemble_adapter(
    config: AdapterConfig, tensors: Mapping[str, NDArray[Any]], where: Path, source: str
) -> Adapter:
    """An adapter from its tensors by key, with the checks of `load_adapter`.

    Raises:
        AdapterError: naming ``where`` (the tensors' file) and the key.
    """
    groups: dict[str, dict[str, NDArray[np.float32]]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition(".")
        if not owner or name not in (*_HTA_TENSORS, *_LORA_TENSORS, *_HEAD_TENSORS):
            raise AdapterError(
                f"{where}: unknown tensor key {key!r}. Expected <site>.u, .v, .d, .lora_A or "
                ".lora_B, and the classifier's .weight and .bias."
            )
        if not np.issubdtype(tensor.dtype, np.floating):
            raise AdapterError(f"{where}: {key}: expected a float tensor, found {tensor.dtype}.")
        with np.errstate(over="ignore"):  # a float64 beyond float32's range is reported below
            tensor = tensor.astype(np.float32)
        bad = tensor.size - int(np.count_nonzero(np.isfinite(tensor)))
        if bad:
            raise AdapterError(
                f"{where}: {key}: expected finite values, found NaN or infinity in {bad} of "
                f"{tensor.size}. The training probably diverged."
            )
        groups.setdefault(owner, {})[name] = tensor
    heads = {o: g for o, g in groups.items() if not set(g).isdisjoint(_HEAD_TENSORS)}
    if len(heads) > 1:
        raise AdapterError(
            f"{where}: expected one classifier, found {', '.join(sorted(heads))}. Heads of several "
            "Linears (distilled models) are not supported."
        )
    sites = {o: _site(o, g, where) for o, g in groups.items() if o not in heads}
    if not sites:
        raise AdapterError(
            f"{where}: zero sites found. Expected tensors such as "
            "blocks.0.attn.proj.u; an adapter without a single delta is refused."
        )
    head = _head(heads, config, where)
    return Adapter(_with_classes(config, head, source), sites, head, source)


def _site(name: str, group: Mapping[str, NDArray[np.float32]], where: Path) -> SiteTensors:
    for wanted in (_HTA_TENSORS, _LORA_TENSORS):
        present = [t for t in wanted if t in group]
        if present and len(present) < len(wanted):
            missing = [f"{name}.{t}" for t in wanted if t not in group]
            raise AdapterError(
                f"{where}: missing tensor key {', '.join(missing)}; found "
                f"{', '.join(f'{name}.{t}' for t in present)}, which need it."
            )
    for tensor, value in group.items():
        if value.ndim != (dims := 2 if tensor in _LORA_TENSORS else 1):
            raise AdapterError(
                f"{where}: {name}.{tensor}: expected {dims} dimension{'s' * (dims > 1)}, "
                f"found {list(value.shape)}."
            )
    site = SiteTensors(**group)
    out, into = site.shape
    expected: dict[str, tuple[int, ...]] = {"u": (out,), "v": (into,), "d": (min(out, into),)}
    if "lora_A" in group:
        r = group["lora_A"].shape[0]
        expected |= {"lora_A": (r, into), "lora_B": (out, r)}
    for tensor, value in group.items():
        if value.shape != expected[tensor]:
            raise AdapterError(
                f"{where}: {name}.{tensor}: expected shape {list(expected[tensor])} to fit the "
                f"site's other tensors, found {list(value.shape)}."
            )
    return site


def _head(
    heads: Mapping[str, Mapping[str, NDArray[np.float32]]], config: AdapterConfig, where: Path
) -> Head | None:
    if not heads:
        return None
    ((path, group),) = heads.items()
    if set(group) - set(_HEAD_TENSORS) or "weight" not in group:
        raise AdapterError(
            f"{where}: {path}: expected a classifier's .weight and .bias, found "
            f"{', '.join(sorted(f'{path}.{n}' for n in group))}."
        )
    weight = group["weight"]
    if weight.ndim != 2:
        raise AdapterError(
            f"{where}: {path}.weight: expected shape [classes, dim], found {list(weight.shape)}."
        )
    classes = config.num_classes if config.num_classes is not None else weight.shape[0]
    if weight.shape[0] != classes:
        raise AdapterError(
            f"{where}: {path}.weight: expected {classes} rows (num_classes), "
            f"found {weight.shape[0]}."
        )
    bias = group.get("bias", np.zeros(classes, np.float32))
    if bias.shape != (classes,):
        raise AdapterError(
            f"{where}: {path}.bias: expected shape [{classes}], found {list(bias.shape)}."
        )
    return Head(path, weight, bias)


def _with_classes(config: AdapterConfig, head: Head | None, source: str) -> AdapterConfig:
    """num_classes filled in from the head's rows where the file left it out."""
    if head is None or config.num_classes is not None:
        return config
    classes = head.weight.shape[0]
    if config.class_names is not None and len(config.class_names) != classes:
        raise AdapterError(
            f"{source}: class_names: expected {classes} names (rows of the head), "
            f"found {len(config.class_names)}."
        )
    return replace(config, num_classes=classes)
