"""Adapter directories: what is read exactly, and every refusal with its message."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE, AdapterConfig, parse_config
from hhdeploy.adapters.format import Adapter, Head, SiteTensors, load_adapter, save_adapter
from hhdeploy.errors import AdapterError, WriteError
from hhdeploy.files.tensors import read_tensors, write_tensors
from hhdeploy.preprocess import Preprocess

OUT, IN, R, CLASSES, DIM = 7, 13, 2, 5, 11
SITE = "blocks.0.attn.proj"


def content():
    """A valid adapter_config.json."""
    return {
        "peft_type": "HTA",
        "schema_version": 1,
        "base_model_name_or_path": "vit_base_patch16_224",
        "base_model_args": {"img_size": 224},
        "base_sha256": None,
        "form": "additive",
        "reflection": "unnormalized",
        "r": 2,
        "target_modules": ["proj"],
        "num_classes": CLASSES,
        "class_names": ["a", "b", "c", "d", "e"],
        "preprocess": {
            "input_size": [3, 224, 224],
            "mean": [0.5, 0.4, 0.3],
            "std": [0.5, 0.6, 0.7],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
        },
    }


def tensors():
    """Valid tensors of one site and a head."""
    generator = torch.Generator().manual_seed(2)
    shapes = {
        f"{SITE}.u": (OUT,),
        f"{SITE}.v": (IN,),
        f"{SITE}.d": (min(OUT, IN),),
        f"{SITE}.lora_A": (R, IN),
        f"{SITE}.lora_B": (OUT, R),
        "head.weight": (CLASSES, DIM),
        "head.bias": (CLASSES,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(directory, config=None, arrays=None):
    """An adapter directory with these contents, unchecked."""
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(config or content()), encoding="utf-8")
    save_file(tensors() if arrays is None else arrays, directory / TENSOR_FILE)
    return directory


def refused(directory, *parts):
    """`load_adapter` fails and its message holds all ``parts``."""
    with pytest.raises(AdapterError) as caught:
        load_adapter(directory)
    message = str(caught.value)
    for part in parts:
        assert str(part) in message, f"{part!r} is not in {message!r}"
    return message


def refused_tensors(directory, arrays, *parts):
    write(directory, arrays=arrays)
    return refused(directory, directory / TENSOR_FILE, *parts)


def refused_config(directory, changes, *parts):
    config = content() | changes
    write(directory, {k: v for k, v in config.items() if v is not ...})
    return refused(directory, directory / CONFIG_FILE, *parts)


# -- what is accepted ---------------------------------------------------------------------------


def test_load(tmp_path):
    adapter = load_adapter(write(tmp_path / "a"))
    expected = {name: t.numpy() for name, t in tensors().items()}
    for name in ("u", "v", "d", "lora_A", "lora_B"):
        assert np.array_equal(getattr(adapter.sites[SITE], name), expected[f"{SITE}.{name}"])
    assert adapter.sites[SITE].shape == (OUT, IN)
    assert adapter.head.path == "head"
    assert np.array_equal(adapter.head.weight, expected["head.weight"])
    assert np.array_equal(adapter.head.bias, expected["head.bias"])
    assert adapter.parameters == OUT + IN + min(OUT, IN) + R * IN + OUT * R
    assert adapter.config.class_names == ("a", "b", "c", "d", "e")
    assert adapter.config.preprocess.mean == (0.5, 0.4, 0.3)
    assert adapter.source == str(tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_exactly(tmp_path, dtype):
    arrays = {name: t.to(dtype) for name, t in tensors().items()}
    adapter = load_adapter(write(tmp_path / "a", arrays=arrays))
    for name in ("u", "v", "d", "lora_A", "lora_B"):
        value = getattr(adapter.sites[SITE], name)
        assert value.dtype == np.float32
        assert np.array_equal(value, arrays[f"{SITE}.{name}"].float().numpy())
    assert np.array_equal(adapter.head.weight, arrays["head.weight"].float().numpy())


def test_bfloat16_extremes_and_empty_tensors_are_read_exactly(tmp_path):
    values = torch.tensor([0.0, -0.0, 1e-40, 3.3e38, -1.0078125, 1 / 3], dtype=torch.bfloat16)
    file = tmp_path / "x.safetensors"
    save_file(
        {"x": values, "empty": torch.zeros(0, 3, dtype=torch.bfloat16), "y": torch.ones(2)}, file
    )
    found, _ = read_tensors(file, AdapterError)
    expected = values.float().numpy()
    assert np.array_equal(found["x"].view(np.uint32), expected.view(np.uint32))
    assert found["empty"].shape == (0, 3)
    assert np.array_equal(found["y"], np.ones(2))


def test_mixed_types_in_one_file(tmp_path):
    arrays = tensors()
    arrays[f"{SITE}.u"] = arrays[f"{SITE}.u"].bfloat16()
    arrays[f"{SITE}.v"] = arrays[f"{SITE}.v"].half()
    arrays[f"{SITE}.d"] = arrays[f"{SITE}.d"].double()
    site = load_adapter(write(tmp_path / "a", arrays=arrays)).sites[SITE]
    for name in ("u", "v", "d"):
        value = getattr(site, name)
        assert value.dtype == np.float32
        assert np.array_equal(value, arrays[f"{SITE}.{name}"].float().numpy())


def test_pure_low_rank_and_pure_householder_sites(tmp_path):
    arrays = {k: v for k, v in tensors().items() if "lora" in k or "head" in k}
    low_rank = load_adapter(write(tmp_path / "l", arrays=arrays))
    assert low_rank.sites[SITE].u is None
    assert low_rank.sites[SITE].shape == (OUT, IN)
    assert low_rank.delta(SITE).rank == R
    arrays = {k: v for k, v in tensors().items() if "lora" not in k}
    householder = load_adapter(write(tmp_path / "h", arrays=arrays))
    assert householder.sites[SITE].lora_A is None
    assert householder.delta(SITE).rank == 2


def test_rank_zero(tmp_path):
    arrays = tensors() | {
        f"{SITE}.lora_A": torch.zeros(0, IN),
        f"{SITE}.lora_B": torch.zeros(OUT, 0),
    }
    assert load_adapter(write(tmp_path / "a", arrays=arrays)).delta(SITE).rank == 2


def test_without_a_head(tmp_path):
    arrays = {k: v for k, v in tensors().items() if "head" not in k}
    assert load_adapter(write(tmp_path / "a", arrays=arrays)).head is None


def test_a_missing_head_bias_is_zero_and_num_classes_follows_the_head(tmp_path):
    arrays = tensors()
    del arrays["head.bias"]
    config = content() | {"num_classes": None}
    adapter = load_adapter(write(tmp_path / "a", config, arrays))
    assert np.array_equal(adapter.head.bias, np.zeros(CLASSES))
    assert adapter.config.num_classes == CLASSES


def test_unknown_json_keys_are_kept(tmp_path):
    note = {"author": "someone", "epochs": [1, 2]}
    adapter = load_adapter(write(tmp_path / "a", content() | {"note": note}))
    assert adapter.config.extra == {"note": note}
    save_adapter(adapter, tmp_path / "b")
    assert json.loads((tmp_path / "b" / CONFIG_FILE).read_text())["note"] == note


def test_save_and_load_give_the_same(tmp_path):
    first = load_adapter(write(tmp_path / "a"))
    save_adapter(first, tmp_path / "b")
    second = load_adapter(tmp_path / "b")
    assert second.config == first.config
    for name in ("u", "v", "d", "lora_A", "lora_B"):
        ours, theirs = getattr(second.sites[SITE], name), getattr(first.sites[SITE], name)
        assert np.array_equal(ours, theirs)
    assert np.array_equal(second.head.weight, first.head.weight)
    assert (tmp_path / "b" / TENSOR_FILE).stat().st_mode & 0o444 == 0o444


def test_save_refuses_an_existing_directory_and_what_load_would_refuse(tmp_path):
    adapter = load_adapter(write(tmp_path / "a"))
    with pytest.raises(WriteError, match="already exists"):
        save_adapter(adapter, tmp_path / "a")
    site = adapter.sites[SITE]
    broken = replace(adapter, sites={SITE: replace(site, u=np.full(OUT, np.nan, np.float32))})
    before = (tmp_path / "a" / TENSOR_FILE).read_bytes()
    with pytest.raises(AdapterError, match=re.escape(f"{SITE}.u")):
        save_adapter(broken, tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / TENSOR_FILE).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fold_only": "no"}, "fold_only: expected True or False, found 'no'"),
        ({"fold_only": np.zeros(2)}, "fold_only: expected True or False, found array"),
        ({"target_modules": "qv"}, "target_modules: expected a list of strings, found 'qv'"),
        ({"target_modules": None}, "target_modules: expected a list of strings, found None"),
        ({"class_names": 3}, "class_names: expected a list of strings, found 3"),
        ({"base_model_args": None}, "base_model_args: expected a dictionary, found None"),
        ({"extra": ["a"]}, r"extra: expected a dictionary, found \['a'\]"),
        ({"extra": {"r": 7}}, "extra: expected keys of its own, not r, found {'r': 7}"),
        ({"license": {}}, "license: expected the name of a licence, a list of them, or null"),
        ({"license": {"mit": 1}}, "license: expected the name of a licence, a list"),
        ({"preprocess": "clip"}, r"preprocess: expected Preprocess\(...\), found 'clip'"),
        ({"compressed": [1]}, r"compressed: expected Compression\(...\), found \[1\]"),
        ({"base_signs": 3}, "base_signs: expected 64 hex digits or None, found 3"),
        ({"problem_type": np.zeros(2)}, "problem_type: expected one of single_label"),
        ({"base_model": b"x"}, "cannot be written as JSON"),
        ({"r": "2"}, "r: expected a rank of 0 or more, found '2'"),
    ],
)
def test_save_refuses_a_configuration_that_says_something_else(tmp_path, settings, message):
    """Of fold_only "no" was yes, of targets "qv" were q and v, a key of ``extra`` won."""
    adapter = load_adapter(write(tmp_path / "from"))
    config = replace(adapter.config, **settings)
    with pytest.raises(AdapterError, match=message):
        save_adapter(replace(adapter, config=config), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_save_takes_numpys_numbers_and_one_licence(tmp_path):
    adapter = load_adapter(write(tmp_path / "from"))
    config = replace(adapter.config, r=np.int64(2), license="MIT", fold_only=np.bool_(False))
    save_adapter(replace(adapter, config=config), tmp_path / "a")
    found = load_adapter(tmp_path / "a").config
    assert (found.r, found.license, found.fold_only) == (2, ("MIT",), False)


def test_defaults_of_a_short_configuration():
    config = parse_config(
        {"peft_type": "HTA", "schema_version": 1, "base_model_name_or_path": "vit_x"}, "here"
    )
    assert config == AdapterConfig("vit_x")
    assert config.target_modules == ("q", "k", "v", "proj")


# -- tensors that are refused -------------------------------------------------------------------


def test_unknown_tensor_key(tmp_path):
    arrays = tensors() | {f"{SITE}.gate": torch.zeros(3)}
    refused_tensors(tmp_path / "a", arrays, "unknown tensor key", f"'{SITE}.gate'", ".lora_A")


def test_a_tensor_key_without_a_site(tmp_path):
    refused_tensors(tmp_path / "a", tensors() | {"u": torch.zeros(3)}, "unknown tensor key 'u'")


@pytest.mark.parametrize(
    ("missing", "found"), [("u", "v"), ("v", "u"), ("d", "u"), ("lora_A", "lora_B")]
)
def test_missing_tensor_key(tmp_path, missing, found):
    arrays = tensors()
    del arrays[f"{SITE}.{missing}"]
    refused_tensors(
        tmp_path / "a", arrays, f"missing tensor key {SITE}.{missing};", f"found {SITE}.{found}"
    )


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("d", (OUT + 1,), [OUT]),
        ("lora_A", (R, IN + 1), [R, IN]),
        ("lora_B", (OUT, R + 1), [OUT, R]),
        ("lora_B", (R, OUT), [OUT, R]),
    ],
)
def test_wrong_shape(tmp_path, name, shape, expected):
    arrays = tensors() | {f"{SITE}.{name}": torch.zeros(shape)}
    refused_tensors(
        tmp_path / "a", arrays, f"{SITE}.{name}", f"expected shape {expected}", list(shape)
    )


@pytest.mark.parametrize(
    ("name", "shape", "dims"),
    [("u", (OUT, 1), 1), ("v", (1, IN), 1), ("d", (), 1), ("lora_A", (R,), 2)],
)
def test_wrong_number_of_dimensions_blames_the_right_tensor(tmp_path, name, shape, dims):
    arrays = tensors() | {f"{SITE}.{name}": torch.zeros(shape)}
    refused_tensors(
        tmp_path / "a", arrays, f"{SITE}.{name}: expected {dims} dimension", f"found {list(shape)}"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [f"{SITE}.v", f"{SITE}.lora_B", "head.bias"])
def test_values_that_are_not_finite(tmp_path, key, value):
    arrays = tensors()
    arrays[key].view(-1)[3] = value
    parts = (key, "expected finite", f"NaN or infinity in 1 of {arrays[key].numel()}", "diverged")
    refused_tensors(tmp_path / "a", arrays, *parts)


def test_float64_values_outside_the_range_of_float32(tmp_path):
    arrays = tensors() | {f"{SITE}.u": torch.full((OUT,), 1e300, dtype=torch.float64)}
    refused_tensors(tmp_path / "a", arrays, f"{SITE}.u", "expected finite", f"{OUT} of {OUT}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integer_tensors(tmp_path, dtype):
    arrays = tensors() | {f"{SITE}.u": torch.ones(OUT, dtype=dtype)}
    kind = str(dtype).removeprefix("torch.")
    refused_tensors(tmp_path / "a", arrays, f"{SITE}.u: expected a float tensor, found {kind}")


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_other_types(tmp_path, dtype):
    arrays = tensors() | {f"{SITE}.u": torch.ones(OUT).to(dtype)}
    refused_tensors(tmp_path / "a", arrays, f"{SITE}.u has type", "expected float32")


def test_zero_sites(tmp_path):
    arrays = {k: v for k, v in tensors().items() if "head" in k}
    refused_tensors(tmp_path / "a", arrays, "zero sites found", "blocks.0.attn.proj.u")
    write(tmp_path / "head", content() | {"target_modules": []}, arrays)
    found = load_adapter(tmp_path / "head")
    assert not found.sites and found.head is not None
    save_adapter(found, tmp_path / "again")
    assert load_adapter(tmp_path / "again").config == found.config
    write(tmp_path / "nothing", content() | {"target_modules": [], "num_classes": None}, {})
    refused(tmp_path / "nothing", tmp_path / "nothing", "zero sites found")


def test_two_classifiers(tmp_path):
    arrays = tensors() | {"head_dist.weight": torch.zeros(CLASSES, DIM)}
    refused_tensors(tmp_path / "a", arrays, "expected one classifier", "head, head_dist")


def test_head_without_a_weight(tmp_path):
    arrays = tensors()
    del arrays["head.weight"]
    refused_tensors(tmp_path / "a", arrays, "head: expected a classifier's .weight", "head.bias")


def test_head_rows(tmp_path):
    arrays = tensors() | {"head.weight": torch.zeros(CLASSES + 1, DIM)}
    refused_tensors(
        tmp_path / "a",
        arrays,
        f"head.weight: expected {CLASSES} rows (num_classes), found {CLASSES + 1}",
    )
    arrays = tensors() | {"head.weight": torch.zeros(CLASSES)}
    refused_tensors(tmp_path / "a", arrays, "expected shape [classes, dim]", f"[{CLASSES}]")


def test_head_bias_shape(tmp_path):
    arrays = tensors() | {"head.bias": torch.zeros(CLASSES + 1)}
    refused_tensors(
        tmp_path / "a", arrays, f"head.bias: expected shape [{CLASSES}]", f"[{CLASSES + 1}]"
    )


def test_truncated_file(tmp_path):
    directory = write(tmp_path / "a")
    payload = (directory / TENSOR_FILE).read_bytes()
    for size in (len(payload) - 1, len(payload) // 2, 9, 4, 0):
        (directory / TENSOR_FILE).write_bytes(payload[:size])
        refused(directory, directory / TENSOR_FILE, "cannot be read as safetensors", "truncated")


def test_truncated_bfloat16_file(tmp_path):
    directory = write(tmp_path / "a", arrays={k: v.bfloat16() for k, v in tensors().items()})
    payload = (directory / TENSOR_FILE).read_bytes()
    (directory / TENSOR_FILE).write_bytes(payload[:-3])
    refused(directory, directory / TENSOR_FILE, "cannot be read as safetensors")


def test_a_pickle_is_not_read(tmp_path):
    directory = write(tmp_path / "a")
    torch.save(tensors(), directory / TENSOR_FILE)
    refused(directory, directory / TENSOR_FILE, "cannot be read as safetensors")


def test_missing_files(tmp_path):
    refused(tmp_path / "none", tmp_path / "none", "is not a directory", CONFIG_FILE, TENSOR_FILE)
    directory = write(tmp_path / "a")
    (directory / TENSOR_FILE).unlink()
    refused(directory, directory / TENSOR_FILE, "does not exist")
    (directory / CONFIG_FILE).unlink()
    refused(directory, directory / CONFIG_FILE, "does not exist")


# -- configurations that are refused ------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "{", "peft_type: HTA", '{"peft_type": "HTA",}', '{"x": ' + "9" * 5000 + "}", "[" * 10**5],
    ids=["empty", "cut", "YAML", "comma", "digits", "deep"],
)
def test_non_json(tmp_path, text):
    directory = write(tmp_path / "a")
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    assert "sys." not in refused(directory, directory / CONFIG_FILE, "is not valid JSON")


def test_json_that_is_not_text_or_not_an_object(tmp_path):
    directory = write(tmp_path / "a")
    (directory / CONFIG_FILE).write_bytes(b"\xff\xfe\x00{")
    refused(directory, directory / CONFIG_FILE, "is not valid JSON")
    (directory / CONFIG_FILE).write_text("[1, 2]", encoding="utf-8")
    refused(directory, directory / CONFIG_FILE, "expected a JSON object, found list")


def test_a_configuration_that_is_a_pipe(tmp_path):
    directory = write(tmp_path / "a")
    (directory / CONFIG_FILE).unlink()
    os.mkfifo(directory / CONFIG_FILE)
    refused(directory, directory / CONFIG_FILE, "it is a pipe; a plain file was expected")


@pytest.mark.parametrize("kind", ["LORA", "HRA", None])
def test_peft_type(tmp_path, kind):
    refused_config(
        tmp_path / "a",
        {"peft_type": kind},
        f"peft_type: expected 'HTA', found {kind!r}",
        "import_adapter()",
    )


def test_newer_schema_version(tmp_path):
    refused_config(
        tmp_path / "a",
        {"schema_version": 3},
        "schema_version: expected at most 2, found 3",
        "newer hhdeploy",
    )


@pytest.mark.parametrize(
    ("changes", "key", "found"),
    [
        ({"schema_version": ...}, "schema_version", "None"),
        ({"schema_version": "1"}, "schema_version", "'1'"),
        ({"schema_version": True}, "schema_version", "True"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path", "''"),
        ({"base_model_name_or_path": ...}, "base_model_name_or_path", "None"),
        ({"base_model_args": [1]}, "base_model_args", "[1]"),
        ({"form": "parallel"}, "form", "'parallel'"),
        ({"reflection": "givens"}, "reflection", "'givens'"),
        ({"r": -1}, "r", "-1"),
        ({"r": 1.5}, "r", "1.5"),
        ({"target_modules": 5}, "target_modules", "5"),
        ({"target_modules": ["blocks.["]}, "target_modules", "blocks.["),
        ({"form": "sequential", "target_modules": ["q"]}, "target_modules", "'q'"),
        ({"num_classes": 0}, "num_classes", "0"),
        ({"num_classes": "5"}, "num_classes", "'5'"),
        ({"class_names": "abcde"}, "class_names", "'abcde'"),
        ({"class_names": [1, 2, 3, 4, 5]}, "class_names", "[1, 2"),
        ({"base_sha256": 5}, "base_sha256", "5"),
        ({"base_signs_sha256": 5}, "base_signs_sha256", "5"),
        ({"problem_type": "ranking"}, "problem_type", "'ranking'"),
        (
            {"compressed": {"rank": 1, "max_range_error": float("nan"), "worst_site": "x"}},
            "compressed",
            "nan",
        ),
    ],
)
def test_wrong_values(tmp_path, changes, key, found):
    refused_config(tmp_path / "a", changes, f"{key}: expected", found)


def test_a_single_class_is_no_classification(tmp_path):
    changes = {"problem_type": "single_label_classification", "num_classes": 1, "class_names": None}
    refused_config(tmp_path / "a", changes, "needs 2 classes or more", "regression")


def test_class_names_count(tmp_path):
    refused_config(
        tmp_path / "a",
        {"class_names": ["a", "b"]},
        f"class_names: expected {CLASSES} names, one per class, found 2",
    )
    write(tmp_path / "b", content() | {"class_names": ["a", "b"], "num_classes": None})
    refused(
        tmp_path / "b",
        tmp_path / "b",
        f"class_names: expected {CLASSES} names, one per class, found 2",
    )


def test_a_key_that_is_there_twice(tmp_path):
    directory = write(tmp_path / "a")
    text = (directory / CONFIG_FILE).read_text().rstrip()
    (directory / CONFIG_FILE).write_text(text[:-1] + ', "form": "additive"}')
    refused(directory, directory / CONFIG_FILE, "'form' is there twice")


def test_half_a_character(tmp_path):
    names = ["\ud800", *"bcde"]
    refused_config(tmp_path / "a", {"class_names": names}, "'class_names'", r"found '\ud800', half")
    with pytest.raises(AdapterError, match="'note': expected text that UTF-8 has"):
        parse_config(content() | {"note": {"of": "\udfff"}}, "here")


@pytest.mark.parametrize("img_size", [240, [224, 240], 240.0, "224", {"of": 224}])
def test_image_sizes_that_disagree(tmp_path, img_size):
    refused_config(
        tmp_path / "a",
        {"base_model_args": {"img_size": img_size}},
        "the image sizes disagree",
        f"img_size is {img_size!r}",
        "[3, 224, 224]",
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"mean": ...}, ("preprocess lacks mean",)),
        ({"input_size": [1, 224, 224]}, ("preprocess.mean", "1 numbers (a channel each)")),
        ({"input_size": [224, 224]}, ("preprocess.input_size", "[224, 224]")),
        ({"std": [0.5, 0.0, 0.5]}, ("preprocess.std", "[0.5, 0.0, 0.5]")),
        ({"mean": [0.5]}, ("preprocess.mean", "[0.5]")),
        ({"mean": [0.5, float("nan"), 0.5]}, ("preprocess.mean", "finite", "[0.5, nan, 0.5]")),
        ({"std": [0.5, float("inf"), 0.5]}, ("preprocess.std", "finite", "[0.5, inf, 0.5]")),
        ({"interpolation": "magic"}, ("preprocess.interpolation", "bicubic", "'magic'")),
        ({"crop_mode": "random"}, ("preprocess.crop_mode", "squash", "'random'")),
        ({"crop_pct": 0}, ("preprocess.crop_pct", "(0, 2]")),
        ({"crop_pct": "most"}, ("most",)),
        ({"crop_pct": 10**400}, ("preprocess.crop_pct", "(0, 2]")),
        ({"mean": [10**400, 0.5, 0.5]}, ("preprocess.mean", "finite")),
        ({"input_size": [3, 224, 224.5]}, ("preprocess.input_size", "224.5")),
        ({"input_size": [3, 224, float("inf")]}, ("preprocess.input_size", "inf")),
    ],
)
def test_preprocess_that_is_wrong(tmp_path, changes, parts):
    preprocess = content()["preprocess"] | changes
    kept = {k: v for k, v in preprocess.items() if v is not ...}
    refused_config(tmp_path / "a", {"preprocess": kept}, *parts)


def test_preprocess_that_is_not_an_object(tmp_path):
    refused_config(tmp_path / "a", {"preprocess": "center"}, "preprocess")


# -- in memory ----------------------------------------------------------------------------------


def test_counts_and_forms_of_an_adapter_in_memory():
    site = SiteTensors(lora_A=np.zeros((2, 3), np.float32), lora_B=np.zeros((5, 2), np.float32))
    head = Head("head", np.zeros((2, 3), np.float32), np.zeros(2, np.float32))
    adapter = Adapter(AdapterConfig("vit_x"), {"blocks.0.attn.proj": site}, head)
    assert adapter.parameters == 2 * 3 + 5 * 2
    assert adapter.form == "additive"
    assert site.shape == (5, 3)


def test_the_configuration_survives_json():
    preprocess = Preprocess((3, 32, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "lanczos", 0.9, "border")
    assert "problem_type" not in AdapterConfig("vit_x").to_json()
    config = AdapterConfig(
        "vit_x", preprocess=preprocess, problem_type="regression", extra={"kept": 1}
    )
    assert parse_config(json.loads(json.dumps(config.to_json())), "here") == config


def test_tensor_files_are_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "x.safetensors"
    write_tensors(target, {"x": np.arange(6, dtype=np.float32).reshape(2, 3).T}, {"key": "value"})
    found, metadata = read_tensors(target, AdapterError)
    assert metadata == {"key": "value"}
    assert np.array_equal(found["x"], [[0, 3], [1, 4], [2, 5]])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


# -- s_in, s_out, db and values -------------------------------------------------------------------

NORM = "blocks.1.norm1.weight"


def scaled(**shapes):
    """The valid tensors, and s_in, s_out and db of the site."""
    generator = torch.Generator().manual_seed(3)
    wanted = {"s_in": (IN,), "s_out": (OUT,), "db": (OUT,), **shapes}
    more = {f"{SITE}.{n}": torch.randn(s, generator=generator) for n, s in wanted.items()}
    return tensors() | more


def test_multipliers_and_a_bias_are_read_and_written_as_trained(tmp_path):
    arrays = scaled()
    adapter = load_adapter(write(tmp_path / "a", content() | {"schema_version": 2}, arrays))
    assert list(adapter.sites[SITE].parts) == ["s_in", "s_out", "db"]
    change = adapter.change(SITE)
    found = {"s_in": change.scales.s_in, "s_out": change.scales.s_out, "db": change.db}
    for name, value in found.items():
        assert np.array_equal(value, arrays[f"{SITE}.{name}"].double().numpy()), name
    assert adapter.parameters == load_adapter(write(tmp_path / "b")).parameters + IN + 2 * OUT
    save_adapter(adapter, tmp_path / "c")
    written, _ = read_tensors(tmp_path / "c" / TENSOR_FILE, AssertionError)
    assert {n: t.tobytes() for n, t in written.items()} == {
        n: t.numpy().tobytes() for n, t in arrays.items()
    }


def test_a_site_may_have_nothing_but_a_multiplier(tmp_path):
    arrays = {f"{SITE}.s_out": torch.ones(OUT)}
    adapter = load_adapter(write(tmp_path / "a", arrays=arrays))
    assert adapter.sites[SITE].shape is None
    assert adapter.delta(SITE) is None
    assert adapter.change(SITE).delta is None
    assert adapter.parameters == OUT


@pytest.mark.parametrize(
    ("shapes", "key", "expected"),
    [
        ({"s_in": (IN + 1,)}, "s_in", [IN]),
        ({"s_out": (OUT + 1,)}, "s_out", [OUT]),
        ({"db": (IN,)}, "db", [OUT]),
    ],
)
def test_parts_that_do_not_fit_the_site(tmp_path, shapes, key, expected):
    arrays = scaled(**shapes)
    found = list(arrays[f"{SITE}.{key}"].shape)
    refused_tensors(tmp_path / "a", arrays, f"{SITE}.{key}", f"{expected}", f"{found}")


def test_parts_that_do_not_fit_each_other(tmp_path):
    arrays = {f"{SITE}.s_out": torch.ones(OUT), f"{SITE}.db": torch.ones(OUT + 1)}
    refused_tensors(tmp_path / "a", arrays, f"{SITE}.db", f"[{OUT}]", f"[{OUT + 1}]")


def test_the_sequential_matrix_does_not_see_the_input(tmp_path):
    """M is out x out, s_in has the Linear's own inputs."""
    config = content() | {"form": "sequential", "schema_version": 2}
    arrays = {
        f"{SITE}.lora_A": torch.ones(R, OUT),
        f"{SITE}.lora_B": torch.ones(OUT, R),
        f"{SITE}.s_in": torch.ones(IN),
    }
    adapter = load_adapter(write(tmp_path / "a", config, arrays))
    assert adapter.sites[SITE].s_in.size == IN


