"""Adapters that are broken or only unusual: JavaScript refuses what Python refuses, and no more."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hhdeploy.adapters.checks import check_name
from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.backbones.sites import _KIND_OF, KINDS, linear_spec, select_sites
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import write_manifest
from hhdeploy.errors import DataError, HhdeployError, OptionError
from hhdeploy.files.tensors import read_tensors, tensor_bytes
from hhdeploy.runtime import open_session
from tests.broken_manifests import nested
from tests.js.conftest import decoded, encoded, sent
from tests.support import images
from tests.workshop import copy_bundle
from tests.wrong_logits import LOGITS, bundle_of_logits

Edit = Callable[[Path], object]
Tensors = dict[str, NDArray[Any]]
PICTURE = Image.new("RGB", (40, 40), (100, 60, 30))
SITE = "blocks.0.attn.qkv.v"
CLASSES, WIDTH = 7, 48


def says(**changes: Any) -> Edit:
    """The configuration says something else; a key that is ``...`` is left out."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / CONFIG_FILE).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not ...}
        (folder / CONFIG_FILE).write_text(json.dumps(kept))

    return edit


def sees(**changes: Any) -> Edit:
    """The configuration's preprocessing is another."""
    own = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, **changes}
    return says(preprocess={key: value for key, value in own.items() if value is not ...})


def has(change: Callable[[Tensors], object]) -> Edit:
    """Tensors are others, or gone."""

    def edit(folder: Path) -> None:
        tensors, _ = read_tensors(folder / TENSOR_FILE, AssertionError)
        change(tensors)
        (folder / TENSOR_FILE).write_bytes(tensor_bytes(tensors))

    return edit


def sets(**new: Any) -> Edit:
    """Tensors of one site are others; None: gone."""
    return has(lambda tensors: _set(tensors, {f"{SITE}.{key}": x for key, x in new.items()}))


def head(weight: Any, bias: Any, path: str = "head") -> Edit:
    """The classifier is another, None: it is gone; nothing is said of its classes."""

    def edit(folder: Path) -> None:
        says(num_classes=None, class_names=None)(folder)
        gone = {"head.weight": None, "head.bias": None}
        new = {f"{path}.weight": weight, f"{path}.bias": bias}
        has(lambda tensors: _set(tensors, gone | new))(folder)

    return edit


def _set(tensors: Tensors, new: dict[str, Any]) -> None:
    for key, value in new.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def writes(file: str, change: Callable[[bytes], bytes]) -> Edit:
    """The bytes of a file are others."""
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def cut(folder: Path) -> None:
    (folder / TENSOR_FILE).unlink()


def ones(*shape: int) -> NDArray[np.float32]:
    return np.ones(shape, np.float32)


def without(ending: str) -> Edit:
    """As of a file that was half written: all tensors of some sites are gone."""
    return has(lambda tensors: [tensors.pop(k) for k in list(tensors) if f"{ending}." in k])


def times(factor: float, *names: str) -> Edit:
    """Tensors of these last names are multiplied."""

    def change(tensors: Tensors) -> None:
        for key in tensors:
            if key.rpartition(".")[2] in names:
                tensors[key] = tensors[key] * np.float32(factor)

    return has(change)


def header(text: str) -> Edit:
    """A file of tensors that is this header alone."""
    return writes(TENSOR_FILE, lambda _: len(text).to_bytes(8, "little") + text.encode())


# One that is none, but for its first: of a fixed image, which nothing is compared with in browsers.
ANSWER = {"input_size": [3, 8, 8], "classifier": "head", "rms": 1.5, "values": [1, -2.5]}
ANSWER |= {"made_with": "torch 2"}
ANSWERS: list[Any] = [3, [], {}, {"rms": 1.5}]
ANSWERS += [{**ANSWER, "rms": rms} for rms in (0, -1, True, "1", 1e39)]
ANSWERS += [{**ANSWER, "values": values} for values in ([], [1.0] * 33, ["1"], "12", [None])]
ANSWERS += [{**ANSWER, "input_size": size} for size in ([3, 8], [3, 8, 0], [3, 8, 8.5], 8)]
ANSWERS += [{**ANSWER, "classifier": None}, {**ANSWER, "made_with": 3}, {**ANSWER, "more": 1}]
ANSWERS += [{**ANSWER, "full_precision": value} for value in (1, "true", None)]

