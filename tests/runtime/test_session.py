"""Open bundles: right logits for every image, and calls that are refused."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from hhdeploy.bundle import Bundle
from hhdeploy.errors import BundleError, DeviceError, OptionError, PlanError, SessionError
from hhdeploy.exporters.trace import base_graph
from hhdeploy.exporters.writer import save_graph
from hhdeploy.runtime import open_session
from tests.support import MISTAKE, assert_caught, assert_parity, images
from tests.workshop import AGE, BACKBONE_CLASSES, CLASSES, TAGS, WIDTH, copy_bundle, transform_of
from tests.wrong_logits import LOGITS, bundle_of_logits

NAMES = ("alpha", None, "gamma", "beta", "headless", "rival")


def cycle(count, start=0):
    """Neighbours always differ; ``start`` turns the order so that batches do not repeat."""
    return [NAMES[(i + start) % len(NAMES)] for i in range(count)]


def bare_graph(path):
    """ONNX Runtime on a graph file, as a user without hhdeploy would open it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# --- answers ------------------------------------------------------------------------------------


def pictures(count):
    rng = np.random.default_rng(23)
    return [Image.fromarray(rng.integers(0, 256, (43, 59, 3), np.uint8)) for _ in range(count)]


def test_each_image_is_classified_as_its_own_adapter_wants_it(session):
    """Gamma has another mean, deviation and crop than the others."""
    names, shown = cycle(6), pictures(6)
    found = session.classify(shown, names)
    for name, image, answers in zip(names, shown, found, strict=True):
        (logits,) = session.run(session.preprocess([image], name), name)
        own = logits[: CLASSES[name] if name else BACKBONE_CLASSES]
        assert [a.index for a in answers] == np.argsort(-own).tolist()
        shares = np.exp(own) / np.exp(own).sum()
        assert [a.score for a in answers] == pytest.approx(shares[np.argsort(-own)], rel=1e-4)
        labelled = name not in (None, "headless")
        assert answers[0].label == (f"class {np.argmax(own)}" if labelled else str(np.argmax(own)))
    as_first = session.run(session.preprocess(shown, names[0]), names)  # all as the first wants it
    gamma = names.index("gamma")
    scores = {a.index: a.score for a in found[gamma]}
    wrong = np.exp(as_first[gamma, :3]) / np.exp(as_first[gamma, :3]).sum()
    assert max(abs(scores[i] - wrong[i]) for i in range(3)) > MISTAKE


def test_an_adapter_s_problem_type_says_what_its_logits_mean(heads):
    names, shown = ["alpha", TAGS, AGE, TAGS], pictures(4)
    with open_session(heads, device="cpu", threads=1) as session:
        found = session.classify(shown, names)
        for name, image, answers in zip(names, shown, found, strict=True):
            own = session.run(session.preprocess([image], name), name)[0]
            scores = {a.index: a.score for a in answers}
            if name == AGE:
                assert scores == {0: pytest.approx(float(own[0]), rel=1e-4)}
            elif name == TAGS:
                expected = 1 / (1 + np.exp(-own[:3].astype(float)))
                assert [scores[i] for i in range(3)] == pytest.approx(expected, rel=1e-3)
                assert [a.positive for a in answers] == [a.score >= 0.5 for a in answers]
            else:
                assert sum(scores.values()) == pytest.approx(1.0)
            assert {a.problem_type for a in answers} == {session.entry(name).problem_type}


def test_an_infinite_value_is_none(heads, monkeypatch):
    with open_session(heads, device="cpu", threads=1) as session:
        real = session._backend.run
        monkeypatch.setattr(
            session._backend, "run", lambda *call: np.where(np.arange(7) == 0, -np.inf, real(*call))
        )
        session.classify(pictures(1), TAGS)  # a label that is ruled out
        with pytest.raises(SessionError, match=r"adapter 'age': the logits are no numbers"):
            session.classify(pictures(1), AGE)


