"""Precisions and devices: one list of each, and a name is checked where it comes in."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest

import hhdeploy
from hhdeploy import (
    Bundle,
    Device,
    Precision,
    Reserve,
    add_adapter,
    build,
    calibrate,
    edit,
    export,
    extract_adapter,
    import_adapter,
    load_adapter,
    merge_adapters,
    open_session,
    pull,
    push,
    remove_adapter,
    save_adapter,
    train,
    verify,
    verify_against_torch,
    write_ovms,
    write_triton,
    write_web,
)
from hhdeploy.adapters.importers.template import ImportOptions
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.building import BuildOptions
from hhdeploy.calibration.judging.guard import check_bound
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
from hhdeploy.repositories.ovms import OvmsOptions
from hhdeploy.runtime.serving.settings import ServeSettings
from hhdeploy.training.settings import TrainSettings
from hhdeploy.verifying.reference import VerifyData
from tests.test_house import found_by
from tests.workshop import contents, copy_bundle


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
        lambda: pull(small, tmp_path / "o", lock_timeout=given),
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


# Everything that takes options, an object or a dictionary, given something else.
OPTIONS = {
    "calibrate settings": lambda b, no: calibrate(b, b, settings=no),
    "calibrate options": lambda b, no: calibrate(b, b, options=no),
    "build options": lambda b, no: build(b, backend="tensorrt", options=no),
    "write_triton options": lambda b, no: write_triton(b, b / "o", no),
    "write_ovms options": lambda b, no: write_ovms(b, b / "o", no),
    "export reserve": lambda b, no: export("x", {}, b, reserve=no),
    "export adapters": lambda b, no: export("x", [no], b),
    "export strengths": lambda b, no: export("x", {}, b, strengths=[no]),
    "extract_adapter spec": lambda b, no: extract_adapter(b, no),
    "extract_adapter options": lambda b, no: extract_adapter(b, BackboneSpec("x"), no),
    "import_adapter options": lambda b, no: import_adapter(b, no, no),
    "import_adapter backbone": lambda b, no: import_adapter(b, no),
    "merge_adapters adapters": lambda b, no: merge_adapters([no]),
    "edit basis": lambda b, no: edit(b, no).__enter__(),
    "save_adapter adapter": lambda b, no: save_adapter(no, b / "o"),
    "train settings": lambda b, no: train(no),
    "ImportOptions preprocess": lambda b, no: ImportOptions(preprocess=no),
    "BackboneSpec model_args": lambda b, no: BackboneSpec("x", [no]),
    "TrainSettings model_args": lambda b, no: TrainSettings("x", b, model_args=[no]),
}


@pytest.mark.parametrize("entrance", OPTIONS)
def test_options_are_what_they_are(small, entrance):
    """A dictionary was an AttributeError, and an empty one nobody's options."""
    before = contents(small)
    with pytest.raises(
        OptionError, match=r"expected (a dictionary|\w+\(\.\.\.\)).*, found "
    ) as caught:
        OPTIONS[entrance](small, {})
    assert caught.value.parameter == entrance.split()[1]
    assert contents(small) == before


# Everything that takes a path.
PATHS = {
    "export out": lambda b, no: export("x", {}, no),
    "export adapters": lambda b, no: export("x", {"a": no}, b / "o"),
    "export checkpoint": lambda b, no: BackboneSpec("x", checkpoint=no),
    "export verify_data": lambda b, no: export("x", {}, b / "o", verify_data=no),
    "verify_against_torch verify_data": lambda b, no: verify_against_torch(b, verify_data=no),
    "CalibrationOptions report": lambda b, no: CalibrationOptions(report=no),
    "open_session cache": lambda b, no: open_session(b, device="cpu", cache=no),
    "load_adapter directory": lambda b, no: load_adapter(no),
    "import_adapter source": lambda b, no: import_adapter(no, None),
    "extract_adapter checkpoint": lambda b, no: extract_adapter(no, BackboneSpec("x")),
    "pull out": lambda b, no: pull(b, no),
    "write_triton out": lambda b, no: write_triton(b, no),
    "write_ovms out": lambda b, no: write_ovms(b, no),
    "write_web out": lambda b, no: write_web(b, no),
    "ImportOptions key_map": lambda b, no: ImportOptions(key_map=no),
    "TrainSettings data": lambda b, no: TrainSettings("x", no),
    "TrainSettings checkpoint": lambda b, no: TrainSettings("x", b, checkpoint=no),
}


