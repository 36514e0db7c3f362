"""export and verify: what they write, what they refuse, and that a broken graph is caught."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import hhdeploy.algebra
import hhdeploy.exporters.fold
import hhdeploy.exporters.trace
import hhdeploy.exporting.afterwards
from hhdeploy import Reserve, verify
from hhdeploy.adapters.format import save_adapter
from hhdeploy.backbones.facts import LOGITS
from hhdeploy.bundle import Bundle, add_adapter, remove_adapter
from hhdeploy.bundle.layout import RowLayout
from hhdeploy.bundle.manifest import BANK_FILE, MANIFEST
from hhdeploy.bundle.store import edit
from hhdeploy.errors import (
    AdapterError,
    BackboneError,
    BundleError,
    DataError,
    ParityError,
    PlanError,
    WriteError,
)
from hhdeploy.files.caches import CacheWarning
from hhdeploy.files.tensors import tensor_bytes
from hhdeploy.files.writing import copy_directory, sha256_of
from hhdeploy.graph import linears_by_path
from hhdeploy.parity import bound
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import verify_against_torch
from hhdeploy.verifying.reference import VerifyData, training_time_reference
from tests.support import assert_caught, assert_parity, images, random_adapter
from tests.workshop import CLASSES, COMMAND_SECONDS, PROBE, contents, copy_bundle, flip_byte


def check_logits(path, workshop, names, count=None):
    """The bundle's logits are the training-time model's, on a mixed batch."""
    count = count or len(names)
    x, chosen = images(count), [names[i % len(names)] for i in range(count)]
    with open_session(path, device="cpu", threads=1) as session:
        found = session.run(x, chosen)
    truth = workshop.mixed_truth(chosen, x, found.shape[1])
    assert_parity(truth, found, "branches", "float32")


def reference_of(path):
    return load_file(path / Bundle.open(path).manifest.named("reference.safetensors"))


def parity_of(path):
    return Bundle.open(path).parity()


@pytest.fixture
def photos(tmp_path):
    """Two folders of pictures (alpha's own, and one for the others) and no class folders."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(31)
    for name, count in (("alpha", 3), ("rest", 5)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (41, 37, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


# --- what is written ----------------------------------------------------------------------------


def test_the_result_describes_the_bundle(workshop, tmp_path):
    steps = []
    result = workshop.export(tmp_path / "out", ("alpha", "gamma"), progress=steps.append)
    assert result.path == tmp_path / "out"
    assert result.manifest == Bundle.open(result.path).manifest
    assert [a.name for a in result.manifest.adapters if a.verified] == ["alpha", "gamma"]
    assert result.parity.passed
    assert result.parity.to_json() == parity_of(result.path)
    assert "adding side branches" in steps
    assert steps[-1] == "verifying against the training-time model"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_mixed_forms_ranks_reflections_and_classes_in_one_bank(workshop, tmp_path):
    names = ["beta", "lora", "gamma", "headless", "alpha"]
    result = workshop.export(tmp_path / "out", names)
    assert {s.adapter for s in result.parity.stages} == {"backbone", *names}
    check_logits(result.path, workshop, [*names, None], 13)


def test_the_order_of_adapters_is_theirs(workshop, tmp_path):
    path = workshop.export(tmp_path / "out", ("gamma", "alpha")).path
    rows = [(a.name, a.row) for a in Bundle.open(path).manifest.adapters]
    assert rows == [("gamma", 1), ("alpha", 2)]
    check_logits(path, workshop, ["alpha", "gamma"])


@pytest.mark.parametrize("constant", [False, True])
def test_adapters_without_a_single_head(workshop, tmp_path, constant):
    path = workshop.export(tmp_path / "out", ("headless",), bank_as_constant=constant).path
    manifest = Bundle.open(path).manifest
    assert (manifest.classes, manifest.layout.classes) == (5, 0)
    check_logits(path, workshop, ["headless", None], 3)


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "lora", "headless"])
def test_every_kind_of_adapter_is_folded(workshop, tmp_path, name):
    path = workshop.export(tmp_path / "out", (name,), fold=True).path
    manifest = Bundle.open(path).manifest
    assert (manifest.kind, manifest.layout, manifest.classes) == ("folded", None, CLASSES[name])
    x = images(3)
    with open_session(path, device="cpu", threads=1) as session:
        found = session.run(x)
    assert_parity(workshop.truth(name, x), found, "folded", "float32")
    assert_caught(workshop.truth(name, x[::-1].copy()), found, "folded", "float32")


def test_a_head_alone_is_an_adapter(workshop, small, tmp_path):
    """Alone and beside others, folded, baked in, and added later."""
    x = images(3)
    truth = workshop.truth(PROBE, x)
    only = workshop.export(tmp_path / "only", (PROBE,), bank_as_constant=True).path
    folded = workshop.export(tmp_path / "folded", (PROBE,), fold=True).path
    added = copy_bundle(small, tmp_path / "added")
    add_adapter(added, PROBE, workshop.directory(PROBE))
    for path, stage in ((only, "branches"), (added, "branches"), (folded, "folded")):
        with open_session(path, device="cpu", threads=1) as session:
            found = session.run(x, PROBE)[:, :3]
        assert_parity(truth, found, stage, "float32")
        assert_caught(truth[::-1], found, stage, "float32")


def test_an_export_without_verification(workshop, tmp_path):
    result = workshop.export(tmp_path / "out", ("alpha",), verify=False)
    assert result.parity is None
    assert not (result.path / "parity.json").exists()
    assert not (result.path / "reference.safetensors").exists()
    assert not result.manifest.adapters[0].verified
    with pytest.raises(BundleError, match=r"no reference.*verify_against_torch"):
        verify(result.path)
    assert verify_against_torch(result.path, checkpoint=workshop.checkpoint).passed
    assert verify(result.path).passed
    assert Bundle.open(result.path).manifest.adapters[0].verified


def test_the_path_of_the_result_holds_wherever_one_goes(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = workshop.export("out", ("alpha",), verify=False)
    assert result.path == tmp_path / "out"


def test_random_weights_need_no_checkpoint(workshop, tmp_path, traces):
    adapter = workshop.adapters["alpha"]
    unknown = replace(adapter, config=replace(adapter.config, base_sha256=None))
    save_adapter(unknown, tmp_path / "unknown")
    from hhdeploy.exporting.bundles import export

    options = {"pretrained": False, "cache": None, "verify": False, "overwrite": True}
    model = adapter.config.base_model
    digests = set()
    for seed in (3, 4, 3):
        result = export(model, {"a": tmp_path / "unknown"}, tmp_path / "out", seed=seed, **options)
        digests.add(result.manifest.backbone.sha256)
    assert len(digests) == 2


# --- the reference ------------------------------------------------------------------------------


def test_noise_is_recorded(workshop, tmp_path):
    path = workshop.export(tmp_path / "out", ("alpha",), verify_images=3, seed=41).path
    assert parity_of(path)["data"] == {"kind": "noise", "seed": 41, "images_per_adapter": 3}
    expected = np.random.default_rng(41).standard_normal((3, 3, 32, 32), np.float32)
    assert np.array_equal(reference_of(path)["images"], expected)


def test_the_reference_is_the_training_time_model_s(branches, workshop):
    reference = reference_of(branches)
    assert reference["logits"].dtype == np.float64
    assert reference["adapter_ids"].dtype == np.int64
    rows = {0: None} | {a.row: a.name for a in Bundle.open(branches).manifest.adapters}
    names = [rows[int(i)] for i in reference["adapter_ids"]]
    truth = workshop.mixed_truth(names, reference["images"])
    assert_parity(truth, reference["logits"], "algebra", "float64")


def test_neighbouring_images_use_different_adapters(branches):
    ids = reference_of(branches)["adapter_ids"]
    assert sorted(ids.tolist()) == sorted([*range(6)] * 2)
    assert (ids[1:] != ids[:-1]).all()


def test_groups_of_different_sizes_are_interleaved(workshop, photos):
    """alpha has three pictures of its own, gamma takes five of the whole folder."""
    adapters = {name: (row, workshop.adapters[name]) for row, name in ((1, "alpha"), (2, "gamma"))}
    data = VerifyData(photos, images=5)
    reference = training_time_reference(workshop.backbone, adapters, data, {"logits": (7,)})
    assert reference.adapter_ids.tolist() == [1, 2, 1, 2, 1, 2, 2, 2]
    names = ["alpha" if row == 1 else "gamma" for row in reference.adapter_ids]
    truth = workshop.mixed_truth(names, reference.images, 7)
    assert_parity(truth, reference.logits, "algebra", "float64")


def test_the_backbone_is_bare_and_float32_after_the_reference(workshop):
    before = {k: v.clone() for k, v in workshop.backbone.model.state_dict().items()}
    training_time_reference(
        workshop.backbone,
        {"gamma": (1, workshop.adapters["gamma"])},
        VerifyData(images=1),
        {"logits": (3,)},
    )
    after = workshop.backbone.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


def test_real_images_are_used_and_recorded(workshop, tmp_path, photos):
    (photos / "rest" / "x.heic").write_bytes(b"")
    result = workshop.export(
        tmp_path / "out", ("alpha", "gamma"), verify_data=photos, verify_images=2
    )
    data = {"kind": "images", "folder": "photos", "images_per_adapter": 2}
    data["skipped"] = {".heic": 1}
    assert parity_of(result.path)["data"] == data
    reference = reference_of(result.path)
    facts = workshop.backbone.facts
    with Image.open(photos / "alpha" / "0.png") as image:
        own = facts.preprocess(image)
    assert np.array_equal(reference["images"][reference["adapter_ids"] == 1][0], own)
    with Image.open(photos / "alpha" / "0.png") as image:  # no folder gamma: the whole folder
        theirs = workshop.adapters["gamma"].config.preprocess(image)
    assert np.array_equal(reference["images"][reference["adapter_ids"] == 2][0], theirs)
    assert dict(verify(result.path).data) == data


def test_a_folder_without_images(workshop, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "holds no image"), ("nowhere", "is not a directory")):
        with pytest.raises(DataError, match=message):
            workshop.export(tmp_path / "out", ("alpha",), verify_data=tmp_path / folder)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


# --- an existing OUT, failures ------------------------------------------------------------------


@pytest.fixture
def existing(small, tmp_path):
    """A bundle alone in its folder, and what it holds."""
    path = copy_bundle(small, tmp_path / "out")
    return path, contents(path)


def test_an_existing_bundle_is_refused_before_any_work(workshop, existing):
    path, before = existing
    steps = []
    with pytest.raises(WriteError, match=r"already exists.*`overwrite=True`"):
        workshop.export(path, ("alpha",), progress=steps.append)
    assert not steps
    assert contents(path) == before


def test_overwrite_replaces_the_whole(workshop, existing):
    path, _ = existing
    (path / "stray.txt").write_text("mine")
    with pytest.raises(WriteError, match=r"holds stray\.txt, which no bundle has"):
        workshop.export(path, ("alpha", "beta"), overwrite=True)
    assert (path / "stray.txt").read_text() == "mine"
    (path / "stray.txt").unlink()
    workshop.export(path, ("alpha", "beta"), overwrite=True)
    manifest = Bundle.open(path).manifest
    assert [a.name for a in manifest.adapters] == ["alpha", "beta"]
    assert [p.name for p in path.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failing_export_leaves_things_as_they_were(
    workshop, small, tmp_path, overwrite, monkeypatch
):
    target, before = tmp_path / "out", None
    if overwrite:
        copy_bundle(small, target)
        before = contents(target)

    def fail(*arguments, **options):
        raise RuntimeError("in the middle of it")

    monkeypatch.setattr(hhdeploy.exporting.afterwards, "_store_report", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        workshop.export(target, ("alpha",), overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])
    if overwrite:
        assert contents(target) == before


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("alpha", "gamma"), {"fold": True}, "`fold=True` takes exactly one adapter, found 2"),
        (
            ("alpha",),
            {"fold": True, "reserve": Reserve(max_rank=7)},
            "`fold=True` cannot be combined",
        ),
        (("alpha",), {"fold": True, "reserve": Reserve(max_classes=9)}, "`fold=True` cannot"),
        (("alpha",), {"fold": True, "reserve": Reserve(sites=("fc1",))}, "`fold=True` cannot"),
        (
            ("alpha",),
            {"fold": True, "reserve": Reserve(keep_backbone_head=True)},
            "`keep_backbone_head`",
        ),
        (("alpha",), {"fold": True, "bank_as_constant": True}, "`bank_as_constant`"),
        (
            ("alpha",),
            {"precisions": ["float8"]},
            r"`precisions=\['float8'\]`: expected one of float16",
        ),
        (("alpha",), {"precisions": ["int8"]}, r"`calibrate\(\)`"),
        ((), {}, "nothing to export"),
        (("alpha",), {"reserve": Reserve(sites=("fc7",))}, "'fc7' matches no site"),
    ],
)
def test_options_that_do_not_go_together(workshop, tmp_path, names, options, message):
    with pytest.raises(PlanError, match=message):
        workshop.export(tmp_path / "out", names, **args_of(workshop), **options)
    assert not list(tmp_path.iterdir())


