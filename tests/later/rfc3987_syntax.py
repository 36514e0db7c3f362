"""The package `rfc3987_syntax`, imported when it is first asked about a string.

It compiles a grammar as it is imported, for two seconds, and jsonschema imports it: in every worker
of pytest and in each process of a Ray cluster. This folder stands before site-packages
(`tests/conftest.py`), so that only who checks an IRI waits.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

_NAME = "rfc3987_syntax"
_HERE = Path(__file__).parent
_found = PathFinder.find_spec(_NAME, [p for p in sys.path if Path(p).resolve() != _HERE])
if _found is None or _found.loader is None:
    raise ImportError(f"{_NAME} is not installed")


@cache
def _package() -> ModuleType:
    sys.modules[_NAME] = package = importlib.util.module_from_spec(_found)
    _found.loader.exec_module(package)
    return package


def is_valid_syntax(term: str, value: str) -> bool:
    """Whether a string is what the grammar calls ``term``, as the package says it."""
    return bool(_package().is_valid_syntax(term, value))