# Of an adapter of q, k, v and proj with seven classes; each with what messages of both name.
BROKEN: dict[str, tuple[Edit, str]] = {
    "no_json": (writes(CONFIG_FILE, lambda b: b[:-9]), "JSON"),
    "no_utf8": (writes(CONFIG_FILE, lambda b: b.replace(b"HTA", b"H\xffA")), "JSON"),
    "no_object": (writes(CONFIG_FILE, lambda b: b"[" + b + b"]"), "JSON object"),
    "key_twice": (
        writes(CONFIG_FILE, lambda b: b.replace(b'"form"', b'"form": "sequential", "form"', 1)),
        "form.*twice",
    ),
    "nan": (writes(CONFIG_FILE, lambda b: b.replace(b'"form"', b'"x": NaN, "form"', 1)), "JSON"),
    "deep": (
        writes(CONFIG_FILE, lambda b: b.replace(b'"form"', nested(100) + b', "form"', 1)),
        "JSON.*more than 100 levels",
    ),
    "peft": (says(peft_type="LORA"), "peft_type"),
    "schema_newer": (says(schema_version=3), "schema_version: expected at most 2, found 3"),
    "schema_absent": (says(schema_version=...), "schema_version"),
    "schema_word": (says(schema_version="1"), "schema_version"),
    "schema_true": (says(schema_version=True), "schema_version"),
    "schema_negative": (says(schema_version=-1), "schema_version"),
    "model_absent": (says(base_model_name_or_path=...), "base_model_name_or_path"),
    "model_empty": (says(base_model_name_or_path=""), "base_model_name_or_path"),
    "other_backbone": (
        says(base_sha256=None, base_model_name_or_path="resnet50"),
        "base_model_name_or_path: .*resnet50",
    ),
    "other_tag": (
        says(base_sha256=None, base_model_name_or_path="vit_tiny_patch16_224.mine"),
        "base_model_name_or_path: .*mine",
    ),
    "other_weights": (says(base_sha256="0" * 64), "base_sha256"),
    "digest_number": (says(base_sha256=3), "base_sha256"),
    "other_signs": (says(base_sha256=None, base_signs_sha256="0" * 64), "base_signs_sha256"),
    "signs_number": (says(base_signs_sha256=3), "base_signs_sha256"),
    "other_buffers": (says(base_buffers_sha256="0" * 64), "base_buffers_sha256"),
    "buffers_number": (says(base_buffers_sha256=3), "base_buffers_sha256"),
    **{
        f"answer_{i}": (says(base_answer=x), "base_answer: expected") for i, x in enumerate(ANSWERS)
    },
    "args": (says(base_model_args=[1]), "base_model_args"),
    "args_no_object": (says(base_model_args=[]), "base_model_args: expected an object or null"),
    "other_heads": (
        says(base_model_args={"num_heads": 1}, preprocess=None),
        "base_model_args: .* with num_heads 1, the backbone has",
    ),
    "form": (says(form="multiplicative"), "form"),
    "form_null": (says(form=None), "form"),
    "form_other": (says(form="sequential"), "target_modules"),
    "form_of_site": (says(form="sequential", target_modules=[SITE]), "blocks.0.attn.qkv"),
    "reflection": (says(reflection="orthogonl"), "reflection"),
    "reflection_null": (says(reflection=None), "reflection"),
    "rank": (says(r=-1), "r: expected"),
    "fold_only": (says(fold_only=True), "only be folded"),
    "fold_only_word": (says(fold_only="no"), "fold_only"),
    "targets_none": (says(target_modules=[]), "target_modules"),
    "targets_number": (says(target_modules=3), "target_modules"),
    "targets_numbers": (says(target_modules=[3]), "target_modules"),
    "targets_empty": (says(target_modules=["q", ""]), "target_modules"),
    "targets_no_expression": (says(target_modules=["q", "("]), "target_modules"),
    "targets_kind": (says(target_modules=[*"qkv", "proj", "fc1"]), "missing tensor keys for fc1"),
    "targets_ending": (says(target_modules=[*"qkv", "proj", "dense"]), "tensor keys for dense"),
    "targets_form": (says(target_modules=[*"qkv", "proj", "fc2"]), "missing tensor keys for fc2"),
    "targets_not_there": (says(target_modules=["q", "blocks.9.attn.proj"]), "blocks.9.attn.proj"),
    "classes_none": (says(num_classes=0), "num_classes"),
    "classes_word": (says(num_classes="7"), "num_classes"),
    "classes_others": (says(num_classes=5, class_names=None), "expected 5 rows"),
    "names_one": (says(class_names=["dark"]), "class_names: expected 7 names"),
    "names_one_of_rows": (says(num_classes=None, class_names=["dark"]), "expected 7 names"),
    "names_numbers": (says(class_names=[1] * CLASSES), "class_names"),
    "names_word": (says(class_names="darkest"), "class_names"),
    "meaning": (says(problem_type="classes"), "problem_type"),
    "meaning_of_one": (
        both(head(ones(1, WIDTH), ones(1)), says(problem_type="single_label_classification")),
        "problem_type: .*needs 2 classes",
    ),
    "compressed": (says(compressed={"rank": 1}), "compressed"),
    "license": (says(license=3), "license"),
    "transform_word": (says(preprocess="as timm"), "preprocess"),
    "transform_size": (
        both(says(base_model_args={}), sees(input_size=[3, 40, 40])),
        "preprocess.input_size.*backbone",
    ),
    "transform_flat": (sees(input_size=[32, 32]), "preprocess.input_size"),
    "transform_negative": (sees(input_size=[3, 32, -32]), "preprocess.input_size"),
    "transform_no_mean": (sees(mean=...), "preprocess lacks mean"),
    "transform_unknown": (sees(interpolaton="bilinear"), "expected keys among .*interpolaton"),
    "transform_mean_short": (sees(mean=[0.5]), "preprocess.mean"),
    "transform_mean_infinite": (
        both(
            sees(mean=[7] * 3), writes(CONFIG_FILE, lambda b: b.replace(b"7, 7, 7", b"7, 7, 1e999"))
        ),
        "preprocess.mean|a number beyond the range",
    ),
    "transform_std_zero": (sees(std=[0, 0, 0]), "preprocess.std"),
    "transform_std_infinite": (
        both(
            sees(std=[7] * 3), writes(CONFIG_FILE, lambda b: b.replace(b"7, 7, 7", b"7, 7, 1e999"))
        ),
        "preprocess.std|a number beyond the range",
    ),
    "transform_filter": (sees(interpolation="magic"), "preprocess.interpolation"),
    "transform_mode": (sees(crop_mode="random"), "preprocess.crop_mode"),
    "transform_share": (sees(crop_pct=0), "preprocess.crop_pct"),
    "transform_exif": (sees(exif="yes"), "preprocess.exif"),
    "transform_args": (
        both(says(base_model_args={"img_size": 64}), sees()),
        "image sizes disagree: base_model_args.img_size is 64",
    ),
    "no_tensors": (cut, "model.safetensors"),
    "tensors_cut": (writes(TENSOR_FILE, lambda b: b[:-4]), "model.safetensors"),
    "tensors_longer": (writes(TENSOR_FILE, lambda b: b + b"\0" * 4), "model.safetensors"),
    "tensors_few_bytes": (writes(TENSOR_FILE, lambda b: b[:5]), "model.safetensors"),
    "header_word": (header('"tensors"'), "model.safetensors"),
    "header_null": (header('{"a.u": null}'), "model.safetensors"),
    "header_short": (header('{"a.u": {"dtype": "F32", "shape": [0]}}'), "model.safetensors"),
    "header_hole": (
        writes(TENSOR_FILE, lambda b: b.replace(b'offsets":[0,', b'offsets":[4,', 1)),
        "model.safetensors",
    ),
    "empty": (has(dict.clear), "zero sites found"),
    "head_alone": (without("blocks"), "zero sites found"),
    "integers": (has(lambda t: t.update({"head.bias": np.ones(7, np.int32)})), "head.bias"),
    "not_finite": (times(np.nan, "u"), "[.]u: expected finite values"),
    "beyond_float32": (
        has(lambda t: t.update({f"{SITE}.u": np.full(WIDTH, 1e39)})),
        f"{SITE}.u: expected finite values",
    ),
    "sites_lost": (without("qkv.v"), "missing tensor keys for blocks.0.attn.qkv.v, blocks.1"),
    "site_lost": (without(SITE), f"missing tensor keys for {SITE}: "),
    "site_unknown": (
        has(lambda t: t.update({f"blocks.9.attn.proj.{x}": ones(WIDTH) for x in "uvd"})),
        "blocks.9.attn.proj",
    ),
    "key_unknown": (sets(w=ones(WIDTH)), f"unknown tensor key.*{SITE}.w"),
    "key_short": (has(lambda t: t.update(u=ones(WIDTH))), "unknown tensor key.*u"),
    "key_value": (has(lambda t: t.update({"norm.weight.value": ones(WIDTH)})), "norm.weight.value"),
    "d_lost": (sets(d=None), SITE),
    "lora_b_lost": (sets(lora_B=None), SITE),
    "u_square": (sets(u=ones(WIDTH, 1)), f"{SITE}.u: expected 1 dimension"),
    "lora_flat": (sets(lora_A=ones(WIDTH)), f"{SITE}.lora_A: expected 2 dimensions"),
    "u_longer": (sets(u=ones(WIDTH + 1)), SITE),
    "d_longer": (sets(d=ones(WIDTH + 1)), f"{SITE}.d"),
    "lora_wider": (sets(lora_A=ones(1, WIDTH + 1)), f"{SITE}.lora_A"),
    "lora_ranks": (sets(lora_A=ones(2, WIDTH)), f"{SITE}.lora_"),
    "rank_larger": (sets(lora_A=ones(9, WIDTH), lora_B=ones(WIDTH, 9)), "needs rank 11"),
    "part": (sets(db=ones(WIDTH)), f"{SITE}.db, and the rows of this bundle have no db"),
    "part_longer": (sets(db=ones(WIDTH + 1)), f"{SITE}.db"),
    "row_overflows": (times(1e25, "u", "v", "d"), "range of float32"),
    "no_head": (head(None, None), "no classifier"),
    "no_head_classes": (both(head(None, None), says(num_classes=9)), "num_classes"),
    "no_weight": (head(None, ones(CLASSES)), "weight"),
    "flat_weight": (head(ones(CLASSES), ones(CLASSES)), "head.weight"),
    "other_bias": (head(ones(CLASSES, WIDTH), ones(3)), "head.bias"),
    "other_features": (head(ones(CLASSES, 8), ones(CLASSES)), "head.weight"),
    "other_head": (head(ones(CLASSES, WIDTH), ones(CLASSES), "head.fc"), "head.fc.weight"),
    "head_and_site": (has(lambda t: t.update({"head.u": ones(WIDTH)})), "classifier's .?weight"),
    "two_heads": (
        has(lambda t: t.update({"head_dist.weight": ones(CLASSES, WIDTH)})),
        "one classifier, found head",
    ),
    "too_many_classes": (head(ones(99, WIDTH), ones(99)), "has 99 classes"),
    "logits_overflow": (times(3e38, "weight"), "logits are no numbers"),
}