def test_the_schema_is_2_only_where_it_is_needed(tmp_path):
    plain = load_adapter(write(tmp_path / "plain"))
    more = load_adapter(write(tmp_path / "more", arrays=scaled()))
    config = replace(plain.config, fold_only=True)
    versions = {}
    for name, adapter in {
        "plain": plain,
        "more": more,
        "flag": replace(plain, config=config),
        "values": replace(plain, config=config, values={NORM: np.ones(3, np.float32)}),
    }.items():
        save_adapter(adapter, tmp_path / "out" / name)
        written = json.loads((tmp_path / "out" / name / CONFIG_FILE).read_text())
        versions[name] = (written["schema_version"], written.get("fold_only"))
    assert versions == {
        "plain": (1, None),
        "more": (2, None),
        "flag": (2, True),
        "values": (2, True),
    }


def test_values_of_parameters(tmp_path):
    config = content() | {"schema_version": 2, "fold_only": True, "target_modules": []}
    arrays = {f"{NORM}.value": torch.full((3,), 0.5), "head.weight": torch.ones(CLASSES, DIM)}
    adapter = load_adapter(write(tmp_path / "a", config, arrays))
    assert adapter.sites == {}
    assert np.array_equal(adapter.values[NORM], np.full(3, 0.5, np.float32))
    assert adapter.parameters == 3
    save_adapter(adapter, tmp_path / "b")
    assert np.array_equal(load_adapter(tmp_path / "b").values[NORM], adapter.values[NORM])


def test_values_without_fold_only(tmp_path):
    arrays = tensors() | {f"{NORM}.value": torch.ones(3)}
    refused_tensors(tmp_path / "a", arrays, f"{NORM}.value", "fold_only: true", "found false")


@pytest.mark.parametrize("wrong", [1, "true", None])
def test_fold_only_is_true_or_false(tmp_path, wrong):
    refused_config(tmp_path / "a", {"fold_only": wrong}, "fold_only", "true or false", repr(wrong))


def test_no_target_is_for_what_has_no_site(tmp_path):
    write(tmp_path / "a", content() | {"target_modules": []})
    refused(tmp_path / "a", tmp_path / "a" / TENSOR_FILE, "target_modules", "[]")