def test_names_and_adapters_that_are_refused(workshop, tmp_path):
    from hhdeploy.exporting.bundles import export

    model = workshop.adapters["alpha"].config.base_model
    options = {"checkpoint": workshop.checkpoint, "cache": workshop.cache}
    for name, message in (("backbone", "reserved"), ("a b", "letters, digits")):
        with pytest.raises(PlanError, match=message):
            export(model, {name: workshop.directory("alpha")}, tmp_path / "out", **options)
    with pytest.raises(AdapterError, match="is not a directory"):
        export(model, {"a": tmp_path / "nowhere"}, tmp_path / "out", **options)
    with pytest.raises(BackboneError, match=r"nowhere.safetensors does not exist"):
        workshop.export(tmp_path / "out", ("alpha",), checkpoint=tmp_path / "nowhere.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("changed", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_is_saved_again_meanwhile(workshop, tmp_path, fold, changed):
    """What lies in the bundle is what its graphs were made of, or there is no bundle."""
    from hhdeploy.exporting.bundles import export

    source = shutil.copytree(workshop.directory("alpha"), tmp_path / "source")

    def again(step):
        if step == "writing graphs" and changed.endswith(".json"):
            config = json.loads((source / changed).read_text())
            config["class_names"] = [f"new {i}" for i in range(CLASSES["alpha"])]
            (source / changed).write_text(json.dumps(config))
        elif step == "writing graphs":
            tensors = load_file(source / changed)
            save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, source / changed)

    out, model = tmp_path / "out", workshop.adapters["alpha"].config.base_model
    options = {"checkpoint": workshop.checkpoint, "cache": workshop.cache, "verify_images": 2}
    with pytest.raises(AdapterError, match=r"source was changed while it was exported"):
        export(model, {"alpha": source}, out, fold=fold, progress=again, **options)
    assert not out.exists()


