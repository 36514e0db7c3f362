"""Precisions and devices: one list of each, and a name is checked where it comes in."""

from __future__ import annotations

import ast
import json
from typing import Any, get_args

import click
import numpy as np
import pytest

from hhdeploy import (
    Bundle,
    Device,
    Precision,
    Reserve,
    build,
    export,
    open_session,
    remove_adapter,
    verify,
    verify_against_torch,
    write_triton,
)
from hhdeploy.adapters.importers.template import ImportOptions
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.choices import (
    PRECISIONS,
    TORCH_DEVICES,
    as_precisions,
    as_seed,
    listed,
    member,
    one_of,
    seconds,
)
from hhdeploy.cli.wording import all_commands
from hhdeploy.errors import BundleError, HhdeployError, OptionError
from hhdeploy.exporters.triton import TritonOptions
from hhdeploy.loadtest.run import Subject
from hhdeploy.quantising import CalibrationOptions
from hhdeploy.runtime.serving.settings import ServeSettings
from hhdeploy.training.settings import TrainSettings
from tests.test_house import found_by
from tests.workshop import copy_bundle


def test_one_of_says_what_there_is():
    assert one_of(("a", "b"), "b", "letter") == "b"
    assert member(("a", "b"), "c") is None
    with pytest.raises(OptionError, match=r"`letter='c'`: expected one of a, b\. Ask\."):
        one_of(("a", "b"), "c", "letter", " Ask.")
    assert as_precisions(["fp8", "float32"]) == ("fp8", "float32")
    assert as_precisions(None) is None
    with pytest.raises(OptionError, match=r"`precisions=\['fp9'\]`: expected one of float32, "):
        as_precisions(["fp8", "fp9"])


@pytest.mark.parametrize("given", [{"a", "b"}, frozenset("a"), {"a": 1}, "ab", b"ab", 3, None])
def test_several_values_come_in_a_list(given):
    assert listed(("a", "b"), "letters", "names") == ["a", "b"]
    assert listed(iter("ab"), "letters", "names") == ["a", "b"]
    assert listed({"a": 1}.keys(), "letters", "names") == ["a"]
    words = rf"`letters`: expected names in a list or tuple, found {type(given).__name__} .*\."
    with pytest.raises(OptionError, match=words):
        listed(given, "letters", "names")


@pytest.mark.parametrize("given", [-1, 2**63, 1.5, "4", None])
def test_a_seed_is_a_number_that_numpy_and_torch_take(small, tmp_path, given):
    assert as_seed(np.int64(7)) == 7
    for ask in (
        lambda: export("x", {}, tmp_path / "o", fold=True, seed=given),
        lambda: verify_against_torch(small, seed=given),
        lambda: CalibrationSettings(seed=given),
    ):
        with pytest.raises(OptionError, match="`seed`: expected 0 to 9223372036854775807, a whole"):
            ask()


@pytest.mark.parametrize("given", [float("nan"), -1, "4", None])
def test_a_time_to_wait_is_checked_before_anything_slow(small, tmp_path, given):
    assert seconds(float("inf"), "lock_timeout") == float("inf")
    for ask in (
        lambda: export("x", {}, tmp_path / "o", fold=True, lock_timeout=given),
        lambda: verify_against_torch(small, lock_timeout=given),
        lambda: build(small, backend="tensorrt", lock_timeout=given),
        lambda: CalibrationOptions(lock_timeout=given),
        lambda: remove_adapter(small, "alpha", lock_timeout=given),
    ):
        with pytest.raises(OptionError, match="`lock_timeout`: expected 0 seconds or more, found"):
            ask()


# Everything that takes several values from a user.
LISTS = {
    "session adapters": lambda b, two: two_images(b, "run", two),
    "session images": lambda b, two: two_images(b, "classify", two),
    "verify precisions": lambda b, two: verify(b, precisions=two),
    "verify_against_torch precisions": lambda b, two: verify_against_torch(b, precisions=two),
    "export precisions": lambda b, two: export("x", {}, b, fold=True, precisions=two),
    "export outputs": lambda b, two: export("x", {}, b, fold=True, outputs=two),
    "Reserve sites": lambda b, two: Reserve(sites=two),
    "Reserve parts": lambda b, two: Reserve(parts=two),
    "CalibrationSettings exclude": lambda b, two: CalibrationSettings(exclude=two),
    "ImportOptions class_names": lambda b, two: ImportOptions(class_names=two),
}


def two_images(bundle, method, given):
    with open_session(bundle, device="cpu", threads=1, cache=None) as session:
        if method == "classify":
            return session.classify(given)
        return session.run(np.zeros((2, *session.bundle.manifest.input_size), np.float32), given)


