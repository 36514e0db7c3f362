"""The C++ example on OpenVINO, built and run: it finds what Python finds."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hhdeploy.adapters.format import save_adapter
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.answers import best
from hhdeploy.bundle.manifest import BANK_FILE, MANIFEST, write_manifest
from hhdeploy.errors import DataError
from hhdeploy.preprocess import open_image
from hhdeploy.runtime import open_session
from tests.broken_manifests import (
    BROKEN,
    NO_BANK,
    NO_JSON,
    OF_FOLDED,
    OF_OTHER_GRAPHS,
    OF_OTHER_PICTURES,
    OF_OTHER_ROWS,
    broken,
    exchange_rows,
    first,
    rewritten,
    whole,
    with_nan_for_a_head,
)
from tests.docs.pages import blocks, commands
from tests.once import made_once
from tests.quantised import INT8, int8_with_pictures
from tests.support import assert_caught, assert_parity, random_adapter, tiny_spec
from tests.workshop import ROOT, copy_bundle, flip_byte, run_command
from tests.wrong_logits import LOGITS, bundle_of_logits

EXAMPLE = ROOT / "examples" / "cpp"
BUILD, RUN = blocks("examples/cpp/README.md")
PHOTO = ROOT / "hhdeploy" / "verifying" / "photo.jpg"
# Odd sizes, of which some shrink in one direction and grow in the other; how they are stored.
PICTURES = {
    (451, 299): "RGB", (173, 297): "RGBA", (233, 67): "P", (29, 41): "L", (31, 17): "RGB",
}  # fmt: skip
BUILD_SECONDS = 600


def _json_headers() -> list[str]:
    """Where `pip install nlohmann-json` has them; elsewhere the compiler knows the place."""
    spec = importlib.util.find_spec("nlohmann_json")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return [str(Path(place) / "include") for place in places]


def _needs() -> None:
    """The test is skipped where something to build with lacks."""
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            pytest.skip(f"the C++ example needs {program}")
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("the C++ example needs openvino")
    includes = [f"-I{place}" for place in _json_headers()]
    for header in ("png.h", "openssl/evp.h", "nlohmann/json.hpp"):
        found = subprocess.run(
            ["c++", *includes, "-E", "-include", header, "-x", "c++", os.devnull],
            capture_output=True,
            check=False,
            timeout=BUILD_SECONDS,
        )
        if found.returncode:
            pytest.skip(f"the C++ example needs {header}, see examples/cpp/README.md")


@pytest.fixture(scope="session")
def program() -> Path:
    """The example, configured and built as its README says."""
    _needs()
    *_, configure, compile_it = commands(BUILD)
    assert configure.startswith("cmake -S examples/cpp -B build ")
    assert compile_it == "cmake --build build"

    def make(out: Path) -> None:
        settings = ["-DCMAKE_CXX_FLAGS=-Werror"]
        settings += [f"-DNLOHMANN_JSON={place}" for place in _json_headers()]
        # Not optimised: the example's own code is no part of a test's time.
        settings += ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0"]
        # Of the process PEFT makes CXX a compiler of C, once it builds what BOFT computes with.
        own = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
        for line in (f"{configure} {shlex.join(settings)}", compile_it):
            done = subprocess.run(
                ["bash", "-c", line.replace(" build", f" {shlex.quote(str(out))}")],
                cwd=ROOT,
                env={**own, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
                capture_output=True,
                text=True,
                check=False,
                timeout=BUILD_SECONDS,
            )
            assert done.returncode == 0, done.stdout + done.stderr

    return made_once("cpp", make) / "classify"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Parts of a photograph, as PNGs of several kinds."""
    folder = tmp_path_factory.mktemp("pictures")
    with Image.open(PHOTO) as photo:
        rgb = photo.convert("RGB")
    paths = []
    for (width, height), mode in PICTURES.items():
        part = rgb.crop((3, 1, 3 + width, 1 + height))
        if mode == "RGBA":
            part.putalpha(part.convert("L"))
        paths.append(folder / f"{width}x{height}.png")
        part.convert(mode).save(paths[-1])
    return paths


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def asked(program: Path, bundle: Path, pictures: Sequence[Path], *flags: str) -> Any:
    done = run(program, bundle, *pictures, *flags, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_as_python(bundle: Path, results: Sequence[dict[str, Any]]) -> None:
    """What the program said of each picture is what a session says, logits and all: of the same
    levels, since the example resizes as Pillow does."""
    images = [open_image(Path(result["picture"])) for result in results]
    names = [result["adapter"] for result in results]
    with open_session(bundle, device="openvino", threads=1, cache=None) as session:
        pixels = [
            session.preprocess([image], name) for image, name in zip(images, names, strict=True)
        ]
        logits = session.run(np.concatenate(pixels), names)
        answers = session.classify(images, names)
    for name in dict.fromkeys(names):
        chosen = [i for i, other in enumerate(names) if other == name]
        found = np.asarray([results[i]["logits"] for i in chosen])
        expected = logits[chosen][:, : found.shape[1]]
        assert np.isneginf(logits[chosen][:, found.shape[1] :]).all(), "all own columns"
        assert_parity(expected, found, "openvino", "float32")
    for result, answer in zip(results, answers, strict=True):
        shown = [a for a in best(answer, 0) if a.positive or a.problem_type == "regression"]
        said = {a["label"]: a["score"] for a in result["answers"]}
        assert said == pytest.approx({a.label: a.score for a in shown}, abs=1e-5)


@pytest.mark.parametrize("which", ["branches", "heads", "folded", "constant"])
def test_every_picture_for_every_adapter(request, program, pictures, which):
    bundle = request.getfixturevalue(which)
    results = asked(program, bundle, pictures)
    names = [entry.name for entry in Bundle.open(bundle).manifest.adapters]
    assert [(r["picture"], r["adapter"]) for r in results] == [
        (str(picture), name) for picture in pictures for name in names
    ]
    assert_as_python(bundle, results)


def test_pictures_by_the_graphs_of_the_bundle(program, small, pictures, tmp_path):
    """A level of 255 off now and then; another transform is seen."""
    exact, by_graphs = (
        np.asarray([r["logits"] for r in asked(program, small, pictures, *flags)], object)
        for flags in ((), ("--graphs",))
    )
    largest = max(np.ptp(np.asarray(row)) for row in exact)
    off = [np.abs(np.subtract(*rows)).max() for rows in zip(exact, by_graphs, strict=True)]
    assert max(off) <= 1e-2 * largest
    assert [np.argmax(row) for row in exact] == [np.argmax(row) for row in by_graphs]
    bundle = copy_bundle(small, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    own = replace(manifest.adapters[0].preprocess, mean=(0.31, 0.47, 0.62))
    write_manifest(
        bundle,
        replace(
            manifest,
            adapters=(replace(manifest.adapters[0], preprocess=own), *manifest.adapters[1:]),
        ),
    )
    moved = [r["logits"] for r in asked(program, bundle, pictures, "--graphs")]
    assert (
        max(np.abs(np.subtract(*r)).max() for r in zip(exact, moved, strict=True)) > 0.1 * largest
    )
    flip_byte(bundle / "preprocess.center.bicubic.onnx")
    done = run(program, bundle, pictures[0], "--graphs")
    assert done.returncode == 1 and "expected sha256" in done.stderr


def test_adapters_by_name_and_the_backbone(program, branches, pictures):
    flags = ("--adapter", "beta", "--adapter", "backbone")
    results = asked(program, branches, pictures[:2], *flags)
    assert [r["adapter"] for r in results] == ["beta", "backbone"] * 2
    assert_as_python(branches, results)
    done = run(program, branches, pictures[1], *flags)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines] == [
        [r["picture"], r["adapter"], r["answers"][0]["label"]] for r in results[2:]
    ]


def test_the_readme_s_lines(program, branches, pictures, tmp_path):
    """In a folder with `build`, pictures of these names, and the bundle; one for INT8."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "classify").symlink_to(program)
    (tmp_path / "OUT").symlink_to(branches)
    int8_with_pictures(tmp_path / "INT8")
    for name, picture in zip(("cat.png", "dog.png"), pictures, strict=False):
        (tmp_path / name).symlink_to(picture)
    count = len(Bundle.open(branches).manifest.adapters)
    printed = []
    for line in commands(RUN):
        words = shlex.split(line.replace("flowers", "alpha"))
        if "int8" in words:
            words = ["INT8" if word == "OUT" else word for word in words]
        done = run_command(words, cwd=tmp_path)
        assert done.returncode == 0, (line, done.stderr)
        printed.append(done.stdout)
    every, these, logits, graphs = printed
    assert len(every.splitlines()) == 2 * count
    assert [line.split("\t")[1] for line in these.splitlines()] == ["alpha", "backbone"]
    assert all(answer["logits"] for answer in json.loads(logits))
    assert len(graphs.splitlines()) == count


def test_another_adapter_is_another_answer(program, branches, pictures):
    """Alpha and rival have seven classes each: the comparison tells them apart."""
    results = asked(program, branches, pictures, "--adapter", "alpha", "--adapter", "rival")
    alpha, rival = (
        np.asarray([r["logits"] for r in results if r["adapter"] == name])
        for name in ("alpha", "rival")
    )
    assert_caught(alpha, rival, "openvino", "float32")


@pytest.mark.parametrize(
    ("mode", "interpolation", "crop_pct"),
    [
        ("center", "bilinear", 0.5),
        ("squash", "bicubic", 1.7),
        ("border", "bilinear", 0.7),
    ],
)
def test_transforms(program, small, pictures, tmp_path, mode, interpolation, crop_pct):
    """An adapter's own transform, beside one that crops otherwise, in one batch."""
    bundle = copy_bundle(small, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    alpha, gamma = manifest.adapters
    own = replace(
        alpha.preprocess,
        crop_mode=mode,
        interpolation=interpolation,
        crop_pct=crop_pct,
        mean=(0.31, 0.47, 0.62),
    )
    changed = (replace(alpha, preprocess=own), gamma)
    write_manifest(bundle, replace(manifest, adapters=changed))
    results = asked(program, bundle, pictures)
    assert_as_python(bundle, results)
    before = np.asarray(
        [r["logits"] for r in asked(program, small, pictures, "--adapter", "alpha")]
    )
    after = np.asarray([r["logits"] for r in results if r["adapter"] == "alpha"])
    assert_caught(before, after, "openvino", "float32")


def test_a_line_that_would_take_all_memory_is_refused(program, small, tmp_path):
    bundle = copy_bundle(small, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    alpha, gamma = manifest.adapters
    own = replace(alpha.preprocess, crop_pct=0.05)
    write_manifest(bundle, replace(manifest, adapters=(replace(alpha, preprocess=own), gamma)))
    line = tmp_path / "line.png"
    Image.new("RGB", (20_000, 1)).save(line)
    done = run(program, bundle, line, "--adapter", "alpha")
    message = (
        "a picture of 20000 x 1 pixels: its shorter edge as long as the model wants it makes "
        "12800000 x 640 of it. Cut it first."
    )
    assert (done.returncode, done.stderr) == (1, f"Error: {message}\n")
    with pytest.raises(DataError, match=message):
        own(Image.open(line))


def test_one_channel(program, pictures, tmp_path, workshop):
    """A model of grey pictures."""
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.exporting.bundles import export

    spec = tiny_spec(in_chans=1, depth=1, num_classes=7)
    save_adapter(random_adapter(load_backbone(spec).facts, classes=5), tmp_path / "grey")
    export(
        spec.model, {"grey": tmp_path / "grey"}, tmp_path / "out", model_args=spec.args,
        pretrained=False, seed=spec.seed, verify_images=2, cache=workshop.cache,
    )  # fmt: skip
    results = asked(program, tmp_path / "out", pictures)
    assert_as_python(tmp_path / "out", results)


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", BANK_FILE])
def test_a_tampered_file_is_refused(program, small, pictures, tmp_path, file):
    bundle = copy_bundle(small, tmp_path / "bundle")
    flip_byte(bundle / file)
    done = run(program, bundle, pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    expected = Bundle.open(small).manifest.files[file]
    assert f"{bundle / file}: expected sha256 {expected}, found " in done.stderr


def test_logits_that_are_no_numbers(program, small, pictures, tmp_path):
    bundle = bundle_of_logits(small, tmp_path / "bundle")
    good = {name: said for name, (_, _, said) in LOGITS.items() if said is not None}
    asks = (word for name in good for word in ("--adapter", name))
    done = run(program, bundle, pictures[1], *asks)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t")[1:3] for line in done.stdout.splitlines()]
    for name, said in good.items():
        assert sorted(label for who, label in lines if who == name) == sorted(said), name
    for name in LOGITS.keys() - good.keys():
        done = run(program, bundle, pictures[1], "--adapter", name)
        assert (done.returncode, done.stdout) == (1, ""), name
        assert f"adapter {name}: the logits are no numbers" in done.stderr


def test_pictures_that_it_does_not_take(program, small, tmp_path):
    """Each would otherwise be another picture than Python sees."""
    levels = np.random.default_rng(3).integers(0, 256, (37, 41, 3), np.uint8)
    picture = Image.fromarray(levels)
    exif = Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    lines = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n"
    for name, zipped in (("text", False), ("zipped", True)):
        info = PngInfo()
        info.add_text("Raw profile type exif", lines, zip=zipped)
        picture.save(tmp_path / f"{name}.png", pnginfo=info)
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    picture.save(tmp_path / "xmp.png", pnginfo=info)
    Image.fromarray(levels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    picture.save(tmp_path / "photo.jpg")
    picture.save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    turned = (tmp_path / "turned.png").read_bytes()
    (tmp_path / "crc.png").write_bytes(turned.replace(b"eXIf", b"eXIg"))
    for name, message in {
        **dict.fromkeys(("turned", "text", "zipped", "xmp"), "may say that it is to be turned"),
        "deep": "expected at most 8 bits a channel",
        **dict.fromkeys(("cut", "crc"), "cannot be decoded as a PNG"),
        "nowhere": "cannot be read",
    }.items():
        done = run(program, small, tmp_path / f"{name}.png")
        assert done.returncode == 1, name
        assert f"{name}.png" in done.stderr
        assert message in done.stderr, done.stderr
    assert "cannot be decoded" in run(program, small, tmp_path / "photo.jpg").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "usage: classify BUNDLE PICTURE.png"),
        ("BUNDLE", "usage: "),
        ("NOWHERE x.png", f"is not a bundle: it has no {MANIFEST}"),
        ("BUNDLE x.png --adapter nobody", "has no adapter nobody; it has alpha gamma."),
        ("BUNDLE x.png --adapter backbone", "has no adapter backbone; it has alpha gamma."),
        ("BUNDLE PICTURE --precision int8", "has no int8 graph; it has float32."),
        ("OLD PICTURE --precision int8", "alpha: an earlier version wrote the bundle, without how"),
        ("BUNDLE x.png --adapter", "--adapter needs a value"),
        ("BUNDLE x.png --loud", "unknown option --loud"),
    ],
)
def test_what_it_refuses(program, small, pictures, tmp_path, arguments, message):
    names = {"BUNDLE": small, "OLD": INT8, "NOWHERE": tmp_path, "PICTURE": pictures[0]}
    done = run(program, *(names.get(word, word) for word in arguments.split()))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr


WRONG = BROKEN | OF_OTHER_ROWS | OF_OTHER_PICTURES | OF_OTHER_GRAPHS


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_that_cannot_be_right(program, branches, pictures, tmp_path, name):
    change, message = WRONG[name]
    done = run(program, broken(branches, tmp_path / "bundle", change), pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(message, done.stderr), done.stderr


def test_all_that_a_manifest_may_say(program, branches, pictures, tmp_path):
    bundle = broken(branches, tmp_path / "bundle", whole)
    assert asked(program, bundle, pictures[:1]) == asked(program, branches, pictures[:1])


@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_json_is_refused(program, branches, pictures, tmp_path, name):
    bundle = rewritten(branches, tmp_path / "bundle", MANIFEST, NO_JSON[name])
    done = run(program, bundle, pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{MANIFEST}: expected JSON" in done.stderr


@pytest.mark.parametrize("name", NO_BANK)
def test_what_is_no_bank_is_refused(program, branches, pictures, tmp_path, name):
    bundle = rewritten(branches, tmp_path / "bundle", BANK_FILE, NO_BANK[name])
    done = run(program, bundle, pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(f"Error: .*{BANK_FILE}", done.stderr), done.stderr


def test_a_row_that_does_not_say_whose_its_head_is(program, branches, pictures, tmp_path):
    bundle = rewritten(branches, tmp_path / "bundle", BANK_FILE, with_nan_for_a_head)
    done = run(program, bundle, pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert "adapter alpha: expected a head.own of 0 or 1 in its row, found" in done.stderr


@pytest.mark.parametrize("name", OF_FOLDED)
def test_what_a_folded_bundle_cannot_be(program, folded, pictures, tmp_path, name):
    change, message = OF_FOLDED[name]
    done = run(program, broken(folded, tmp_path / "bundle", change), pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(rf"{MANIFEST}: .*({message})", done.stderr), done.stderr


def test_weights_that_are_a_link(program, branches, pictures, tmp_path):
    for file in branches.iterdir():
        (tmp_path / file.name).symlink_to(file)
    done = run(program, tmp_path, pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert "model.onnx.data is a link" in done.stderr and "(cp -rL)" in done.stderr


def test_what_a_transform_leaves_out_is_as_python_has_it(program, small, pictures, tmp_path):
    """Bicubic, from the centre."""

    def change(content):
        for key in ("interpolation", "crop_mode"):
            del first(content)["preprocess"][key]

    bundle = broken(small, tmp_path / "bundle", change)
    assert asked(program, bundle, pictures[:1]) == asked(program, small, pictures[:1])


def test_a_pipe_is_not_waited_for(program, branches, pictures, tmp_path):
    bundle = copy_bundle(branches, tmp_path / "bundle")
    (bundle / "bank.safetensors").unlink()
    os.mkfifo(bundle / "bank.safetensors")
    done = run(program, bundle, pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert "bank.safetensors cannot be read" in done.stderr


def test_rows_of_a_bank_that_is_baked_in(program, constant, pictures, tmp_path):
    done = run(program, broken(constant, tmp_path / "bundle", exchange_rows), pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert "gamma: expected 7 classes, which its row has, found 3" in done.stderr


def test_weights_without_a_hash(program, branches, pictures, tmp_path):
    """OpenVINO would open them by itself, whatever they are."""
    bundle = broken(branches, tmp_path / "bundle", lambda c: c["files"].pop("model.onnx.data"))
    done = run(program, bundle, pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert "files: expected the sha256 of model.onnx.data, found none" in done.stderr


def test_a_key_that_is_there_twice(program, small, pictures, tmp_path):
    bundle = copy_bundle(small, tmp_path / "bundle")
    text = (bundle / MANIFEST).read_text()
    (bundle / MANIFEST).write_text(text.replace('"classes"', '"classes": 3, "classes"', 1))
    done = run(program, bundle, pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert f'{MANIFEST}: "classes" is there twice.' in done.stderr


def test_a_graph_without_logits_is_said_in_one_line(program, small, pictures, tmp_path):
    def without(content):
        content.update(classes=0)
        del content["tensors"]["logits"]

    done = run(program, broken(small, tmp_path / "b", without), pictures[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {tmp_path / 'b'}: its graph has no logits to answer with.\n"


def test_a_problem_type_of_null_is_as_an_absent_one(program, small, pictures, tmp_path):
    bundle = broken(small, tmp_path / "bundle", lambda c: first(c).update(problem_type=None))
    assert asked(program, bundle, pictures[:1]) == asked(program, small, pictures[:1])


def test_a_row_past_the_bank(program, branches, pictures, tmp_path):
    bundle = broken(branches, tmp_path / "bundle", lambda c: first(c).update(row=99))
    done = run(program, bundle, pictures[0])
    assert done.returncode == 1
    assert re.search(r"adapter alpha: expected a row from 1 to \d+, found 99", done.stderr)