def test_a_file_system_that_takes_two_names_for_one(workshop, tmp_path, monkeypatch):
    """As if it knew no case: what is written to adapters/A lies in adapters/a as well."""
    from hhdeploy.exporting.bundles import export

    def without_case(source, target):
        copy_directory(source, target)
        if not target.with_name(target.name.lower()).exists():
            copy_directory(source, target.with_name(target.name.lower()))

    monkeypatch.setattr("hhdeploy.exporters.writer.copy_directory", without_case)
    out, model = tmp_path / "out", workshop.adapters["alpha"].config.base_model
    options = {"checkpoint": workshop.checkpoint, "cache": workshop.cache, "verify": False}
    places = {name: workshop.directory("alpha") for name in ("A", "a")}
    said: list[str] = []
    with pytest.raises(WriteError, match=r"adapters/a: expected a place .* differ in case"):
        export(model, places, out, progress=said.append, **options)
    assert not out.exists()
    assert "adapter 'a': Windows and macOS take it for the name of 'A'" in "\n".join(said)


def test_adapters_that_disagree_on_the_model_s_arguments(workshop, tmp_path):
    adapter = workshop.adapters["rival"]
    args = {**adapter.config.base_model_args, "depth": 3}
    other = replace(adapter, config=replace(adapter.config, base_model_args=args))
    save_adapter(other, tmp_path / "other")
    from hhdeploy.exporting.bundles import export

    with pytest.raises(PlanError, match=r"disagree on base_model_args: a: .*; b: .*`model_args`"):
        export(
            adapter.config.base_model,
            {"a": workshop.directory("alpha"), "b": tmp_path / "other"},
            tmp_path / "out",
            checkpoint=workshop.checkpoint,
            cache=workshop.cache,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_nothing_but_room_is_exported_or_refused_with_a_message(workshop, tmp_path):
    """No adapter yet, nor the backbone's classifier: there is nothing to verify."""
    reserve = Reserve(sites=("q", "k", "v", "proj"), max_classes=7)
    with pytest.raises(PlanError, match=r"nothing to verify.*`verify=False`"):
        workshop.export(tmp_path / "out", (), reserve=reserve, **args_of(workshop))
    path = workshop.export(
        tmp_path / "out", (), reserve=reserve, verify=False, **args_of(workshop)
    ).path
    add_adapter(path, "alpha", workshop.directory("alpha"))
    check_logits(path, workshop, ["alpha"], 2)


def args_of(workshop):
    """Without an adapter nobody else names the model's arguments."""
    return {"model_args": workshop.backbone.facts.args}


@contextmanager
def files_up_to(size):
    """While in the block, the system cuts every file of this process short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kib", [1, 40, 80])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_the_system_cuts_short(workshop, small, tmp_path, kib, overwrite):
    target, before = tmp_path / "out", None
    if overwrite:
        copy_bundle(small, target)
        before = contents(target)
    with files_up_to(kib * 1024), pytest.raises(WriteError) as caught:
        workshop.export(target, ("alpha", "beta"), overwrite=overwrite)
    assert "File too large" in str(caught.value)
    assert "ulimit -f" in str(caught.value)
    assert "Nothing that was there before was changed" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])
    if overwrite:
        assert contents(target) == before


@pytest.fixture
def disk(tmp_path):
    """Make a file system of some KiB, where the system lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kib):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        mounted = subprocess.run(command, capture_output=True, check=False, timeout=COMMAND_SECONDS)
        if mounted.returncode:
            pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
        return place

    yield mount
    subprocess.run(
        ["umount", str(place)], capture_output=True, check=False, timeout=COMMAND_SECONDS
    )