@pytest.mark.parametrize("entrance", LISTS)
def test_a_set_is_refused_where_it_comes_in(small, entrance):
    """Which image had which adapter's answer was another in every process."""
    with pytest.raises(HhdeployError, match=r"in a list or tuple, found set \{'") as caught:
        LISTS[entrance](small, {"q", "k"})
    assert caught.value.parameter == entrance.split()[1]


# Everything that takes a name from a user, given one that is none.
ENTRANCES = {
    "open_session device": lambda b: open_session(b, device="tpu"),
    "open_session precision": lambda b: open_session(b, device="cpu", precision="float8"),
    "verify device": lambda b: verify(b, device="tpu"),
    "verify precisions": lambda b: verify(b, precisions=["float32", "float8"]),
    "verify_against_torch device": lambda b: verify_against_torch(b, device="tpu"),
    "verify_against_torch precisions": lambda b: verify_against_torch(b, precisions=["float8"]),
    "export precisions": lambda b: export("x", {}, b, fold=True, precisions=["float8"]),
    "build backend": lambda b: build(b, backend="cuda"),
    "build precision": lambda b: build(b, backend="tensorrt", precision="float8"),
    "write_triton precision": lambda b: write_triton(b, b / "o", TritonOptions(precision="float8")),
    "CalibrationSettings precision": lambda b: CalibrationSettings(precision="float32"),
    "CalibrationOptions device": lambda b: CalibrationOptions(device="tpu"),
    "ServeSettings device": lambda b: ServeSettings(b, device="tpu"),
    "ServeSettings precision": lambda b: ServeSettings(b, precision="float8"),
    "Subject device": lambda b: Subject(b, 1, device="tpu"),
    "Subject precision": lambda b: Subject(b, 1, precision="float8"),
    "TrainSettings device": lambda b: TrainSettings("x", b, b / "o", device="tpu").check(),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_name_that_is_none_is_refused_where_it_comes_in(small, entrance):
    with pytest.raises(HhdeployError, match="expected one of") as caught:
        ENTRANCES[entrance](small)
    assert isinstance(caught.value, OptionError)
    assert caught.value.parameter == entrance.split()[1]


@pytest.mark.parametrize("damage", ["graph", "engine's precision", "engine's backend"])
def test_a_manifest_with_another_name_is_damaged(small, tmp_path, damage):
    path = copy_bundle(small, tmp_path / "bundle")
    content = json.loads((path / "hhdeploy.json").read_text())
    engine: dict[str, Any] = {
        "file": "a.engine", "backend": "tensorrt", "version": "10", "precision": "float32",
        "architectures": [], "gpu": None, "batch": [1, 2, 3], "slots": None, "bank_sha256": None,
        "graph_sha256": "", "optimization_level": None, "build_seconds": 1.0, "bytes": 5,
    }  # fmt: skip
    content["engines"] = [engine]
    (path / "hhdeploy.json").write_text(json.dumps(content))
    assert Bundle.open(path).manifest.engines[0].backend == "tensorrt"
    if damage == "graph":
        content["graphs"]["float8"] = "model.onnx"
    else:
        engine[damage.split()[1]] = "float8"
    (path / "hhdeploy.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"damaged .*'float8', expected one of"):
        Bundle.open(path)


def test_commands_offer_the_names_that_there_are():
    offered: dict[str, set[tuple[str, ...]]] = {}
    for command in all_commands().values():
        for parameter in command.params:
            if parameter.name in ("device", "precision", "precisions"):
                assert isinstance(parameter.type, click.Choice), f"{command.name} {parameter.name}"
                offered.setdefault(parameter.name, set()).add(tuple(parameter.type.choices))
    assert offered["device"] == {get_args(Device), TORCH_DEVICES}
    assert offered["precisions"] == {get_args(Precision)}
    assert all(set(names) <= set(PRECISIONS) for names in offered["precision"])


def untyped(tree: ast.AST) -> list[str]:
    """Parameters and fields that hold such a name and are any string."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            name, annotation = node.arg, node.annotation
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, annotation = node.target.id, node.annotation
        else:
            continue
        # A field `device` says what computed, in words.
        names = ("precision", "precisions", *(("device",) if isinstance(node, ast.arg) else ()))
        if name in names and annotation is not None and "str" in ast.unparse(annotation):
            found.append(f"{name}: {ast.unparse(annotation)}")
    return found


def test_no_precision_or_device_is_any_string():
    assert not found_by(untyped)


def test_a_planted_string_is_found():
    assert untyped(ast.parse("def f(precision: str, device: str | None): 0"))
    assert untyped(ast.parse("class C:\n    precision: str = 'int8'"))
    assert not untyped(ast.parse("def f(precision: Precision, device: Device = 'cpu'): 0"))