def test_what_is_an_answer(small, tmp_path):
    with open_session(bundle_of_logits(small, tmp_path / "bundle"), threads=1) as session:
        for name, (_, _, said) in LOGITS.items():
            if said is None:
                with pytest.raises(SessionError, match=f"adapter '{name}': the logits are no num"):
                    session.classify(pictures(1), name)
            else:
                (answers,) = session.classify(pictures(1), name)
                chosen = [a for a in answers if a.positive or a.problem_type == "regression"]
                assert [a.label for a in chosen] == said


def test_one_name_or_none_is_for_all_images(session, folded):
    shown = pictures(2)
    assert session.classify(shown, "beta") == session.classify(shown, ["beta", "beta"])
    assert session.classify(shown) == session.classify(shown, ["backbone", None])
    with open_session(folded, device="cpu", threads=1) as plain:
        assert plain.classify(shown) == plain.classify(shown, "alpha")
        assert plain.classify(shown)[1][0].label.startswith("class ")


def test_classify_refuses(own):
    with pytest.raises(SessionError, match="`images`: expected a sequence of at least one picture"):
        own.classify([], "alpha")
    for wrong, words in (
        (None, "`images`: expected pictures in a list or tuple, found NoneType None"),
        ("cat.png", r"`images`\[0\]: expected a PIL\.Image\.Image, found str.*open_image\(path\)"),
        (Path("cat.png"), r"`images`\[0\]: .*found PosixPath.*open_image\(path\)"),
        ([*pictures(1), Path("cat.png")], r"`images`\[1\]: .*found PosixPath"),
        (np.zeros((2, 40, 40, 3), np.uint8), r"`images`\[0\]: .*found ndarray.*fromarray\(array\)"),
        (pictures(1)[0], r"expected a sequence of pictures, found one: pass \[image\]"),
    ):
        for ask in (own.classify, own.preprocess):
            with pytest.raises(SessionError, match=words):
                ask(wrong, "alpha")
    with pytest.raises(SessionError, match="found 2 for 3 images"):
        own.classify(pictures(3), ["alpha", "gamma"])
    with pytest.raises(SessionError, match="unknown adapter 'omega'"):
        own.classify(pictures(2), ["alpha", "omega"])
    assert not own.adapters.held("alpha")  # what was held before the unknown one is given back


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_no_answer(own, monkeypatch, value):
    real = own._backend.run

    def spoilt(images, ids):
        logits = real(images, ids)
        logits[1, 2] = value
        return logits

    monkeypatch.setattr(own._backend, "run", spoilt)
    with pytest.raises(SessionError, match=r"image 1, adapter 'gamma': .* no numbers .* float32"):
        own.classify(pictures(2), ["alpha", "gamma"])


# --- the logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 13])
def test_a_mixed_batch_is_the_training_time_model(session, workshop, batch):
    names, x = cycle(batch, start=batch), images(batch, seed=batch)
    found = session.run(x, names)
    assert found.shape == (batch, WIDTH)
    assert found.dtype == np.float32
    assert_parity(workshop.mixed_truth(names, x), found, "branches", "float32")


def test_a_mixed_batch_is_each_image_alone(session):
    names, x = cycle(13), images(13)
    mixed = session.run(x, names)
    alone = np.concatenate(
        [session.run(x[i : i + 1], [name]) for i, name in enumerate(names)], axis=0
    )
    assert_parity(alone, mixed, "branches", "float32")
    # An adapter of the same shape on the same images is another answer.
    alpha, rival = session.run(x, "alpha"), session.run(x, "rival")
    assert_caught(alpha, rival, "branches", "float32")


def test_a_neighbour_s_adapter_does_not_reach_an_image(session):
    x = images(5)
    quiet = session.run(x, ["alpha", "alpha", "beta", "alpha", None])
    loud = session.run(x, ["gamma", "rival", "beta", "headless", "gamma"])
    assert np.array_equal(quiet[2], loud[2])