@pytest.mark.parametrize("share", [0.3, 0.7, 0.83, 0.9, 0.97])
def test_a_full_disk_at_every_stage(workshop, disk, small, share):
    """Graph, bank, adapters, reference, report: wherever it ends, nothing is left."""
    whole = sum(len(data) for data in contents(small).values()) // 1024
    place = disk(int(whole * share))
    with pytest.raises(WriteError, match="The disk is full"):
        workshop.export(place / "out", ("alpha", "gamma"))
    assert not list(place.iterdir())


# --- a graph that is wrong ----------------------------------------------------------------------


def swap_rows(monkeypatch):
    """Alpha's row holds rival, and the other way round."""
    pack = RowLayout.pack
    other = {"alpha": "rival", "rival": "alpha"}

    def swapped(self, name, adapter):
        return pack(self, name, swap_rows.adapters[other.get(name, name)])

    monkeypatch.setattr(RowLayout, "pack", swapped)


def forget_tau(monkeypatch):
    """Every reflection is unnormalized, whatever the adapter says."""
    original = hhdeploy.adapters.format.householder_delta

    def wrong(*arguments):
        return original(*arguments[:-1], "unnormalized")

    monkeypatch.setattr(hhdeploy.adapters.format, "householder_delta", wrong)


def swap_sides(monkeypatch):
    """u and v change places."""
    original = hhdeploy.adapters.format.householder_delta

    def wrong(u, v, *rest):
        return original(v, u, *rest) if u.shape == v.shape else original(u, v, *rest)

    monkeypatch.setattr(hhdeploy.adapters.format, "householder_delta", wrong)


