"""Adapter directories: ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT's layout).

Everything that can be checked without the backbone is checked here, loudly; what needs the
backbone (site names, sizes, digest) is checked by `hhdeploy.adapters.checks` and by the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import (
    CONFIG_FILE,
    TENSOR_FILE,
    AdapterConfig,
    check_class_names,
    check_problem_type,
    read_config,
)
from hhdeploy.adapters.directory import ADAPTER
from hhdeploy.adapters.made import check_parts, writable_config
from hhdeploy.algebra import (
    Array,
    Scales,
    SiteChange,
    SiteDelta,
    householder_delta,
    low_rank_delta,
)
from hhdeploy.backbones.sites import Form
from hhdeploy.choices import of_kind, yes_or_no
from hhdeploy.errors import AdapterError
from hhdeploy.files.directories import atomic_directory
from hhdeploy.files.tensors import ByContent, check_finite, read_tensors, tensor_bytes
from hhdeploy.files.writing import as_path, is_folder, json_bytes, write_bytes

_HTA_TENSORS = ("u", "v", "d")
_LORA_TENSORS = ("lora_A", "lora_B")
_HEAD_TENSORS = ("weight", "bias")
# Of a parameter of the backbone: what it becomes.
_VALUE = "value"

# What an adapter may do at a site beside a matrix: multiply the Linear's input and its product,
# add to its bias. A row of a bank has room for it where it is asked for.
Part = Literal["s_in", "s_out", "db"]
PARTS: tuple[Part, ...] = get_args(Part)
_SITE_TENSORS = (*_HTA_TENSORS, *_LORA_TENSORS, *PARTS)


@dataclass(frozen=True, eq=False)
class SiteTensors(ByContent):
    """The trained tensors of one site, float32; any group may be absent (None).

    Attributes:
        u: (out,), v: (in,), d: (min(out, in),): the Householder part.
        lora_A: (r, in), lora_B: (out, r): the low-rank part.
        s_in: (in,), s_out: (out,): multipliers of the Linear's input and product, as trained.
        db: (out,): added to the bias. These three are the Linear's own also in the sequential
            form, whose matrix is out x out.
    """

    u: NDArray[np.float32] | None = None
    v: NDArray[np.float32] | None = None
    d: NDArray[np.float32] | None = None
    lora_A: NDArray[np.float32] | None = None  # noqa: N815  (PEFT's tensor names)
    lora_B: NDArray[np.float32] | None = None  # noqa: N815
    s_in: NDArray[np.float32] | None = None
    s_out: NDArray[np.float32] | None = None
    db: NDArray[np.float32] | None = None

    @property
    def shape(self) -> tuple[int, int] | None:
        """(out, in) of the site's matrix, None without one."""
        if self.u is not None and self.v is not None:
            return self.u.size, self.v.size
        if self.lora_A is None or self.lora_B is None:
            return None
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def parts(self) -> dict[Part, NDArray[np.float32]]:
        """What there is of s_in, s_out and db, in this order."""
        return {name: t for name in PARTS if (t := getattr(self, name)) is not None}

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(t.size for name in _SITE_TENSORS if (t := getattr(self, name)) is not None)