def test_a_side_branch_is_the_folded_bundle(session, folded):
    x = images(7)
    with open_session(folded, device="cpu", threads=1) as fold:
        expected = fold.run(x)
        assert expected.shape == (7, CLASSES["alpha"])
        for again in (fold.run(x, "alpha"), fold.run(x, ["alpha"] * 7), fold.run(x, [None] * 7)):
            assert np.array_equal(again, expected)
    own = slice(0, CLASSES["alpha"])
    assert_parity(expected, session.run(x, "alpha")[:, own], "branches", "float32")
    assert_caught(expected, session.run(x, "rival")[:, own], "branches", "float32")


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_backbone_s_row_is_the_bare_backbone_to_the_bit(session, workshop, tmp_path, batch):
    x = images(batch, seed=23)
    save_graph(base_graph(workshop.backbone, workshop.cache).model, tmp_path / "bare.onnx")
    (bare,) = bare_graph(tmp_path / "bare.onnx").run(["logits"], {"images": x})
    for adapters in (None, "backbone", [None] * batch, ["backbone"] * batch):
        found = session.run(x, adapters)
        assert np.array_equal(found[:, :BACKBONE_CLASSES], bare)
        assert np.isneginf(found[:, BACKBONE_CLASSES:]).all()
    assert not np.array_equal(session.run(x, "headless")[:, :BACKBONE_CLASSES], bare)


def test_a_then_b_then_a_gives_a_to_the_bit(session):
    x = images(3)
    first = session.run(x, "alpha")
    other = session.run(x, "rival")
    assert np.array_equal(session.run(x, "alpha"), first)
    assert not np.array_equal(first, other)


def test_columns_past_an_image_s_own_classes_are_minus_infinity(session):
    names = list(NAMES)
    found = session.run(images(len(names)), names)
    for name, logits in zip(names, found, strict=True):
        own = BACKBONE_CLASSES if name is None else CLASSES[name]
        assert np.isfinite(logits[:own]).all(), name
        assert np.isneginf(logits[own:]).all(), name


def test_an_adapter_without_a_head_uses_the_backbone_s(session, workshop):
    x = images(3)
    truth = workshop.mixed_truth(["headless"] * 3, x)
    assert_parity(truth, session.run(x, "headless"), "branches", "float32")
    assert_caught(truth, session.run(x, None), "branches", "float32")


def test_float64_and_strided_images_are_taken(session):
    x = images(3)
    expected = session.run(x, "beta")
    assert np.array_equal(session.run(x.astype(np.float64), "beta"), expected)
    turned = np.ascontiguousarray(x.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    assert not turned.flags.c_contiguous
    assert np.array_equal(session.run(turned, "beta"), expected)


def test_more_slots_change_nothing(branches, session):
    names, x = cycle(7), images(7)
    with open_session(branches, device="cpu", threads=1, slots=997) as wide:
        assert np.array_equal(wide.run(x, names), session.run(x, names))


# --- preprocessing ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo():
    pixels = np.random.default_rng(7).integers(0, 256, (37, 53, 3), np.uint8)
    return Image.fromarray(pixels)


def test_every_adapter_preprocesses_as_it_was_trained(session, workshop, photo):
    facts = workshop.backbone.facts
    for name in ("alpha", "gamma"):
        expected = transform_of(facts, workshop.adapters[name])(photo)
        found = session.preprocess([photo, photo.rotate(90)], adapter=name)
        assert found.shape == (2, 3, 32, 32)
        assert found.dtype == np.float32
        assert np.array_equal(found[0], expected)
        assert not np.array_equal(found[1], expected)
    assert not np.array_equal(
        session.preprocess([photo], adapter="alpha"), session.preprocess([photo], adapter="gamma")
    )


@pytest.mark.parametrize("name", [None, "backbone"])
def test_the_backbone_preprocesses_as_timm_says(session, workshop, photo, name):
    found = session.preprocess([photo], adapter=name)
    assert np.array_equal(found[0], workshop.backbone.facts.preprocess(photo))


def test_preprocessing_is_refused_without_images_or_with_an_unknown_adapter(session, photo):
    with pytest.raises(SessionError, match="at least one"):
        session.preprocess([])
    with pytest.raises(SessionError, match=r"unknown adapter 'omega'\. Loaded are: alpha, rival"):
        session.preprocess([photo], adapter="omega")


# --- calls that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (np.zeros((2, 3, 32, 31), np.float32), r"found \[2, 3, 32, 31\]"),
        (np.zeros((2, 32, 32, 3), np.float32), r"found \[2, 32, 32, 3\]"),
        (np.zeros((3, 32, 32), np.float32), r"found \[3, 32, 32\]"),
        ([[1.0]], "found list"),
        (torch.zeros(1, 3, 32, 32), r"found Tensor. Pass images.detach\(\).cpu\(\).numpy\(\)"),
        (np.zeros((0, 3, 32, 32), np.float32), "at least one image"),
        (np.zeros((2, 3, 32, 32), np.uint8), "found uint8.*session.preprocess"),
        (np.zeros((2, 3, 32, 32), np.complex64), "found complex64"),
    ],
)
def test_images_of_another_shape_or_type(session, wrong, found):
    with pytest.raises(SessionError, match=found):
        session.run(wrong, "alpha")