def forget_the_bias(monkeypatch):
    """W <- M W without b <- M b."""
    monkeypatch.setattr(hhdeploy.exporters.fold, "folded_bias", lambda bias, *rest: bias)


@pytest.mark.parametrize(
    ("mistake", "names", "fold", "blamed", "overwrite"),
    [
        (swap_rows, ("alpha", "rival"), False, "adapter rival", True),
        (forget_tau, ("alpha", "beta"), False, "adapter beta", False),
        (forget_tau, ("gamma",), True, "adapter gamma", False),
        (swap_sides, ("alpha", "gamma"), False, "adapter alpha", True),
        (swap_sides, ("alpha",), True, "adapter alpha", False),
        (forget_the_bias, ("gamma",), True, "adapter gamma", True),
    ],
)
def test_a_wrong_graph_leaves_no_bundle(
    workshop, small, tmp_path, monkeypatch, mistake, names, fold, blamed, overwrite
):
    target = tmp_path / "out"
    if overwrite:
        copy_bundle(small, target)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        swap_rows.adapters = workshop.adapters
        mistake(patch)
        with pytest.raises(ParityError, match=blamed) as caught:
            workshop.export(target, names, fold=fold, overwrite=overwrite)
    assert "No bundle was written or changed" in str(caught.value)
    assert "max abs error" in str(caught.value)
    assert contents(tmp_path) == before


def test_forgetting_tau_is_only_caught_where_it_matters(workshop, tmp_path, monkeypatch):
    """The report blames the adapters that are wrong and no other."""
    with monkeypatch.context() as patch:
        forget_tau(patch)
        with pytest.raises(ParityError) as caught:
            workshop.export(tmp_path / "out", ("alpha", "beta"))
    assert "adapter beta" in str(caught.value)
    assert "adapter alpha" not in str(caught.value)


# --- verify -------------------------------------------------------------------------------------


@pytest.fixture
def bundle(small, tmp_path):
    """Alpha and gamma, free to be changed."""
    return copy_bundle(small, tmp_path / "bundle")


