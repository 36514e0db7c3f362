"""export, verify, predict and adapter from the command line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES
from hhdeploy.adapters.format import SiteTensors, load_adapter, save_adapter
from hhdeploy.bundle import Bundle, remove_adapter
from hhdeploy.files.writing import sha256_of
from hhdeploy.preprocess import open_image
from hhdeploy.runtime import open_session
from hhdeploy.runtime.onnxruntime_backend import OnnxRuntimeBackend
from hhdeploy.runtime.session import Session
from hhdeploy.verifying.graphs import add_typed_graph
from tests.support import TINY_MODEL, random_adapter
from tests.workshop import AGE, HEAVY, TAGS, contents, copy_bundle, flip_byte, run_python

WITNESS = Path(__file__).parents[1] / "witnesses" / "v1"


@pytest.fixture
def bundle(small, tmp_path):
    """Alpha and gamma, free to be changed."""
    return copy_bundle(small, tmp_path / "bundle")


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(19)
    paths = [tmp_path / f"picture {i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (43, 59, 3), np.uint8)).save(path)
    return paths


@pytest.fixture
def export_options(workshop):
    """What every export of the tiny backbone names."""
    return (
        "--model",
        TINY_MODEL,
        "--checkpoint",
        workshop.checkpoint,
        "--cache-dir",
        workshop.cache,
        "--verify-images",  # last: what --no-verify does not go with
        2,
    )


def names_of(path):
    return [a.name for a in Bundle.open(path).manifest.adapters]


# --- export -------------------------------------------------------------------------------------


def test_export_of_several_adapters(succeed, workshop, tmp_path, export_options):
    out = tmp_path / "out"
    text = succeed(
        "export",
        out,
        *export_options,
        "--adapter",
        workshop.directory("alpha"),
        "--adapter",
        f"renamed={workshop.directory('gamma')}",
    )
    assert names_of(out) == ["alpha", "renamed"]
    assert "passed" in text
    assert f"Wrote branches bundle {out}" in text.replace("\n", "")
    assert "seeded noise" in text


def test_export_as_json(succeed_json, workshop, tmp_path, export_options):
    out = tmp_path / "out"
    arguments = ("--adapter", workshop.directory("beta"), "--fold", "--seed", 3)
    answer = succeed_json("export", out, *export_options, *arguments)
    assert answer["bundle"] == str(out)
    assert (answer["kind"], answer["adapters"]) == ("folded", ["beta"])
    assert answer["parity"] == json.loads((out / "parity.json").read_text())
    assert answer["parity"]["passed"] is True
    assert answer["parity"]["data"]["seed"] == 3


def test_export_with_room_and_without_verification(
    succeed_json, workshop, tmp_path, export_options
):
    out = tmp_path / "out"
    flags = "--max-rank 7 --max-classes 13 --sites fc1 --sites proj:sequential --no-verify"
    adapter = ("--adapter", workshop.directory("alpha"))
    answer = succeed_json("export", out, *export_options[:-2], *adapter, *flags.split())
    assert answer["parity"] is None
    layout = Bundle.open(out).manifest.layout
    assert layout.classes == 13
    assert {b.rank for b in layout.branches} == {7}
    assert {b.form for b in layout.branches} == {"additive", "sequential"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("OUT --adapter NOWHERE", "is not a directory"),
        (
            'OUT --adapter ALPHA --model-args {"checkpoint_path":"x"}',
            "checkpoint_path are not allowed",
        ),
        ("OUT --adapter ALPHA --checkpoint NOWHERE", "does not exist"),
        ("OUT --adapter ALPHA --verify-data NOWHERE", "is not a directory"),
        ("OUT --adapter ALPHA --sites fc9", "'fc9' matches no site"),
        ("OUT --adapter ALPHA --model vit_unheard_of", "unknown timm model 'vit_unheard_of'"),
        ("TAKEN --adapter ALPHA", "already exists.*--overwrite"),
    ],
)
def test_export_refuses(refuse, workshop, tmp_path, export_options, arguments, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    names = {"OUT": tmp_path / "out", "TAKEN": tmp_path / "taken", "NOWHERE": tmp_path / "nowhere"}
    names |= {"ALPHA": workshop.directory("alpha"), "GAMMA": workshop.directory("gamma")}
    for name, path in names.items():
        arguments = arguments.replace(name, str(path))
    line = refuse("export", *export_options, *arguments.split())
    assert re.search(message, line), line
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_export_overwrites_when_told(succeed, workshop, tmp_path, export_options):
    out = tmp_path / "out"
    before = (*export_options[:-2], "--adapter", workshop.directory("gamma"), "--no-verify")
    succeed("export", out, *before)
    arguments = (*export_options[:-2], "--adapter", workshop.directory("alpha"), "--no-verify")
    text = succeed("export", out, *arguments, "--overwrite")
    assert "Not verified" in text
    assert names_of(out) == ["alpha"]


# --- verify -------------------------------------------------------------------------------------


def falsify(path):
    """Change one logit of the reference and record its hash."""
    reference = load_file(path / "reference.safetensors")
    reference["logits"][0, 1] += 1.0
    save_file(reference, path / "reference.safetensors")
    content = json.loads((path / "hhdeploy.json").read_text())
    content["files"]["reference.safetensors"] = sha256_of(path / "reference.safetensors")
    (path / "hhdeploy.json").write_text(json.dumps(content))


def test_verify(succeed, succeed_json, small):
    text = succeed("verify", small)
    assert "passed" in text
    assert "FAILED" not in text
    assert "alpha" in text
    assert "gamma" in text
    report = succeed_json("verify", small)
    assert report["passed"] is True
    assert [s["adapter"] for s in report["stages"]] == ["alpha", "gamma"]


def test_verify_fails_with_exit_code_1(call, bundle):
    falsify(bundle)
    result = call("verify", bundle)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    result = call("verify", bundle, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["passed"] is False
    assert [s["passed"] for s in report["stages"]] == [False, True]


def test_a_report_with_infinite_error_is_still_json(call, bundle):
    reference = load_file(bundle / "reference.safetensors")
    reference["logits"][:, 0] = -np.inf
    save_file(reference, bundle / "reference.safetensors")
    content = json.loads((bundle / "hhdeploy.json").read_text())
    content["files"]["reference.safetensors"] = sha256_of(bundle / "reference.safetensors")
    (bundle / "hhdeploy.json").write_text(json.dumps(content))
    result = call("verify", bundle, "--json")
    assert result.exit_code == 1

    def strange(constant):
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads(result.stdout, parse_constant=strange)
    assert report["stages"][0]["max_abs"] == "inf"


def test_verify_refuses(refuse, bundle, tmp_path):
    assert "is not a bundle" in refuse("verify", tmp_path)
    assert "is not a bundle" in refuse("verify", tmp_path / "nowhere")
    assert "no float16 graph" in refuse("verify", bundle, "--precision", "float16")
    flip_byte(bundle / "model.onnx.data")
    assert "model.onnx.data: expected sha256" in refuse("verify", bundle)
    assert f"Name that: {bundle}" in refuse("verify", bundle / "model.onnx")


def test_verify_names_what_noise_cannot_show(succeed):
    assert "int8 was not compared: seeded noise" in succeed("verify", WITNESS / "int8")
    assert "not compared" not in succeed("verify", WITNESS / "int8", "--precision", "float32")


def test_verify_against_torch(succeed, refuse, bundle, workshop):
    succeed("adapter", "add", bundle, f"rival={workshop.directory('rival')}")
    assert "rival was added later" in succeed("verify", bundle)
    options = ("--against-torch", "--verify-images", 1)
    text = succeed("verify", bundle, *options, "--checkpoint", workshop.checkpoint)
    assert "rival" in text
    assert "added later" not in text
    assert "was added later" not in succeed("verify", bundle)
    assert "exported from the weights" in refuse("verify", bundle, *options, "--no-pretrained")


def test_verify_against_torch_checks_the_graphs_that_are_named(
    succeed, succeed_json, refuse, bundle, workshop
):
    add_typed_graph(bundle, "float16")
    succeed("adapter", "add", bundle, f"rival={workshop.directory('rival')}")
    before = contents(bundle)
    ask = ("verify", bundle, "--against-torch", "--checkpoint", workshop.checkpoint)
    ask = (*ask, "--verify-images", 1)
    report = succeed_json(*ask, "--precision", "float16")
    assert {s["precision"] for s in report["stages"]} == {"float16"}
    assert {s["adapter"] for s in report["stages"]} == {"alpha", "gamma", "rival"}
    assert contents(bundle) == before, "float16's bounds vouch for no adapter"
    assert "no int8 graph" in refuse(*ask, "--precision", "int8")
    report = succeed_json(*ask, "--precision", "float32")
    assert {s["precision"] for s in report["stages"]} == {"float32"}
    kept = Bundle.open(bundle).parity()["stages"]
    assert [s for s in kept if s["precision"] == "float32"] == report["stages"]
    assert {s["precision"] for s in kept} == {"float16", "float32"}, "float16's are as they were"
    assert all(a.verified for a in Bundle.open(bundle).manifest.adapters)


def test_verify_in_a_process_without_torch(small):
    """The edge: a real process with onnxruntime and none of the export packages."""
    code = "from hhdeploy.cli import main; import sys; main(['verify', *sys.argv[1:]])"
    done = run_python(code, small, "--json", blocked=HEAVY)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    assert not done.stderr


def test_verifying_a_typed_graph_without_the_export_packages_names_the_extra(workshop, tmp_path):
    out = workshop.export(tmp_path / "out", ("alpha",), precisions=["float16"]).path
    code = "from hhdeploy.cli import main; import sys; main(['verify', *sys.argv[1:]])"
    done = run_python(code, out, "--json", blocked=HEAVY)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: verifying a float16 graph")
    assert "hhdeploy[export]" in done.stderr
    alone = run_python(code, out, "--json", "--precision", "float32", blocked=HEAVY)
    assert alone.returncode == 0, alone.stderr


def test_errors_of_a_real_process_have_no_traceback(tmp_path):
    code = "from hhdeploy.cli import main; import sys; main(sys.argv[1:])"
    done = run_python(code, "verify", tmp_path, "--json", blocked=HEAVY)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


# --- predict ------------------------------------------------------------------------------------


def test_predict_with_several_adapters_and_images(succeed_json, branches, pictures):
    answers = succeed_json(
        "predict", branches, *pictures, *"--adapter gamma --adapter alpha --top 2".split()
    )
    order = [(a["image"], a["adapter"]) for a in answers]
    assert order == [(str(p), name) for p in pictures for name in ("gamma", "alpha")]
    with open_session(branches, device="cpu", threads=1) as session:
        for answer in answers:
            image = open_image(Path(answer["image"]))
            x = session.preprocess([image], adapter=answer["adapter"])
            logits = session.run(x, answer["adapter"])[0].astype(np.float64)
            own = logits[np.isfinite(logits)]
            assert len(own) == session.entry(answer["adapter"]).classes
            shares = np.exp(own - own.max()) / np.exp(own - own.max()).sum()
            best = answer["classes"]
            assert [b["index"] for b in best] == np.argsort(-own)[:2].tolist()
            assert [b["label"] for b in best] == [f"class {b['index']}" for b in best]
            assert [round(b["probability"], 4) for b in best] == [
                round(float(shares[b["index"]]), 4) for b in best
            ]


def test_predict_on_a_directory_says_how_to_name_its_pictures(call, branches, tmp_path):
    folder = tmp_path / "my photos"
    folder.mkdir()
    result = call("predict", branches, folder)
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert f"{folder} is a directory: name the pictures in it, as '{folder}'/* does" in said


def test_predict_opens_a_few_pictures_at_once(succeed_json, branches, pictures, monkeypatch):
    asked, real = [], Session.classify
    monkeypatch.setattr(
        Session, "classify", lambda self, *args: asked.append(len(args[0])) or real(self, *args)
    )
    many, names = pictures * 3, ("--adapter", "gamma", "--adapter", "alpha")
    whole = succeed_json("predict", branches, *many, *names)
    monkeypatch.setattr("hhdeploy.cli.predict._BATCH", 4)
    assert succeed_json("predict", branches, *many, *names) == whole
    assert asked == [18, 4, 4, 4, 4, 2]


def test_predict_says_values_and_labels(succeed, succeed_json, heads, pictures):
    alpha, tags, age, _ = succeed_json("predict", heads, pictures[0], "--top", 1)
    assert [a["problem_type"] for a in (alpha, tags, age)] == [CLASSES, LABELS, VALUES]
    image = open_image(pictures[0])
    with open_session(heads, device="cpu", threads=1) as session:
        own = {n: session.run(session.preprocess([image], n), n)[0] for n in (TAGS, AGE)}
    (value,) = age["classes"]
    assert value == {"label": "class 0", "index": 0, "value": pytest.approx(float(own[AGE][0]))}
    said = {c["index"]: c for c in tags["classes"]}
    assert {i for i in range(3) if own[TAGS][i] >= 0} <= set(said)
    for index, one in said.items():
        share = 1 / (1 + np.exp(-float(own[TAGS][index])))
        assert one["probability"] == pytest.approx(share, abs=1e-4)
        assert one["positive"] == (share >= 0.5)
    shown = succeed("predict", heads, pictures[0], "--adapter", AGE)
    assert f"class 0 {own[AGE][0]:.3}"[:11] in shown
    assert "%" not in shown


def test_export_and_predict_of_features(workshop, succeed, succeed_json, call, pictures, tmp_path):
    out = tmp_path / "out"
    told = succeed_json(
        "export", out, "--model", workshop.backbone.facts.model, "--checkpoint",
        workshop.checkpoint, "--cache-dir", workshop.cache,
        "--adapter", workshop.directory("gamma"), "--output", "features", "--verify-images", 1,
    )  # fmt: skip
    assert told["outputs"] == {"features": [48]}
    assert told["parity"]["passed"]
    assert told["parity"]["stages"][0]["output"] == "features"
    (said,) = succeed_json("predict", out, pictures[0], "--device", "cpu")
    with open_session(out, device="cpu") as session:
        expected = session.run(session.preprocess([open_image(pictures[0])], "gamma"), "gamma")[0]
    assert said["adapter"] == "gamma"
    assert np.array_equal(np.asarray(said["features"], np.float32), expected)
    assert f"{np.linalg.norm(expected):.3}"[:4] in succeed("predict", out, pictures[0])
    (listed,) = succeed_json("adapter", "list", out)
    assert listed["classes"] == 0
    assert call("predict", out, pictures[0], "--top", 2).exit_code == 2
    assert "has features" in call("predict", out, pictures[0], "--output", "tokens").stderr
    both = pictures[0], twin_of(pictures[0], tmp_path / "other")
    shown = succeed("predict", out, *both)
    assert all(str(path) in shown for path in both)


def twin_of(picture, directory):
    directory.mkdir()
    shutil.copy(picture, directory)
    return directory / picture.name


def test_pictures_of_one_name_are_told_apart(succeed, branches, pictures, tmp_path):
    twin = twin_of(pictures[0], tmp_path / "other")
    shown = succeed("predict", branches, *pictures, twin, "--adapter", "alpha")
    called = [line.split("  ")[0] for line in shown.splitlines()]
    assert {str(pictures[0]), str(twin), pictures[1].name, pictures[2].name} <= set(called)


def test_predict_of_many_adapters_leaves_nothing_out(succeed, branches, pictures, monkeypatch):
    names = [a.name for a in Bundle.open(branches).manifest.adapters]
    wide = succeed("predict", branches, *pictures, "--top", 1)
    monkeypatch.setenv("COLUMNS", "40")
    narrow = succeed("predict", branches, *pictures, "--top", 1)
    for shown in (wide, narrow):
        assert all(name in shown for name in (*names, *(p.name for p in pictures)))
        assert shown.count("%") == len(names) * len(pictures)
    assert len(wide.splitlines()) == 2 + len(pictures)
    assert len(narrow.splitlines()) == 2 + len(names) * len(pictures)


def test_predict_defaults_to_all_adapters(succeed, succeed_json, branches, small, pictures):
    answers = succeed_json("predict", small, pictures[0])
    assert [a["adapter"] for a in answers] == ["alpha", "gamma"]
    # gamma has three classes; more than there are is not asked for.
    assert [len(a["classes"]) for a in succeed_json("predict", small, pictures[0], "--top", 5)] == [
        5,
        3,
    ]
    text = succeed("predict", branches, *pictures, "--adapter", "beta", "--adapter", "headless")
    assert "picture 2.png" in text
    assert "beta" in text
    assert "%" in text


def test_predict_with_the_bare_backbone_and_a_folded_bundle(
    succeed_json, branches, folded, pictures
):
    (answer,) = succeed_json("predict", branches, pictures[0], "--adapter", "backbone", "--top", 9)
    assert sorted(b["index"] for b in answer["classes"]) == [0, 1, 2, 3, 4]
    (answer,) = succeed_json("predict", folded, pictures[0])
    assert answer["adapter"] == "alpha"


def test_predict_with_nothing_but_the_backbone(succeed_json, branches, pictures, tmp_path):
    """All adapters are gone, its classifier was kept: that is what there is to ask."""
    only = copy_bundle(branches, tmp_path / "only")
    for name in names_of(only):
        remove_adapter(only, name)
    (answer,) = succeed_json("predict", only, pictures[0], "--top", 9)
    assert answer["adapter"] == "backbone"
    assert sorted(b["index"] for b in answer["classes"]) == [0, 1, 2, 3, 4]


def test_a_class_without_a_finite_logit_shifts_no_names(succeed_json, small, pictures, monkeypatch):
    real = OnnxRuntimeBackend.run

    def ruled_out(self, images, ids):
        logits = real(self, images, ids)
        logits[:, 0] = -np.inf
        return logits

    ask = ("predict", small, pictures[0], "--adapter", "alpha", "--top", 7, "--device", "cpu")
    (before,) = succeed_json(*ask)
    monkeypatch.setattr(OnnxRuntimeBackend, "run", ruled_out)
    (after,) = succeed_json(*ask)
    kept = [b["label"] for b in before["classes"] if b["index"]]
    assert [a["label"] for a in after["classes"]] == [*kept, "class 0"]
    assert after["classes"][-1] == {"label": "class 0", "index": 0, "probability": 0.0}


def test_predict_refuses(refuse, succeed, small, bundle, pictures, tmp_path):
    def line(*arguments):
        return refuse("predict", small, *arguments)

    unknown = line(pictures[0], "--adapter", "omega")
    assert "unknown adapter 'omega'. Loaded are: alpha, gamma." in unknown
    assert "--keep-backbone-head" in line(pictures[0], "--adapter", "backbone")
    assert "nowhere.png does not exist" in line(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png cannot be decoded" in line(tmp_path / "text.png")
    assert "no float16 graph" in line(pictures[0], "--precision", "float16")
    assert "is not a bundle" in refuse("predict", tmp_path, pictures[0])
    for name in ("alpha", "gamma"):
        succeed("adapter", "remove", bundle, name)
    assert "adapter" in refuse("predict", bundle, pictures[0])


def test_class_names_with_markup_are_shown_as_they_are(
    succeed, workshop, bundle, pictures, tmp_path
):
    adapter = load_adapter(workshop.directory("rival"))
    names = tuple(f"[/b] {i} [red]" for i in range(7))
    named = replace(adapter, config=replace(adapter.config, class_names=names))
    save_adapter(named, tmp_path / "named")
    succeed("adapter", "add", bundle, tmp_path / "named")
    text = succeed("predict", bundle, pictures[0], "--adapter", "named")
    assert "[/b] " in text
    assert "[red]" in text


# --- adapter ------------------------------------------------------------------------------------


def test_adapter_inspect(succeed, succeed_json, workshop):
    adapter = workshop.adapters["beta"]
    answer = succeed_json("adapter", "inspect", workshop.directory("beta"))
    assert answer["parameters"] == adapter.parameters
    assert answer["head_parameters"] == 11 * 48 + 11
    assert [s["site"] for s in answer["sites"]] == sorted(adapter.sites)
    fc1 = next(s for s in answer["sites"] if s["site"].endswith("fc1"))
    assert (fc1["out"], fc1["in"], fc1["k"]) == (192, 48, 6)
    assert all(1.0 <= s["effective_rank"] <= 48.0 for s in answer["sites"])
    text = succeed("adapter", "inspect", workshop.directory("beta"), "--no-rank")
    assert "blocks.1.mlp.fc1" in text
    assert "192 x 48" in text
    assert f"{adapter.parameters:,} parameters in {len(adapter.sites)} sites" in text


def test_adapter_inspect_shows_parts_and_values(succeed, succeed_json, workshop, tmp_path):
    adapter = random_adapter(workshop.backbone.facts, targets=("fc1",), parts=("s_out", "db"))
    (first, second) = adapter.sites
    alone = SiteTensors(s_out=adapter.sites[second].s_out)
    changed = replace(
        adapter,
        config=replace(adapter.config, fold_only=True),
        sites={first: adapter.sites[first], second: alone},
        values={"blocks.0.norm1.bias": np.ones(48, np.float32)},
    )
    save_adapter(changed, tmp_path / "a")
    answer = succeed_json("adapter", "inspect", tmp_path / "a")
    described = [(s["out"], s["k"], s["parts"]) for s in answer["sites"]]
    assert described == [(192, 3, ["s_out", "db"]), (None, 0, ["s_out"])]
    assert answer["config"]["fold_only"] is True
    assert answer["values"] == {"blocks.0.norm1.bias": [48]}
    text = succeed("adapter", "inspect", tmp_path / "a")
    assert "s_out db" in text
    assert "blocks.0.norm1.bias [48]" in text


def test_export_reserves_parts(succeed, call, workshop, tmp_path):
    options = ["--checkpoint", workshop.checkpoint, "--no-verify", "--cache-dir", workshop.cache]
    given = ["--adapter", workshop.directory("alpha"), "--model", TINY_MODEL, *options]
    succeed("export", tmp_path / "out", *given, "--parts", "db,s_out")
    rows = json.loads((tmp_path / "out" / "hhdeploy.json").read_text())["row"]["branches"]
    assert {tuple(b["parts"]) for b in rows} == {("s_out", "db")}
    refused = call("export", tmp_path / "other", *given, "--parts", "gate")
    assert refused.exit_code == 2
    assert "--parts: expected some of s_in, s_out, db, found gate" in refused.stderr


def test_adapter_list(succeed, succeed_json, branches, folded):
    answer = succeed_json("adapter", "list", branches)
    assert answer == json.loads((branches / "hhdeploy.json").read_text())["adapters"]
    text = succeed("adapter", "list", branches)
    assert "branches bundle of vit_tiny_patch16_224" in text
    assert all(name in text for name in names_of(branches))
    assert "folded bundle" in succeed("adapter", "list", folded)


def test_adapter_add_and_remove(succeed, succeed_json, bundle, workshop):
    text = succeed("adapter", "add", bundle, workshop.directory("rival"))
    assert "Added rival in row 3" in text
    assert "--against-torch" in text
    assert "not yet" in succeed("adapter", "list", bundle)
    assert succeed("adapter", "remove", bundle, "alpha").strip() == "Removed alpha"
    assert "row 1" in succeed("adapter", "add", bundle, f"again={workshop.directory('alpha')}")
    rows = {a["name"]: a["row"] for a in succeed_json("adapter", "list", bundle)}
    assert rows == {"gamma": 2, "rival": 3, "again": 1}


def test_an_adapter_that_calibration_never_saw_is_told_of(succeed, bundle, workshop, tmp_path):
    assert "ranges" not in succeed("adapter", "add", bundle, workshop.directory("rival"))
    quantised = copy_bundle(WITNESS / "int8", tmp_path / "int8")
    said = succeed("adapter", "add", quantised, f"guest={WITNESS / 'rival'}").splitlines()
    assert said[-1].startswith("See how far it leaves the ranges of int8 with: hhdeploy cal")
    command = f"hhdeploy calibrate {quantised} --data IMAGES --precision int8 --check guest"
    assert said[-1].endswith(command)


def test_adapter_refuses(refuse, bundle, folded, workshop, tmp_path):
    before = contents(bundle)

    def line(*arguments):
        return refuse("adapter", *arguments)

    alpha = workshop.directory("alpha")
    assert "has an adapter 'alpha' already" in line("add", bundle, alpha)
    assert "is not a directory" in line("add", bundle, tmp_path / "nowhere")
    assert "Export" in line("add", bundle, workshop.directory("beta"))
    assert "unknown adapter 'omega'" in line("remove", bundle, "omega")
    assert "Export without --fold" in line("add", folded, f"x={alpha}")
    assert "cannot be removed" in line("remove", folded, "alpha")
    assert "is not a bundle" in line("list", tmp_path)
    assert "adapter_config.json" in line("inspect", tmp_path)
    assert "is not a directory" in line("inspect", tmp_path / "nowhere")
    assert contents(bundle) == before


def test_adapters_are_added_in_a_process_without_torch(bundle, workshop):
    code = "from hhdeploy.cli import main; import sys; main(['adapter', *sys.argv[1:]])"
    done = run_python(code, "add", bundle, workshop.directory("rival"), blocked=HEAVY)
    assert done.returncode == 0, done.stderr
    assert names_of(bundle) == ["alpha", "gamma", "rival"]


def test_export_without_torch_names_the_extra(tmp_path, workshop):
    code = "from hhdeploy.cli import main; import sys; main(['export', *sys.argv[1:]])"
    done = run_python(
        code,
        tmp_path / "out",
        "--model",
        TINY_MODEL,
        "--adapter",
        workshop.directory("alpha"),
        "--json",
        blocked=HEAVY,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "hhdeploy[export]" in done.stderr
    assert not list(tmp_path.iterdir())
    assert sys.executable not in done.stderr