@pytest.mark.parametrize("names", [[], ["alpha"], ["alpha"] * 3])
def test_the_number_of_names(session, names):
    with pytest.raises(SessionError, match=f"found {len(names)} for 2 images"):
        session.run(images(2), names)


def test_a_name_an_image(session):
    with pytest.raises(
        SessionError, match=r"`adapters`\[1\]: expected a name or None, found \['be"
    ):
        session.run(images(2), ["alpha", ["beta"]])
    with pytest.raises(SessionError, match="`adapters`: expected names, one an image, in a list"):
        session.run(images(2), 1)


def cut_off():
    """A picture that is opened and not read, and that ends too early."""
    whole = io.BytesIO()
    Image.effect_noise((60, 60), 50).save(whole, "PNG")
    return Image.open(io.BytesIO(whole.getvalue()[:900]))


def test_pictures_without_pixels_are_named(own):
    closed = pictures(1)[0].copy()
    closed.close()
    for wrong, words in (
        (cut_off(), "it cannot be read: "),
        (closed, "it cannot be read: "),
        (Image.new("RGB", (0, 5)), "expected pixels, found 0 x 5"),
        (Image.new("F", (0, 0)), "expected pixels, found 0 x 0"),
    ):
        for ask in (own.classify, own.preprocess):
            with pytest.raises(SessionError, match=rf"`images`\[1\]: {words}"):
                ask([*pictures(1), wrong], "alpha")


def test_what_is_no_name_or_number_is_refused(session, small):
    with pytest.raises(SessionError, match=r"`output=\['logits'\]`: this bundle has logits"):
        session.run(images(2), "alpha", ["logits"])
    with pytest.raises(SessionError, match=r"`adapter`: expected one name or None, found \['alpha"):
        session.preprocess(pictures(2), ["alpha", "gamma"])
    for path in (None, 3, "a\0b"):
        with pytest.raises(BundleError, match="expected the path of a bundle, found"):
            open_session(path)
    for options, words in (
        ({"slots": "4"}, "`slots`: expected 1 or more, a whole number, found '4'"),
        ({"slots": 10**13}, "`slots=10000000000000`: there is no room for so many rows"),
        ({"threads": 1.5}, "`threads`: expected 1 to 1024, a whole number, found 1.5"),
        ({"contexts": 0}, "`contexts`: expected 1 to 1024, a whole number, found 0"),
    ):
        with pytest.raises(SessionError, match=words):
            open_session(small, device="cpu", cache=None, **options)