def rewrite_reference(path, change):
    """Change the reference and record its hash, as whoever falsifies one would."""
    reference = reference_of(path)
    change(reference)
    save_file(reference, path / "reference.safetensors")
    content = json.loads((path / "hhdeploy.json").read_text())
    content["files"]["reference.safetensors"] = sha256_of(path / "reference.safetensors")
    (path / "hhdeploy.json").write_text(json.dumps(content))


def test_verify_reads_and_changes_nothing(branches):
    before = contents(branches)
    report = verify(branches)
    assert report.passed
    described = [(s.stage, s.precision, s.adapter) for s in report.stages]
    names = ["backbone", "alpha", "rival", "beta", "gamma", "headless"]
    assert described == [("branches", "float32", name) for name in names]
    assert all(s.comparison.images == 2 for s in report.stages)
    limit = bound("branches", "float32").range_error
    assert 0 < max(s.comparison.range_error for s in report.stages) <= limit
    assert contents(branches) == before


def test_verify_of_folded_and_constant_bundles(folded, constant):
    assert [s.stage for s in verify(folded).stages] == ["folded"]
    assert [s.adapter for s in verify(constant).stages] == ["alpha", "gamma"]
    assert verify(folded).passed
    assert verify(constant).passed


def test_verify_in_openvino(branches):
    pytest.importorskip("openvino")
    report = verify(branches, device="openvino")
    assert report.passed
    assert {(s.stage, s.runtime) for s in report.stages} == {("openvino", "openvino CPU")}


def test_verify_finds_a_wrong_logit(bundle):
    def change(reference):
        reference["logits"][3, 2] += 1.0

    rewrite_reference(bundle, change)
    report = verify(bundle)
    assert not report.passed
    failed = {s.adapter for s in report.stages if s.failures}
    wrong = {0: "backbone", 1: "alpha", 2: "gamma"}[int(reference_of(bundle)["adapter_ids"][3])]
    assert failed == {wrong}
    assert f"adapter {wrong}" in report.explain_failures()


def test_verify_finds_swapped_adapters(branches, tmp_path):
    """The same shapes and classes: alpha's logits under rival's row."""
    copy = copy_bundle(branches, tmp_path / "copy")

    def change(reference):
        ids = reference["adapter_ids"]
        reference["adapter_ids"] = np.where(ids == 1, 2, np.where(ids == 2, 1, ids))

    rewrite_reference(copy, change)
    failed = {s.adapter for s in verify(copy).stages if s.failures}
    assert failed == {"alpha", "rival"}


def test_a_damaged_reference_is_refused(bundle):
    flip_byte(bundle / "reference.safetensors")
    with pytest.raises(BundleError, match=r"reference\.safetensors: expected sha256"):
        verify(bundle)


def test_a_typed_graph_is_verified_by_its_twin(workshop, tmp_path):
    result = workshop.export(tmp_path / "out", ("alpha", "gamma"), precisions=["float16"])
    assert (result.path / "model.float16.onnx").is_file()
    assert dict(result.manifest.graphs) == {
        "float32": "model.onnx",
        "float16": "model.float16.onnx",
    }
    stages = {(s.stage, s.precision) for s in verify(result.path).stages}
    assert stages == {("branches", "float32"), ("twin", "float16")}
    only = verify(result.path, precisions=["float16"]).stages
    assert {s.precision for s in only} == {"float16"}
    assert all(s.comparison.range_error > 1e-6 for s in only), "the twin does not round"
    flip_byte(result.path / "model.float16.onnx")
    with pytest.raises(BundleError, match=r"model\.float16\.onnx: expected sha256"):
        verify(result.path)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_precision_that_the_bundle_lacks(small, precision):
    with pytest.raises(BundleError, match=f"no {precision} graph; it has float32"):
        verify(small, precisions=[precision])


def test_an_adapter_added_later_is_not_in_the_reference(bundle, workshop):
    add_adapter(bundle, "rival", workshop.directory("rival"))
    assert [s.adapter for s in verify(bundle).stages] == ["alpha", "gamma"]


def test_a_row_that_is_reused_is_not_compared_with_its_former_adapter(bundle, workshop):
    remove_adapter(bundle, "alpha")
    assert [s.adapter for s in verify(bundle).stages] == ["gamma"]
    assert add_adapter(bundle, "rival", workshop.directory("rival")).row == 1
    report = verify(bundle)
    assert [s.adapter for s in report.stages] == ["gamma"]
    assert report.passed


def test_nothing_left_to_verify_is_said(bundle, workshop):
    remove_adapter(bundle, "alpha")
    remove_adapter(bundle, "gamma")
    with pytest.raises(BundleError, match=r"verify_against_torch|no adapter"):
        verify(bundle)
    add_adapter(bundle, "rival", workshop.directory("rival"))
    with pytest.raises(BundleError, match="verify_against_torch"):
        verify(bundle)