def without_bias(folder: Path) -> None:
    has(lambda tensors: tensors.pop("head.bias"))(folder)


def typed(kind: type) -> Edit:
    return has(lambda tensors: tensors.update({k: t.astype(kind) for k, t in tensors.items()}))


# What both take, and make the same row of.
UNUSUAL: dict[str, Edit] = {
    "as_it_is": lambda folder: None,
    "shortest": says(
        form=..., reflection=..., r=..., target_modules=..., num_classes=..., base_sha256=...,
        class_names=..., preprocess=..., base_model_args=None,
    ),
    "no_tag": says(base_sha256=None, base_model_name_or_path="vit_tiny_patch16_224"),
    "other_source": says(base_sha256=None, base_model_name_or_path="python:mine:model"),
    "other_name": says(base_model_name_or_path="resnet50"),  # the digest decides
    "heads_in_other_words": says(base_model_args={"num_heads": [1, 2], "global_pool": "avg"}),
    "kinds_of_its_own": says(target_modules=["attn.qkv", "v", "proj"]),
    "expression": says(target_modules=r"blocks\.\d+\.attn\.(qkv\.[qkv]|proj)"),
    "python_expression": says(target_modules=[r"(?P<block>blocks\.\d)\.attn\.(?:qkv|proj)\Z"]),
    "linears": says(target_modules=["attn.qkv", "attn.proj"]),
    "in_full": both(without(SITE), says(target_modules=["q", "k", "blocks.1.attn.qkv.v", "proj"])),
    "no_bias": without_bias,
    "float16": typed(np.float16),
    "float64": typed(np.float64),
    "zeros_need_no_room": sets(lora_A=np.zeros((9, WIDTH), "f"), lora_B=np.zeros((WIDTH, 9), "f")),
    "labels": says(problem_type="multi_label_classification"),
    "one_value": head(ones(1, WIDTH), ones(1)),
    "keys_that_nobody_knows": says(trained_by="me", license=["MIT", "CC0"]),
}  # fmt: skip


