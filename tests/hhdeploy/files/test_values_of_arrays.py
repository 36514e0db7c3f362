"""Values that hold arrays can be compared, as other values can."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from hhdeploy import load_adapter
from hhdeploy.algebra import Scales
from tests.test_house import sources

ARRAY = re.compile(r"NDArray|ndarray|torch\.Tensor|\bArray\b")


def with_equality_of_python() -> Iterator[ast.ClassDef]:
    """Every dataclass of ours without ``eq=False``."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                made = [ast.unparse(decorator) for decorator in node.decorator_list]
                if any(m.startswith("dataclass") and "eq=False" not in m for m in made):
                    yield node


def is_array(field: ast.stmt) -> bool:
    if not isinstance(field, ast.AnnAssign) or "compare=False" in ast.unparse(field):
        return False
    kind = ast.unparse(field.annotation)
    return "Callable" not in kind and ARRAY.search(kind) is not None


def test_no_dataclass_leaves_the_comparison_of_arrays_to_python():
    kinds = list(with_equality_of_python())
    assert len(kinds) > 100
    assert not [kind.name for kind in kinds if any(map(is_array, kind.body))]


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("same", [copy.copy, copy.deepcopy, pickled])
def test_an_adapter_is_equal_to_its_like(branches, same):
    adapter = load_adapter(branches / "adapters" / "alpha")
    other = same(adapter)
    assert adapter == other
    assert adapter.head == other.head
    assert adapter in [other]
    name, tensors = next((n, t) for n, t in adapter.sites.items() if t.u is not None)
    changed = replace(tensors, u=tensors.u + 1)
    assert tensors != changed
    assert adapter != replace(adapter, sites={**adapter.sites, name: changed})
    assert adapter != replace(adapter, sites={})
    assert adapter != replace(adapter, values={"x": np.zeros(3, np.float32)})
    assert adapter != "alpha"
    assert adapter != load_adapter(branches / "adapters" / "gamma")


def test_shapes_count():
    ones = Scales(np.ones(3), None)
    assert ones == Scales(np.ones(3), None)
    assert ones not in (Scales(np.ones(1), None), Scales(None, np.ones(3)), Scales(None, None))
    with pytest.raises(TypeError, match="unhashable"):
        hash(ones)
