"""safetensors files read and written with NumPy alone, and values that hold arrays."""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from hhdeploy.files.plain import open_plain, what_instead
from hhdeploy.files.writing import atomic_file

_FLOATS = ("F64", "F32", "F16", "BF16")
# How zip archives and single arrays of NumPy begin; of others it advises to unpickle them.
_ARRAYS = (b"PK", b"\x93NUMPY")
_DAMAGED = " The file may be truncated or of another format; copy or save it again."


class ByContent:
    """Of a dataclass with ``eq=False`` that holds arrays: equal is what is of the same class with
    equal fields, arrays by shape and numbers. (Of what `dataclass` makes itself, arrays have no
    truth.) It has no hash, as arrays and dictionaries have none.
    """

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            _same(getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)  # type: ignore[arg-type]
            if f.compare
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return type(one) is type(other) and np.array_equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def read_tensors(
    path: Path, error: type[Exception]
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata.

    float16 and bfloat16 are widened to float32, float64 and integers come as they are.

    Raises:
        error: when the file is missing, truncated or not a safetensors file, or holds a
            tensor of a type that is none of these.
    """
    try:
        open_plain(path).close()  # safetensors would wait for a pipe, and hides who may not read
    except FileNotFoundError:
        raise error(f"{path} does not exist. A safetensors file was expected there.") from None
    except OSError as reason:
        raise error(
            f"{path} cannot be read: {reason.strerror}. A safetensors file was expected there."
        ) from reason
    try:
        with safe_open(path, framework="numpy") as stream:
            metadata = dict(stream.metadata() or {})
            names = list(stream.keys())
            types = {name: stream.get_slice(name).get_dtype() for name in names}
            _check_types(path, types, error)
            tensors = {n: stream.get_tensor(n) for n in names if types[n] != "BF16"}
    except (SafetensorError, OSError, ValueError, TypeError) as reason:
        instead = what_instead(path)
        raise error(
            f"{path} cannot be read as safetensors: {instead or reason}."
            + ("" if instead else _DAMAGED)
        ) from reason
    if any(kind == "BF16" for kind in types.values()):
        tensors.update(_read_bfloat16(path, [n for n in names if types[n] == "BF16"]))
    return {n: t.astype(np.float32) if t.dtype == np.float16 else t for n, t in tensors.items()}, (
        metadata
    )


@contextlib.contextmanager
def open_arrays(path: Path) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The plain arrays of an .npz file by name, each read when it is asked for.

    Raises:
        OSError: it is not there, may not be read, or is no plain file.
        ValueError: it is no such file, or damaged.
    """
    if instead := what_instead(path):
        raise ValueError(instead)
    try:
        with open_plain(path) as stream:
            start = stream.read(24)
            if not start.startswith(_ARRAYS):
                raise ValueError(f"it begins with {start!r}, as no file of numpy.savez does")
            stream.seek(0)
            arrays = np.load(stream, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise ValueError("it is a single array (.npy), which has no name")
            with arrays:
                yield arrays
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:  # cut off, changed
        raise ValueError(f"it is damaged: {error}") from error


def check_finite(tensor: NDArray[Any], where: str, error: type[Exception]) -> None:
    """Every value is a number. Raises ``error``, which names ``where``: a file and a key."""
    bad = tensor.size - int(np.count_nonzero(np.isfinite(tensor)))
    if bad:
        raise error(
            f"{where}: expected finite values, found NaN or infinity in {bad} of {tensor.size}. "
            "The training probably diverged."
        )


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; none of a file of another kind."""
    try:
        open_plain(path).close()  # as in `read_tensors`
        with safe_open(path, framework="numpy") as stream:
            return dict(stream.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError):
        return {}


def _check_types(path: Path, types: Mapping[str, str], error: type[Exception]) -> None:
    """Before anything is read: safetensors fails in its own ways on types NumPy lacks."""
    for name, kind in types.items():
        if kind not in _FLOATS and not kind.startswith(("I", "U")):
            raise error(
                f"{path}: tensor {name} has type {kind}; expected float32, float16 or bfloat16."
            )


def write_tensors(
    path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    with atomic_file(path) as scratch:
        scratch.write_bytes(tensor_bytes(tensors, metadata))


def tensor_bytes(
    tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Content of a safetensors file."""
    return save(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        dict(metadata) if metadata else None,
    )


def tensors_of(content: bytes, where: Path, error: type[Exception]) -> dict[str, NDArray[Any]]:
    """All tensors of a safetensors file's content, read only; types as NumPy has them.

    Raises:
        error: it is not a safetensors file, or holds a tensor of a type that NumPy lacks.
    """
    try:
        return load(content)
    except (SafetensorError, ValueError, TypeError, KeyError) as reason:
        raise error(f"{where} cannot be read as safetensors: {reason}.{_DAMAGED}") from reason


def _read_bfloat16(path: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    """Widen bfloat16 tensors from their raw bytes: NumPy has no such type.

    A bfloat16 is the upper half of a float32, so the widening is exact. The file's header is
    known to be sound here: `safe_open` has read it.
    """
    with path.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
        tensors = {}
        for name in names:
            start, end = header[name]["data_offsets"]
            stream.seek(8 + header_size + start)
            upper = np.frombuffer(stream.read(end - start), "<u2").astype(np.uint32)
            tensors[name] = (upper << 16).view(np.float32).reshape(header[name]["shape"])
    return tensors