@pytest.fixture
def edited(workshop, tmp_path):
    """A broken or unusual copy of an adapter: ``make(name, edit)``."""

    def make(name: str, edit: Edit) -> Path:
        folder = tmp_path / name
        save_adapter(load_adapter(workshop.directory("rival")), folder)
        edit(folder)
        return folder

    return make


def refusals(bundle: Path, adapters: dict[str, Path]) -> dict[str, str | None]:
    """What Python says of adapters that are added and asked, None of those that answer."""
    found: dict[str, str | None] = {}
    with open_session(bundle, device="cpu", cache=None, threads=1) as session:
        for name, folder in adapters.items():
            try:
                session.adapters.add("omega", folder, replace_existing=True)
                session.classify([PICTURE], "omega")
                found[name] = None
            except HhdeployError as error:
                found[name] = str(error)
    return found


def question(bundle: Path, adapters: dict[str, Path]) -> dict[str, Any]:
    told = {name: str(folder) for name, folder in adapters.items()}
    (picture,) = sent([PICTURE])
    return {"ask": "refusals", "where": str(bundle), "picture": picture, "adapters": told}


def test_what_python_refuses_javascript_refuses(ask, small, edited):
    folders = {name: edited(name, edit) for name, (edit, _) in BROKEN.items()}
    (there,) = ask(question(small, folders))
    here = refusals(small, folders)
    for who, said in (("Python", here), ("JavaScript", there)):
        missed = {
            name: said[name]
            for name, (_, pattern) in BROKEN.items()
            if not re.search(pattern, said[name] or "")
        }
        assert not missed, who