@pytest.mark.parametrize("entrance", PATHS)
def test_a_path_is_a_path(small, entrance):
    with pytest.raises(OptionError, match=r"expected a path, found list \[1\]") as caught:
        PATHS[entrance](small, [1])
    assert caught.value.parameter == entrance.split()[1]


@pytest.mark.parametrize("given", ["a\0b", "half \ud800", np.array(["a", "b"])])
@pytest.mark.parametrize("entrance", PATHS)
def test_what_no_file_system_has_is_no_path(small, entrance, given):
    with pytest.raises(OptionError, match=r"expected a path, found (str|ndarray)") as caught:
        PATHS[entrance](small, given)
    assert caught.value.parameter == entrance.split()[1]


@pytest.mark.parametrize("given", [None, 3, {"a": 1}, "a\0b", "half \ud800"])
def test_a_bundle_is_a_path_for_those_who_change_it(given, tmp_path):
    for change in (
        lambda: add_adapter(given, "a", tmp_path),
        lambda: remove_adapter(given, "a"),
        lambda: edit(given).__enter__(),
    ):
        with pytest.raises(BundleError, match="expected the path of a bundle, found"):
            change()


def test_what_is_meant_is_taken(tmp_path):
    """Strings for paths, paths for a folder's name, lists for tuples, NumPy's for Python's."""
    spec = BackboneSpec(
        tmp_path, checkpoint="x.pth", seed=np.int64(3), input_size=[1, np.int8(2), 3]
    )
    assert (spec.model, spec.checkpoint) == (str(tmp_path), Path("x.pth"))
    assert json.dumps([spec.seed, spec.input_size]) == "[3, [1, 2, 3]]"
    assert json.dumps(VerifyData(images=np.int64(2)).to_json()["images_per_adapter"]) == "2"
    assert CalibrationSettings(bias_correction=np.bool_(0)).bias_correction is False
    options = CalibrationOptions(eval_data=iter([{}]), max_drop=np.float32(0.5), threads=np.int8(2))
    assert (options.eval_data, json.dumps([options.max_drop, options.threads])) == (
        [{}],
        "[0.5, 2]",
    )
    triton = TritonOptions(preferred_batch=iter([np.int64(8)]), gpu=np.bool_(1), ensemble=0)
    assert (triton.preferred_batch, triton.gpu, triton.ensemble) == ((8,), True, False)
    assert TrainSettings("x", "data", flip=np.bool_(0)).flip is False


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: BackboneSpec(3), "`model`: expected the name of a model in a string, found int 3"),
        (lambda: BackboneSpec("x", input_size=(3, 32)), "`input_size`: expected channels, height"),
        (lambda: BackboneSpec("x", input_size=(3, 32, 0)), "`input_size`: expected 1 or more"),
        (lambda: VerifyData(images=0), "`verify_images`: expected 1 or more"),
        (lambda: TritonOptions(gpu="no"), "`gpu`: expected True or False, found str 'no'"),
        (lambda: TritonOptions(max_batch="4"), "`max_batch`: expected 1 or more, a whole number"),
        (lambda: OvmsOptions(target_device=3), "`target_device`: expected OpenVINO's name of a"),
        (lambda: TrainSettings("x", "d", overwrite="no"), "`overwrite`: expected True or False"),
        (lambda: BuildOptions(tf32="no"), "`tf32`: expected True or False, found str 'no'"),
        (lambda: ImportOptions(form="both"), "`form='both'`: expected one of additive, sequential"),
        (lambda: ImportOptions(lora_scale="2"), "`lora_scale`: expected a finite number, found"),
    ],
)
def test_what_cannot_be_meant_is_refused_where_it_comes_in(ask, message):
    with pytest.raises(OptionError, match=message):
        ask()