# --- verify against torch -----------------------------------------------------------------------


def test_against_torch_marks_adapters_verified(bundle, workshop):
    remove_adapter(bundle, "alpha")
    add_adapter(bundle, "rival", workshop.directory("rival"))
    report = verify_against_torch(bundle, checkpoint=workshop.checkpoint, verify_images=3)
    assert {s.adapter for s in report.stages} == {"gamma", "rival"}
    manifest = Bundle.open(bundle).manifest
    assert all(a.verified for a in manifest.adapters)
    assert len(reference_of(bundle)["images"]) == 6
    assert [s.adapter for s in verify(bundle).stages] == ["gamma", "rival"]
    assert verify(bundle).passed


def test_against_torch_with_real_images(bundle, workshop, photos):
    report = verify_against_torch(
        bundle, checkpoint=workshop.checkpoint, verify_data=photos, verify_images=2
    )
    assert report.passed
    assert verify(bundle).data["folder"] == "photos"


def test_against_other_weights(bundle, workshop, tmp_path):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    state = load_torch(workshop.checkpoint)
    state["blocks.0.mlp.fc1.bias"][3] += 0.5
    save_torch(state, tmp_path / "other.safetensors")
    before = contents(bundle)
    with pytest.raises(BackboneError, match=r"exported from the weights.*`checkpoint`"):
        verify_against_torch(bundle, checkpoint=tmp_path / "other.safetensors")
    assert contents(bundle) == before


def test_against_torch_finds_a_wrong_bank_and_changes_nothing(bundle, workshop, monkeypatch):
    """Alpha's row is rival's, with every hash right: bank and training-time model disagree, which
    shows also where the row is not compared with alpha's files."""
    wrong = Bundle.open(bundle).bank().copy()
    row = Bundle.open(bundle).manifest.adapter("alpha").row
    wrong[row] = Bundle.open(bundle).manifest.layout.pack("alpha", workshop.adapters["rival"])
    with edit(bundle) as change:
        change.store(BANK_FILE, tensor_bytes({"adapter_bank": wrong}))
    before = contents(bundle)
    with pytest.raises(BundleError, match=f"'alpha': expected it in row {row} of"):
        verify_against_torch(bundle, checkpoint=workshop.checkpoint)
    monkeypatch.setattr("hhdeploy.bundle.membership._is_in_row", lambda *given: True)
    with pytest.raises(ParityError, match="adapter alpha"):
        verify_against_torch(bundle, checkpoint=workshop.checkpoint)
    assert contents(bundle) == before


# --- reserved room ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roomy(workshop, tmp_path_factory):
    """Alpha, and room for higher ranks, more classes, the MLP, and proj after the fact."""
    reserve = Reserve(
        max_rank=7,
        max_classes=13,
        sites=("fc1", "proj:sequential", "fc2:sequential"),
        keep_backbone_head=True,
    )
    return workshop.export(
        tmp_path_factory.mktemp("roomy") / "out", ("alpha",), reserve=reserve
    ).path


@pytest.mark.parametrize("classes", [4, 6])
def test_verify_finds_another_number_of_the_backbone_s_classes(roomy, tmp_path, classes):
    """Of which no adapter's files tell; the bare backbone answered with a part of its classes."""
    path = copy_bundle(roomy, tmp_path / "bundle")
    content = json.loads((path / MANIFEST).read_text())
    content["backbone"]["classes"] = classes
    (path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=rf"backbone: expected 5 classes, .* found {classes}"):
        verify(path)


@pytest.mark.parametrize("later", ["rival", "beta", "gamma", "lora"])
def test_reserved_room_lets_a_bigger_adapter_in(roomy, workshop, tmp_path, later):
    copy = copy_bundle(roomy, tmp_path / "copy")
    assert Bundle.open(copy).manifest.classes == 13
    add_adapter(copy, later, workshop.directory(later))
    check_logits(copy, workshop, [later, "alpha", None], 5)


def test_reserved_room_holds_an_adapter_that_fills_it(roomy, workshop, tmp_path):
    full = random_adapter(
        workshop.backbone.facts,
        reflection="orthogonal",
        targets=("q", "k", "v", "proj", "fc1"),
        r=5,
        classes=13,
        seed=43,
    )
    save_adapter(full, tmp_path / "full")
    copy = copy_bundle(roomy, tmp_path / "copy")
    add_adapter(copy, "full", tmp_path / "full")
    workshop_too = replace(workshop, adapters={**workshop.adapters, "full": full})
    check_logits(copy, workshop_too, ["full", "alpha"], 3)
    report = verify_against_torch(copy, checkpoint=workshop.checkpoint, verify_images=1)
    assert {s.adapter for s in report.stages} == {"backbone", "alpha", "full"}