def test_what_python_takes_javascript_takes(ask, small, edited):
    folders = {name: edited(name, edit) for name, edit in UNUSUAL.items()}
    rows = [{"ask": "row", "where": str(small), "adapter": str(f)} for f in folders.values()]
    there, *packed = ask(question(small, folders), *rows)
    nobody = dict.fromkeys(UNUSUAL)
    assert refusals(small, folders) == nobody
    assert there == nobody
    layout = Bundle.open(small).manifest.layout
    assert layout is not None
    for folder, row in zip(folders.values(), packed, strict=True):
        expected = layout.pack("omega", load_adapter(folder))
        np.testing.assert_array_max_ulp(decoded(row, layout.size), expected, 1)


def test_an_answer_is_of_one_adapter(ask, small, edited):
    """Another one of its name, with other labels and another transform, comes while it is asked."""
    folders = [
        edited("old", says(class_names=[f"old {i}" for i in range(CLASSES)])),
        edited(
            "new",
            both(
                says(class_names=[f"new {i}" for i in range(CLASSES)]),
                sees(mean=[0.1] * 3, std=[0.9] * 3),
                times(-1, "weight"),
            ),
        ),
    ]
    levels = np.random.default_rng(5).integers(0, 256, (120, 200, 3), np.uint8)
    (shown,) = sent([Image.fromarray(levels)])
    (found,) = ask(
        {
            "ask": "replaced", "where": str(small), "picture": shown, "name": "omega",
            "folders": [str(folder) for folder in folders], "rounds": 120,
        }
    )  # fmt: skip
    assert found == {"right": 2, "wrong": []}


def test_logits_that_are_no_numbers(ask, small, tmp_path):
    bundle = bundle_of_logits(small, tmp_path / "bundle")
    shown = {"ask": "classify", "where": str(bundle), "pictures": sent([PICTURE])}
    there = ask(*({**shown, "adapters": [name]} for name in LOGITS))
    for (name, (kind, _, said)), found in zip(LOGITS.items(), there, strict=True):
        if said is None:
            assert f"adapter {name}: the logits are no numbers" in found["error"]
        else:
            chosen = [a["label"] for a in found[0] if a["positive"] or kind == "regression"]
            assert chosen == said


def test_names_that_python_refuses(ask, small, workshop):
    names = ["a b/../c", "", "-x", "backbone", "é", "a\n", "a" * 129, "a" * 128, "3.A_b-c"]
    adapter = workshop.directory("rival")
    (said,) = ask({"ask": "names", "where": str(small), "adapter": str(adapter), "names": names})
    for name, found in zip(names, said, strict=True):
        refused = None
        try:
            check_name(name)
        except OptionError as error:
            refused = str(error)
        assert (found is None) == (refused is None), (name, found, refused)
        if found is not None:
            assert "the name backbone is reserved" in found or "expected letters" in found