def alpha(bundle):
    return bundle / "adapters" / "alpha"


# Numbers that are given a switch, which Python takes for 1: of `smooth_quant` another calibration.
NUMBERS = {
    "open_session threads": lambda b, yes: open_session(b, device="cpu", threads=yes),
    "open_session slots": lambda b, yes: open_session(b, device="cpu", slots=yes),
    "export seed": lambda b, yes: export("x", {}, b / "o", fold=True, seed=yes),
    "export verify_images": lambda b, yes: export("x", {}, b / "o", fold=True, verify_images=yes),
    "add_adapter strength": lambda b, yes: add_adapter(b, "a", alpha(b), strength=yes),
    "edit lock_timeout": lambda b, yes: edit(b, lock_timeout=yes).__enter__(),
    "merge_adapters": lambda b, yes: merge_adapters({"a": (load_adapter(alpha(b)), yes)}),
    "calibrate max_drop": lambda b, yes: check_bound(
        CalibrationOptions(max_drop=yes).max_drop, None
    ),
    "CalibrationSettings images": lambda b, yes: CalibrationSettings(images=yes),
    "CalibrationSettings smooth_quant": lambda b, yes: CalibrationSettings(smooth_quant=yes),
    "ImportOptions lora_scale": lambda b, yes: ImportOptions(lora_scale=yes),
    "Reserve max_rank": lambda b, yes: Reserve(max_rank=yes),
    "TritonOptions max_batch": lambda b, yes: TritonOptions(max_batch=yes),
    "TrainSettings epochs": lambda b, yes: TrainSettings("x", b, b / "o", epochs=yes).check(),
    "TrainSettings lr": lambda b, yes: TrainSettings("x", b, b / "o", lr=yes).check(),
}


@pytest.mark.parametrize("entrance", NUMBERS)
def test_a_switch_is_no_number(small, entrance):
    with pytest.raises(HhdeployError, match=r"expected .*, found .*True\)?\."):
        NUMBERS[entrance](small, True)


# Everything that takes a switch without an object of options. What replaces gets a directory of
# its own that is there, and would be lost.
SWITCHES = {
    "export overwrite": lambda b, o, no: export("x", {}, o, fold=True, overwrite=no),
    "export fold": lambda b, o, no: export("x", {}, o, fold=no),
    "export single_file": lambda b, o, no: export("x", {}, o, fold=True, single_file=no),
    "export bank_as_constant": lambda b, o, no: export("x", {}, o, bank_as_constant=no),
    "push overwrite": lambda b, o, no: push(b, o, overwrite=no),
    "push dry_run": lambda b, o, no: push(b, o, dry_run=no),
    "pull overwrite": lambda b, o, no: pull(b, o, overwrite=no),
    "save_adapter overwrite": lambda b, o, no: save_adapter(
        load_adapter(b / "adapters" / "alpha"), o, overwrite=no
    ),
    "write_triton overwrite": lambda b, o, no: write_triton(b, o.parent / "r", overwrite=no),
    "write_ovms overwrite": lambda b, o, no: write_ovms(b, o.parent / "r", overwrite=no),
    "write_web overwrite": lambda b, o, no: write_web(b, o, overwrite=no),
    "Reserve keep_backbone_head": lambda b, o, no: Reserve(keep_backbone_head=no),
    "open_session partial": lambda b, o, no: open_session(b, device="cpu", partial=no),
    "open_session cuda_graphs": lambda b, o, no: open_session(b, device="cpu", cuda_graphs=no),
}


@pytest.mark.parametrize("given", ["no", "False", None, [], np.zeros(2), 2])
@pytest.mark.parametrize("entrance", SWITCHES)
def test_a_switch_is_true_or_false(small, tmp_path, entrance, given):
    """Python takes "no" for yes: what it replaced was lost."""
    there = copy_bundle(small, tmp_path / "there")
    before = contents(tmp_path)
    with pytest.raises(HhdeployError, match="expected True or False, found") as caught:
        SWITCHES[entrance](small, there, given)
    assert caught.value.parameter == entrance.split()[1]
    assert contents(tmp_path) == before