@dataclass(frozen=True, eq=False)
class Head(ByContent):
    """A trained classifier: float32 weight (classes, dim) and bias (classes,).

    Attributes:
        path: timm's module path of the classifier, e.g. ``head`` or ``head.fc``.
    """

    path: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Adapter(ByContent):
    """One adapter.

    Attributes:
        config: its configuration.
        sites: the tensors of its sites.
        head: its classifier, None without one.
        source: the directory it was read from.
        values: parameter path -> what that parameter of the backbone becomes (norms, convolutions,
            dense weights): no row holds it, so the adapter can only be folded.
        strength: what `change` and `delta` multiply all that the adapter does to the backbone by,
            the classifier excepted; a bundle's entry says it, the adapter's files do not. For
            ``values`` see `replaced`. See `hhdeploy.adapters.mixing.at_strength`.
    """

    config: AdapterConfig
    sites: Mapping[str, SiteTensors]
    head: Head | None
    source: str = "<memory>"
    values: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    strength: float = 1.0

    @property
    def parameters(self) -> int:
        """Trained values before the head, the count that the paper's tables give."""
        sites = sum(site.parameters for site in self.sites.values())
        return sites + sum(value.size for value in self.values.values())

    @property
    def form(self) -> Form:
        """``additive`` or ``sequential``."""
        return self.config.form

    @property
    def schema_version(self) -> int:
        """The least version of the format that has all that is in the adapter."""
        more = self.values or self.config.fold_only or any(s.parts for s in self.sites.values())
        return 2 if more else 1

    def change(self, site: str) -> SiteChange:
        """All that the adapter does at one site, in float64."""
        part = self.sites[site].parts
        wide: dict[str, Array] = {
            name: 1.0 + self.strength * (part[name].astype(np.float64) - 1.0)
            for name in ("s_in", "s_out")
            if name in part
        }
        db = part.get("db")
        added = None if db is None else self.strength * db.astype(np.float64)
        return SiteChange(self.delta(site), Scales(wide.get("s_in"), wide.get("s_out")), added)

    def replaced(self, path: str, frozen: Array) -> Array:
        """What a parameter of ``values`` becomes, in float64: at less than the full strength
        between the backbone's own, ``frozen``, and the new one."""
        value = self.values[path].astype(np.float64)
        return value if self.strength == 1.0 else frozen + self.strength * (value - frozen)

    def delta(self, site: str) -> SiteDelta | None:
        """Canonical float64 delta of one site: added to W (additive), or M (sequential).

        None where the adapter has no matrix.
        """
        t = self.sites[site]
        if t.shape is None:
            return None
        out, into = t.shape
        lora_a = np.zeros((0, into)) if t.lora_A is None else t.lora_A.astype(np.float64)
        lora_b = np.zeros((out, 0)) if t.lora_B is None else t.lora_B.astype(np.float64)
        if t.u is None or t.v is None or t.d is None:
            delta = low_rank_delta(lora_a, lora_b)
        else:
            u, v, d = (x.astype(np.float64) for x in (t.u, t.v, t.d))
            delta = householder_delta(u, v, d, lora_a, lora_b, self.config.reflection)
        return delta.times(self.strength, around_identity=self.form == "sequential")


def load_adapter(directory: str | Path) -> Adapter:
    """Read and check an adapter directory.

    Nothing is unpickled; tensors may be float32, float16 or bfloat16 and are widened.

    Raises:
        AdapterError: naming file, key, what was expected and what was found, for a missing or
            truncated file, a newer schema version, unknown or missing tensor keys, wrong
            shapes, NaN or infinity.
    """
    path = as_path(directory, "directory")
    if not is_folder(path, AdapterError):
        raise AdapterError(
            f"{path} is not a directory. Expected an adapter directory with {CONFIG_FILE} and "
            f"{TENSOR_FILE}."
        )
    config = read_config(path / CONFIG_FILE)
    tensors, _ = read_tensors(path / TENSOR_FILE, AdapterError)
    return assemble_adapter(config, tensors, path / TENSOR_FILE, str(path))


