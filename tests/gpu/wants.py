"""Why a test is skipped: for want of a package, a driver, a chip, or a graph."""

from __future__ import annotations

import importlib.util
from typing import Literal, NoReturn

import pytest

Kind = Literal["package", "driver", "chip", "graph"]


def lacks(kind: Kind, why: str) -> NoReturn:
    """Skip the test; the report counts it under ``kind``."""
    pytest.skip(f"{kind}: {why}")


def need(*packages: str, extra: str) -> None:
    """Skip the test, naming what is not there, unless all these modules can be imported."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        lacks("package", f"{', '.join(absent)} (pip install 'hhdeploy[{extra}]')")