def test_an_array_is_no_name_no_switch_and_no_number(small):
    several = np.array(["float32", "int8"])
    for ask in (
        lambda: one_of(("a", "b"), several, "letter"),
        lambda: open_session(small, device=several),
        lambda: export("x", {}, "o", fold=True, outputs=[several]),
        lambda: export("x", {}, "o", fold=True, opset=several),
    ):
        with pytest.raises(OptionError, match="expected "):
            ask()
    with pytest.raises(HhdeployError, match="`hint`: expected latency or throughput, found array"):
        open_session(small, device="cpu", hint=several)


def test_a_number_larger_than_any_float():
    assert seconds(10**400, "lock_timeout") == float("inf")
    with pytest.raises(OptionError, match="`lora_scale`: expected a finite number, found int"):
        ImportOptions(lora_scale=10**400)
    with pytest.raises(OptionError, match="expected 0 seconds or more, found"):
        seconds(-(10**400), "lock_timeout")


# What an adapter is called, where one is looked up.
@pytest.mark.parametrize("given", [["alpha"], {"a": 1}, {"alpha"}, np.array(["alpha", "gamma"]), 3])
def test_a_name_is_a_string(small, given):
    """What cannot be hashed, or compared at once, was a TypeError or ValueError of Python's."""
    with open_session(small, device="cpu", threads=1, cache=None) as session:
        assert given not in session.adapters
        for ask in (
            lambda: session.adapters[given],
            lambda: session.adapters.hold(given),
            lambda: session.adapters.remove(given),
            lambda: session.entry(given),
            lambda: session.adapters.release(given),
            lambda: remove_adapter(small, given),
            lambda: add_adapter(small, given, small / "adapters" / "alpha"),
        ):
            with pytest.raises(HhdeployError, match=r"unknown adapter|expected "):
                ask()
        with pytest.raises(HhdeployError, match=r"`output=.*`: this bundle has logits"):
            session.run(np.zeros((1, *session.bundle.manifest.input_size), np.float32), None, given)
    alpha = load_adapter(small / "adapters" / "alpha")
    with pytest.raises(OptionError, match="`head`: expected one of alpha, found"):
        merge_adapters({"alpha": (alpha, 1.0)}, head=given)


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


PROGRESS = {
    "build": lambda p: hhdeploy.build("b", backend="tensorrt", progress=p),
    "push": lambda p: hhdeploy.push("b", "hub", progress=p),
    "pull": lambda p: hhdeploy.pull("hub", "b", progress=p),
    "add_adapter": lambda p: hhdeploy.add_adapter("b", "a", "dir", progress=p),
    "remove_adapter": lambda p: hhdeploy.remove_adapter("b", "a", progress=p),
    "edit": lambda p: hhdeploy.edit("b", progress=p).__enter__(),
    "sign": lambda p: hhdeploy.sign("b", "key.pem", progress=p),
    "export": lambda p: hhdeploy.export("model", {"a": "dir"}, "b", progress=p),
    "write_web": lambda p: hhdeploy.write_web("b", "out", progress=p),
    "calibrate": lambda p: hhdeploy.calibrate("b", "images", progress=p),
    "write_ovms": lambda p: hhdeploy.write_ovms("b", "out", progress=p),
    "write_triton": lambda p: hhdeploy.write_triton("b", "out", progress=p),
    "verify_against_torch": lambda p: hhdeploy.verify_against_torch("b", progress=p),
}


@pytest.mark.parametrize("given", [None, 3, "print"])
@pytest.mark.parametrize("name", PROGRESS)
def test_a_progress_that_is_no_function_is_refused_before_any_work(name, given):
    """They failed where there was something to tell, perhaps minutes later, or did not."""
    expected = "`progress`: expected a function that takes a line"
    with pytest.raises(OptionError, match=expected) as caught:
        PROGRESS[name](given)
    assert caught.value.parameter == "progress"