def test_numbers_of_images_that_do_not_fit(ask, small):
    said = ask(
        *(
            {"ask": "logits", "where": str(small), "images": encoded(batch), "adapters": names}
            for batch, names in (
                (np.zeros(10, np.float32), ["alpha"]),
                (images(2), ["alpha"]),
                (images(1), ["alpha", "gamma"]),
                (images(1)[:0], []),
            )
        )
    )
    for answer, count in zip(said, (10, 6144, 3072, 0), strict=True):
        assert "HhdeployError: images: expected 3072 values ([3,32,32])" in answer["error"]
        assert f"found {count} values" in answer["error"]


def test_a_line_that_would_be_resized_to_a_vast_one(ask, small):
    """As Python does, before it takes the memory."""
    sizes = ((300_000, 1), (1, 300_000))
    taken = [{"data": encoded(np.zeros(0)), "width": w, "height": h} for w, h in sizes]
    question = {"ask": "classify", "where": str(small), "adapters": ["alpha"]}
    with open_session(small, device="cpu", threads=1) as session:
        for (width, height), picture in zip(sizes, taken, strict=True):
            image = Image.new("RGB", (width, height))
            with pytest.raises(DataError) as error:
                session.classify([image], ["alpha"])
            (answer,) = ask({**question, "pictures": [picture]})
            assert str(error.value) in answer["error"]


def test_values_beyond_float16(ask, small, edited, tmp_path):
    """A float16 graph casts the row; the bundle only says that it has one."""
    bundle = copy_bundle(small, tmp_path / "small")
    told = Bundle.open(bundle).manifest
    graphs = {**told.graphs, "float16": told.graphs["float32"]}
    write_manifest(bundle, replace(told, graphs=graphs))
    folders = {"large": edited("large", times(1e5, "d")), "fits": edited("fits", times(10, "d"))}
    (there,) = ask(question(bundle, folders))
    for said in (there, refusals(bundle, folders)):
        assert "is beyond float16's range (65504)" in said["large"]
        assert said["fits"] is None


def test_another_activation(ask, small, edited, tmp_path):
    bundle = copy_bundle(small, tmp_path / "small")
    told = Bundle.open(bundle).manifest
    args = {**told.backbone.args, "act_layer": "silu"}
    write_manifest(bundle, replace(told, backbone=replace(told.backbone, args=args)))
    folders = {
        name: edited(name, says(base_model_args={"act_layer": name}))
        for name in ("swish", "gelu_tanh")
    }
    (there,) = ask(question(bundle, folders))
    for said in (there, refusals(bundle, folders)):
        assert said["swish"] is None
        assert re.search("with act_layer .gelu_tanh., the backbone has .silu.", said["gelu_tanh"])


def test_a_bundle_without_room_for_a_classifier(ask, workshop, edited, tmp_path):
    """All of its adapters answer with the backbone's."""
    workshop.export(tmp_path / "bundle", ["headless"])
    folders = {"omega": edited("omega", says(target_modules=["k"]))}
    fitting = re.compile(r"head\..*|.*\.qkv\.k\.[uvd]")
    has(lambda t: [t.pop(key) for key in list(t) if not fitting.fullmatch(key)])(folders["omega"])
    (there,) = ask(question(tmp_path / "bundle", folders))
    assert "--max-classes 7" in there["omega"]
    assert "has 7 classes, the bundle has room for 0" in str(
        refusals(tmp_path / "bundle", folders)["omega"]
    )


def test_targets_stand_for_the_same_sites(ask):
    """The table of kinds is in both languages."""
    paths = [
        f"blocks.{i}.{suffix}" for i in (0, 10) for suffix in (*_KIND_OF, "attn.qkv", "mlp.3x")
    ]
    paths += [*_KIND_OF, "attn_pool.attn.q", "pooler.output.dense", "head.mlp.fc1", "other"]
    paths += [f"encoder.{fused}" for fused in ("attention.qkv", "self_attention.in_proj")]
    linears = [linear_spec(path, 9, 4) for path in dict.fromkeys(paths)]
    linears.append(linear_spec("stages.1.attn.qkv", 9, 4, thirds=False))
    targets = [*KINDS, *paths, "query", "attn.q", "qkv", "out_proj", r"blocks\.1.*", "block", ".*"]
    expected = [[s.name for s in select_sites(linears, [t])[t]] for t in targets]
    told = [{"linear": spec.path, "sites": [s.name for s in spec.sites]} for spec in linears]
    assert ask({"ask": "sites", "linears": told, "targets": targets}) == [expected]