def save_adapter(adapter: Adapter, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write an adapter directory, atomically; it is read back and checked first.

    Raises:
        WriteError: when the directory exists (without ``overwrite``) or cannot be written.
        AdapterError: when the adapter would not pass the reader's checks, or has a strength, which
            its files cannot say.
    """
    adapter, directory = checked_adapter(adapter), as_path(directory, "directory")
    if adapter.strength != 1.0:
        raise AdapterError(
            f"{adapter.source} is at {adapter.strength:g} of its strength, and an adapter's files "
            "hold the whole. Save merge_adapters({'name': (adapter, 1.0)}), which has it at that "
            "strength, or the adapter as it was."
        )
    overwrite = yes_or_no(overwrite, "overwrite")
    with atomic_directory(directory, overwrite=overwrite, kind=ADAPTER) as scratch:
        write_bytes(
            scratch / CONFIG_FILE, json_bytes(adapter.config.to_json(adapter.schema_version))
        )
        write_bytes(scratch / TENSOR_FILE, tensor_bytes(tensors_of(adapter), {"format": "pt"}))
        load_adapter(scratch)


def checked_adapter(given: object) -> Adapter:
    """An ``adapter`` parameter, perhaps made in Python, as it is read once it is written.

    Raises:
        OptionError: it is none.
        AdapterError: naming its source and what of it is not as an adapter's files have it; see
            `load_adapter`.
    """
    adapter = of_kind(given, Adapter, "adapter")
    source = str(adapter.source)
    config = writable_config(adapter.config, source)
    check_parts(adapter, SiteTensors, Head, source)
    checked = assemble_adapter(config, tensors_of(adapter), source, source)
    return replace(checked, strength=float(adapter.strength))


def tensors_of(adapter: Adapter) -> dict[str, NDArray[np.float32]]:
    """All of an adapter's tensors by their keys."""
    tensors = {}
    for name, site in adapter.sites.items():
        for key in _SITE_TENSORS:
            value = getattr(site, key)
            if value is not None:
                tensors[f"{name}.{key}"] = value
    tensors |= {f"{path}.{_VALUE}": value for path, value in adapter.values.items()}
    if adapter.head is not None:
        tensors[f"{adapter.head.path}.weight"] = adapter.head.weight
        tensors[f"{adapter.head.path}.bias"] = adapter.head.bias
    return tensors


def assemble_adapter(
    config: AdapterConfig, tensors: Mapping[str, NDArray[Any]], where: Path | str, source: str
) -> Adapter:
    """An adapter from its tensors by key, with the checks of `load_adapter`.

    Raises:
        AdapterError: naming ``where`` (the tensors' file) and the key.
    """
    groups: dict[str, dict[str, NDArray[np.float32]]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition(".")
        if not owner or name not in (*_SITE_TENSORS, *_HEAD_TENSORS, _VALUE):
            raise AdapterError(
                f"{where}: unknown tensor key {key!r}. Expected <site>.u, .v, .d, .lora_A, "
                ".lora_B, .s_in, .s_out or .db, <parameter>.value, and the classifier's .weight "
                "and .bias."
            )
        if not np.issubdtype(tensor.dtype, np.floating):
            raise AdapterError(f"{where}: {key}: expected a float tensor, found {tensor.dtype}.")
        with np.errstate(over="ignore"):  # a float64 beyond float32's range is reported below
            tensor = tensor.astype(np.float32, copy=False)
        check_finite(tensor, f"{where}: {key}", AdapterError)
        groups.setdefault(owner, {})[name] = tensor
    values = {o: g.pop(_VALUE) for o, g in groups.items() if _VALUE in g}
    groups = {o: g for o, g in groups.items() if g}
    if values and not config.fold_only:
        raise AdapterError(
            f"{where}: {next(iter(values))}.{_VALUE}: expected fold_only: true in the "
            "configuration, found false: an adapter that replaces a parameter can only be folded."
        )
    heads = {o: g for o, g in groups.items() if not set(g).isdisjoint(_HEAD_TENSORS)}
    if len(heads) > 1:
        raise AdapterError(
            f"{where}: expected one classifier, found {', '.join(sorted(heads))}. Heads of several "
            "Linears (distilled models) are not supported."
        )
    sites = {o: _site(o, g, where, config.form) for o, g in groups.items() if o not in heads}
    if sites and not config.target_modules:  # values of parameters and a head need no site
        raise AdapterError(
            f"{where}: {next(iter(sites))}: found tensors of sites, and the configuration's "
            "target_modules are []: expected the kinds or names of the sites."
        )
    head = _head(heads, config, where)
    if not sites and not values and (head is None or config.target_modules):
        raise AdapterError(
            f"{where}: zero sites found. Expected tensors such as blocks.0.attn.proj.u; an adapter "
            "that is a classifier alone has the target_modules []."
        )
    return Adapter(_with_classes(config, head, source), sites, head, source, values)


def _site(
    name: str, group: Mapping[str, NDArray[np.float32]], where: Path | str, form: Form
) -> SiteTensors:
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
    expected = _expected_shapes(site, form)
    for tensor, value in group.items():
        if value.shape != expected.get(tensor, value.shape):
            raise AdapterError(
                f"{where}: {name}.{tensor}: expected shape {list(expected[tensor])} to fit the "
                f"site's other tensors, found {list(value.shape)}."
            )
    return site


def _expected_shapes(site: SiteTensors, form: Form) -> dict[str, tuple[int, ...]]:
    """What the tensors of a site must be to fit each other, as far as they say."""
    expected: dict[str, tuple[int, ...]] = {}
    out: int | None = next((t.size for t in (site.s_out, site.db) if t is not None), None)
    if site.shape is not None:
        out, into = site.shape
        expected |= {"u": (out,), "v": (into,), "d": (min(out, into),)}
        if form == "additive":  # the sequential form's matrix does not see the Linear's input
            expected["s_in"] = (into,)
        if site.lora_A is not None:
            r = site.lora_A.shape[0]
            expected |= {"lora_A": (r, into), "lora_B": (out, r)}
    if out is not None:
        expected |= {"s_out": (out,), "db": (out,)}
    return expected


def _head(
    heads: Mapping[str, Mapping[str, NDArray[np.float32]]], config: AdapterConfig, where: Path | str
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
    check_class_names(source, config.class_names, classes)
    check_problem_type(source, config.problem_type, classes)
    return replace(config, num_classes=classes)
