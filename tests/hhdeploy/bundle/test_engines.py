"""Which engine a machine may load, and how batches and banks fit it. No TensorRT needed."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace

import pytest

from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.bundle import engines
from hhdeploy.bundle.engines import check_slots, choose_engine, engine_name, split_batch
from hhdeploy.bundle.manifest import EngineEntry, Manifest
from hhdeploy.errors import BundleError, SessionError
from hhdeploy.preprocess import Preprocess

FILES = {"model.float16.onnx": "graph-now", "bank.safetensors": "bank-now"}
NOW = Manifest(
    kind="folded",
    backbone=BackboneFacts(
        "vit_x.tag",
        {},
        "ab" * 32,
        (),
        "head",
        13,
        7,
        Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3),
    ),
    classes=7,
    adapters=(),
    layout=None,
    bank_as_constant=False,
    graphs={"float32": "model.onnx", "float16": "model.float16.onnx"},
    files=FILES,
)
PLAIN = EngineEntry(
    file="model.float16.tensorrt-rtx.portable.engine",
    backend="tensorrt-rtx",
    version="1.7.1",
    precision="float16",
    architectures=(),
    gpu=None,
    batch=(1, 8, 32),
    slots=(1, 64, 1024),
    bank_sha256=None,
    graph_sha256=NOW.graph_digest("float16"),
    optimization_level=None,
    build_seconds=2.5,
    bytes=7,
)


def manifest_with(*entries):
    return replace(NOW, engines=entries)


def named(file, **changes):
    return replace(PLAIN, file=file, **changes)


def choose(*entries, backend="tensorrt-rtx", precision="float16", version="1.7.1", sm="sm89"):
    manifest = manifest_with(*entries)
    return choose_engine(manifest, backend, precision, version=version, architecture=sm)


def test_an_entry_survives_the_manifest():
    entry = named("x", architectures=("sm86", "sm89"), bank_sha256="b", slots=None)
    written = manifest_with(PLAIN, entry)
    read = Manifest.from_json(json.loads(json.dumps(written.to_json())))
    assert read == written
    assert isinstance(read.engines[1].architectures, tuple)


@pytest.mark.parametrize("damage", [{"batch": 3}, {"unknown": 1}])
def test_a_damaged_entry_is_noticed(damage):
    with pytest.raises(TypeError):
        EngineEntry.from_json({**PLAIN.to_json(), **damage})
    missing = PLAIN.to_json()
    del missing["slots"]
    with pytest.raises(KeyError):
        EngineEntry.from_json(missing)


def test_names_tell_engines_apart():
    names = {
        engine_name("float16", "tensorrt-rtx", ()),
        engine_name("float16", "tensorrt-rtx", ("sm89",)),
        engine_name("float16", "tensorrt-rtx", ("sm86", "sm89")),
        engine_name("float16", "tensorrt-rtx", ("sm89",), bank_as_constant=True),
        engine_name("float16", "tensorrt", ("sm89",)),
        engine_name("int8", "tensorrt-rtx", ("sm89",)),
    }
    assert len(names) == 6
    assert PLAIN.file in names
    assert "model.float16.tensorrt-rtx.sm89.engine" in names


# --- the choice ---------------------------------------------------------------------------------


def test_the_most_specific_engine_that_fits_is_taken():
    portable = PLAIN
    several = named("several", architectures=("sm86", "sm89"))
    exact = named("exact", architectures=("sm89",))
    other = named("other", architectures=("sm86",))
    baked = named("baked", architectures=("sm89",), bank_sha256="bank-now")
    everything = [baked, other, portable, several, exact]
    assert choose(*everything) == exact
    assert choose(*reversed(everything)) == exact
    assert choose(baked, portable, several) == several
    assert choose(baked, portable) == portable
    assert choose(baked, other) == baked


def test_the_digest_covers_the_weights_too():
    weights = replace(NOW, files={**FILES, "model.float16.onnx.data": "weights-now"})
    other = replace(NOW, files={**FILES, "model.float16.onnx.data": "weights-then"})
    assert len({m.graph_digest("float16") for m in (NOW, weights, other)}) == 3
    assert NOW.graph_digest("int8") == ""


def test_an_engine_that_does_not_fit_is_passed_over_for_one_that_does():
    stale = named("stale", architectures=("sm89",), graph_sha256="graph-then")
    older = named("older", architectures=("sm89",), version="1.6.0")
    assert choose(stale, older, PLAIN) == PLAIN


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"graph_sha256": "graph-then"}, "another graph"),
        ({"bank_sha256": "bank-then"}, "bank baked into it is not the one"),
        ({"version": "1.6.0"}, "built with tensorrt-rtx 1.6.0, installed is 1.7.1"),
        ({"architectures": ("sm86", "sm120")}, "built for sm86, sm120, this GPU is sm89"),
    ],
)
def test_a_refusal_names_the_file_the_reason_and_the_command(change, reason):
    command = r"`build\('BUNDLE', backend='tensorrt-rtx', precision='float16'\)`"
    with pytest.raises(BundleError, match=rf"(?s)  it: .*{reason}.*{command}"):
        choose(named("it", **change))


def test_a_graph_that_is_gone_makes_its_engine_stale():
    manifest = replace(manifest_with(PLAIN), graphs={"float32": "model.onnx"})
    with pytest.raises(BundleError, match="another graph"):
        choose_engine(manifest, "tensorrt-rtx", "float16", version="1.7.1", architecture="sm89")


@pytest.mark.parametrize(
    ("wanted", "there"),
    [
        ({"precision": "float32"}, "no float32 engine for tensorrt-rtx.*tensorrt-rtx float16"),
        ({"backend": "tensorrt"}, "no float16 engine for tensorrt;.*tensorrt-rtx float16"),
    ],
)
def test_another_backend_or_precision_is_never_taken(wanted, there):
    with pytest.raises(BundleError, match=there):
        choose(PLAIN, **wanted)


def test_a_bundle_without_engines():
    with pytest.raises(BundleError, match="it has: none"):
        choose()


@pytest.mark.parametrize(
    ("backend", "fits", "unfit"),
    [
        ("tensorrt-rtx", ("sm80", "sm86", "sm89", "sm120"), ("sm75", "sm90", "sm100", "sm103")),
        ("tensorrt", ("sm80", "sm89", "sm90", "sm100", "sm120"), ("sm75", "sm70")),
    ],
)
def test_where_portable_engines_run(backend, fits, unfit):
    portable = replace(PLAIN, backend=backend)
    for sm in fits:
        assert choose(portable, backend=backend, sm=sm) == portable
    for sm in unfit:
        with pytest.raises(BundleError, match=f"portable engine of {backend} .*{sm}"):
            choose(portable, backend=backend, sm=sm)


# --- batches and banks --------------------------------------------------------------------------


def test_the_docstrings():
    assert doctest.testmod(engines).failed == 0


@pytest.mark.parametrize("batch", [(1, 8, 32), (4, 8, 13), (7, 7, 7), (1, 1, 1)])
@pytest.mark.parametrize("images", [1, 3, 7, 13, 14, 41, 97])
def test_pieces_cover_every_image_once_and_fit_the_profile(images, batch):
    pieces = split_batch(images, batch)
    assert [i for start, stop, _ in pieces for i in range(start, stop)] == list(range(images))
    for start, stop, size in pieces:
        assert batch[0] <= size <= batch[2]
        assert size == max(stop - start, batch[0])
    assert len(pieces) == -(-images // batch[2])


@pytest.mark.parametrize(("rows", "advice"), [(1, 2), (65, 64), (1024, 64)])
def test_banks_outside_the_profile(rows, advice):
    with pytest.raises(SessionError, match=rf"2 to 64 rows.*`slots={advice}`,.*`max_slots={rows}`"):
        check_slots(rows, (2, 8, 64))


def test_banks_inside_the_profile():
    for rows in (2, 7, 64):
        check_slots(rows, (2, 8, 64))
    check_slots(10_000, None)
