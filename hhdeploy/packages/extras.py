"""What every extra brings, and the oldest version of it that works: pyproject.toml's bounds.

Read by what has to refuse an older package, and by ``hhdeploy doctor``. A test compares the
table with pyproject.toml, which an installed package cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from hhdeploy.errors import MissingDependencyError

# Extra -> distribution -> oldest version, in the order users meet them.
EXTRAS: Final[Mapping[str, Mapping[str, str]]] = {
    "export": {
        "torch": "2.9",
        "timm": "1.0.20",
        "onnx": "1.19",
        "onnx-ir": "0.1.14",
        "onnxscript": "0.5",
    },
    "transformers": {"transformers": "5.0"},
    "cpu": {"onnxruntime": "1.22"},
    "gpu": {"onnxruntime-gpu": "1.22"},
    # 2024.6 computes INT8 side branches wrongly, without an error.
    "openvino": {"openvino": "2025.0"},
    # Strongly typed networks with int64 inputs and the progress monitor.
    "rtx": {"tensorrt-rtx-cu13": "1.2", "cuda-bindings": "13.0"},
    "tensorrt": {"tensorrt": "10.3", "cuda-bindings": "12.6"},
    "serve": {
        "aiohttp": "3.9",
        "starlette": "0.40",
        "uvicorn": "0.30",
        "prometheus-client": "0.20",
        "python-json-logger": "3.1",
        "tritonclient": "2.50",
    },
    "ray": {"ray": "2.60"},
    "calibrate": {"nncf": "3.4"},
}
# Extra -> extras that it brings along.
INCLUDED: Final[Mapping[str, tuple[str, ...]]] = {
    "transformers": ("export",),
    "ray": ("serve",),
    "calibrate": ("export", "cpu"),
}


def is_older(found: str, bound: str) -> bool:
    """Whether a version is below a bound; suffixes of builds and pre-releases do not count.

    >>> is_older("2024.6.0-17404-4c0f47d2335", "2025.0"), is_older("2025.0", "2025.0.0")
    (True, False)
    """
    ours, theirs = _numbers(found), _numbers(bound)
    length = max(len(ours), len(theirs))
    return ours + (0,) * (length - len(ours)) < theirs + (0,) * (length - len(theirs))


def check_version(extra: str, package: str, found: str, *, title: str | None = None) -> None:
    """Refuse a package below the bound of its extra.

    Args:
        extra, package: a key of `EXTRAS`, and one below it.
        found: the version that imports here.
        title: what the message calls it; None: ``package``.

    Raises:
        MissingDependencyError: with the pip line that upgrades it.
    """
    bound = EXTRAS[extra][package]
    if is_older(found, bound):
        raise MissingDependencyError(
            f"{title or package}: expected version {bound} or newer, found {found}. Upgrade with: "
            f"pip install -U 'hhdeploy[{extra}]'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()