# --- the cache of traced backbones --------------------------------------------------------------


@pytest.fixture(scope="module")
def entry(workshop, small):
    """The traced backbone of the workshop, among those that other tests left in the cache."""
    key = hhdeploy.exporters.trace._cache_key(workshop.backbone, (LOGITS,))
    return workshop.cache / "base" / key


@pytest.fixture
def cache(entry, tmp_path):
    """A copy of the cache, free to be damaged."""
    copy_bundle(entry, tmp_path / "cache" / "base" / entry.name)
    return tmp_path / "cache"


@pytest.fixture
def traces(entry, monkeypatch):
    """Counts traces; in place of one (seconds) the stored graph is given."""
    calls = []

    def stored(backbone, outputs):
        calls.append(backbone)
        return ir.load(entry / "model.onnx")

    monkeypatch.setattr(hhdeploy.exporters.trace, "trace", stored)
    return calls


def test_a_second_export_does_not_trace(workshop, cache, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("torch.onnx.export was called")

    monkeypatch.setattr(torch.onnx, "export", fail)
    before = contents(cache)
    assert workshop.export(tmp_path / "out", ("beta",), cache=cache).parity.passed
    assert workshop.export(tmp_path / "fold", ("gamma",), cache=cache, fold=True).parity.passed
    assert contents(cache) == before


def test_a_changed_weight_is_traced_again(workshop, entry, cache, tmp_path, monkeypatch):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    state = load_torch(workshop.checkpoint)
    state["head.bias"][1] += 0.5  # not part of base_sha256: the adapters still belong
    save_torch(state, tmp_path / "other.safetensors")

    def traced(backbone, outputs):
        """The stored graph with the bias that the model has now, in place of seconds of tracing."""
        model = ir.load(entry / "model.onnx")
        (head,) = linears_by_path(model.graph)["head"]
        head.set_bias(model.graph, "bias", backbone.model.get_parameter("head.bias").numpy())
        return model

    monkeypatch.setattr(hhdeploy.exporters.trace, "trace", traced)
    changed = workshop.export(
        tmp_path / "out", ("headless",), cache=cache, checkpoint=tmp_path / "other.safetensors"
    )
    assert changed.parity.passed, "the graph has the old weights"
    assert len(list((cache / "base").iterdir())) == 2


@pytest.mark.parametrize(
    "damage", ["graph cut", "graph flipped", "weights flipped", "weights cut", "weights gone"]
)
def test_a_damaged_cache_is_traced_again(workshop, cache, tmp_path, traces, damage):
    (copy,) = (cache / "base").iterdir()
    name, what = damage.split()
    file = copy / {"graph": "model.onnx", "weights": "model.onnx.data"}[name]
    if what == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    elif what == "flipped":
        flip_byte(file, 1009)
    else:
        file.unlink()
    out = workshop.export(tmp_path / "out", ("alpha",), cache=cache, verify=False).path
    assert len(traces) == 1
    check_logits(out, workshop, ["alpha"], 2)
    workshop.export(tmp_path / "again", ("alpha",), cache=cache, verify=False)
    assert len(traces) == 1, "the damaged entry was not replaced"


def test_without_a_cache_nothing_is_stored(workshop, tmp_path, traces, monkeypatch):
    monkeypatch.setenv("HHDEPLOY_CACHE", str(tmp_path / "cache"))
    workshop.export(tmp_path / "out", ("alpha",), cache=None, verify=False)
    assert len(traces) == 1
    assert not (tmp_path / "cache").exists()


def test_the_default_cache_is_where_the_environment_says(workshop, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HHDEPLOY_CACHE", str(cache))
    monkeypatch.setattr(torch.onnx, "export", None)
    assert workshop.export(tmp_path / "out", ("alpha",), cache="default").parity.passed


def test_a_cache_that_cannot_be_written_says_so_and_is_no_end(workshop, tmp_path, traces):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(CacheWarning, match=r"HHDEPLOY_CACHE.*`cache=None`"):
        workshop.export(tmp_path / "out", ("alpha",), cache=tmp_path / "cache", verify=False)
    check_logits(tmp_path / "out", workshop, ["alpha"], 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out"]