def test_an_unknown_adapter_lists_the_names(session):
    known = "alpha, rival, beta, gamma, headless"
    for call in (lambda: session.run(images(2), ["alpha", "omega"]), lambda: session.entry("o")):
        with pytest.raises(SessionError, match=f"Loaded are: {known}"):
            call()


def test_an_unknown_adapter_of_a_folded_bundle(folded):
    with open_session(folded, device="cpu") as fold:
        assert fold.entry(None).name == "alpha"
        with pytest.raises(SessionError, match=r"'gamma'.*holds 'alpha'"):
            fold.run(images(2), ["alpha", "gamma"])
        with pytest.raises(SessionError, match="exactly one adapter"):
            _ = fold.adapters


def test_the_backbone_is_refused_where_its_classifier_was_not_kept(own):
    for adapters in (None, ["alpha", None], "backbone"):
        with pytest.raises(SessionError, match="`keep_backbone_head=True`"):
            own.run(images(2), adapters)


def test_a_run_that_onnx_runtime_refuses(own):
    """Its own exceptions, which have no base class, never reach the caller."""
    with pytest.raises(DeviceError, match=r"CPUExecutionProvider failed: .*adapter_ids"):
        own._backend.run(images(2), None)
    with pytest.raises(DeviceError, match=r"CPUExecutionProvider failed: (.|\n)*Got: 31"):
        own._backend.run(images(2, size=31), np.array([1, 2]))
    assert own.run(images(2), "alpha").shape == (2, 7)  # the session lives on


def test_a_closed_session(small):
    with open_session(small, device="cpu", threads=1) as opened:
        assert opened.run(images(2), "alpha").shape == (2, 7)
    opened.close()
    for call in (lambda: opened.run(images(2), "alpha"), lambda: opened.device):
        with pytest.raises(SessionError, match="closed"):
            call()


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_a_graph_that_is_closed_says_so(small, device):
    """As to a call that began before the session was closed."""
    with open_session(small, device=device, threads=1) as opened:
        run = opened.unchecked()
        assert run(images(2), np.zeros(2, np.int64)).shape[0] == 2
    for batch in (2, 1):
        with pytest.raises(SessionError, match=r"^the session is closed\.$"):
            run(images(batch), np.zeros(batch, np.int64))


# --- opening ------------------------------------------------------------------------------------


def test_the_device_says_what_computes(session):
    assert session.device == "onnxruntime CPUExecutionProvider"


@pytest.mark.parametrize("threads", [0, -3, 100_000])
def test_threads_that_no_machine_has(small, threads):
    with pytest.raises(SessionError, match=f"`threads`: expected 1 to 1024, .* found {threads}"):
        open_session(small, device="cpu", threads=threads)


def test_an_unknown_device_lists_the_devices(small):
    with pytest.raises(OptionError, match=r"`device='tpu'`: expected one of auto, cpu, .*openvino"):
        open_session(small, device="tpu")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this build has CUDA"
)
def test_a_missing_gpu_is_an_error_and_not_a_fallback(small):
    with pytest.raises(SessionError, match=r"`device='cuda'` needs.*CUDAExecutionProvider"):
        open_session(small, device="cuda")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this build has CUDA"
)
def test_auto_takes_the_cpu_where_there_is_no_gpu(small):
    with open_session(small, cache=None) as opened:
        assert "CPU" in opened.device


def test_a_provider_that_onnx_runtime_drops_is_an_error(small, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])

    class Dropped:
        def __init__(self, *args, **kwargs):
            pass

        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", Dropped)
    with pytest.raises(SessionError, match="would have used CPUExecutionProvider"):
        open_session(small, device="cuda")


def test_a_precision_that_the_bundle_lacks(small):
    with pytest.raises(BundleError, match="no float16 graph; it has float32"):
        open_session(small, device="cpu", precision="float16")


def test_a_runtime_that_is_not_installed_names_the_extra(small, monkeypatch):
    from hhdeploy.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hhdeploy\[openvino\]'"):
        open_session(small, device="openvino")


# --- a bank baked into the graph ----------------------------------------------------------------


def test_a_constant_bank_gives_the_same_logits(constant, workshop):
    names, x = ["gamma", "alpha", "gamma"], images(3)
    with open_session(constant, device="cpu", threads=1) as opened:
        found = opened.run(x, names)
    assert_parity(workshop.mixed_truth(names, x, 7), found, "branches", "float32")


def test_ids_outside_a_constant_bank_give_nan_and_harm_no_neighbour(constant):
    manifest = Bundle.open(constant).manifest
    slots = len(manifest.adapters) + 1
    graph = bare_graph(constant / manifest.graphs["float32"])
    assert [i.name for i in graph.get_inputs()] == ["images", "adapter_ids"]
    x, good = images(5), np.array([1, 2, 1, 2, 1], np.int64)
    (expected,) = graph.run(["logits"], {"images": x, "adapter_ids": good})
    bad = np.array([1, -1, 1, slots, 2**62], np.int64)
    (found,) = graph.run(["logits"], {"images": x, "adapter_ids": bad})
    assert np.isnan(found[[1, 3, 4]]).all()
    assert np.array_equal(found[[0, 2]], expected[[0, 2]])
    assert not np.isnan(expected).any()


def test_a_constant_bank_cannot_be_changed(constant, workshop):
    with open_session(constant, device="cpu", threads=1) as opened:
        before = opened.run(images(2), "alpha")
        with pytest.raises(PlanError, match="baked into the graph"):
            opened.adapters.add("rival", workshop.directory("rival"))
        with pytest.raises(SessionError, match="baked into this graph"):
            opened.adapters.remove("alpha")
        assert list(opened.adapters) == ["alpha", "gamma"]
        assert np.array_equal(opened.run(images(2), "alpha"), before)


# --- the graph as other runtimes see it ---------------------------------------------------------


def test_inputs_and_outputs_are_the_contract_s(small, folded):
    manifest = Bundle.open(small).manifest
    graph = bare_graph(small / "model.onnx")
    described = {i.name: (i.type, i.shape) for i in graph.get_inputs()}
    assert described == {
        "images": ("tensor(float)", ["batch", 3, 32, 32]),
        "adapter_ids": ("tensor(int64)", ["batch"]),
        "adapter_bank": ("tensor(float)", ["slots", manifest.layout.size]),
    }
    assert [(o.name, o.type, o.shape) for o in graph.get_outputs()] == [
        ("logits", "tensor(float)", ["batch", 7])
    ]
    plain = bare_graph(folded / "model.onnx")
    assert [i.name for i in plain.get_inputs()] == ["images"]


def test_row_numbers_are_not_the_api(small, tmp_path, workshop):
    """Rows swapped in bank and manifest together: names give the same logits."""
    from safetensors.numpy import load_file, save_file

    from hhdeploy.files.writing import sha256_of

    copy = copy_bundle(small, tmp_path / "swapped")
    bank = load_file(copy / "bank.safetensors")["adapter_bank"]
    save_file({"adapter_bank": bank[[0, 2, 1]].copy()}, copy / "bank.safetensors")
    manifest = Bundle.open(copy).manifest
    swapped = tuple(replace(a, row=3 - a.row) for a in manifest.adapters)
    files = {**manifest.files, "bank.safetensors": sha256_of(copy / "bank.safetensors")}
    content = replace(manifest, adapters=swapped, files=files).to_json()
    (copy / "hhdeploy.json").write_text(json.dumps(content))
    x, names = images(3), ["alpha", "gamma", "alpha"]
    with open_session(copy, device="cpu", threads=1) as opened:
        assert_parity(
            workshop.mixed_truth(names, x, 7), opened.run(x, names), "branches", "float32"
        )
