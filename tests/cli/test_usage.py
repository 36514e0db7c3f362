"""Exit code 2 is a wrong command line, 1 is wrong input: the same rule for every command.

A command line that can never be right is refused before anything is read: the bundles, models
and folders of this table are nowhere, so what is looked at first would exit with 1.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.cli.export import next_step

EXPORT = "export out --model nowhere --adapter a=nowhere"
TRAIN = "train out --model nowhere --data nowhere"
CALIBRATE = "calibrate nowhere --data nowhere"
CHECK = f"{CALIBRATE} --check a"
RTX = "build nowhere --backend tensorrt-rtx"

USAGE = [
    # Values that cannot be parsed, or that no data makes right.
    (f"{EXPORT} --model-args {{", "'--model-args': expected a JSON object"),
    (f"{EXPORT} --model-args [1]", "'--model-args': expected a JSON object"),
    ("adapter import nowhere out --model x --model-args {", "'--model-args': expected a JSON"),
    (f"{TRAIN} --model-args {{", "'--model-args': expected a JSON object"),
    (f"{TRAIN} --preprocess 3", "'--preprocess': expected a JSON object"),
    (f"{EXPORT} --precision float8", "'float8' is not one of 'float32', 'float16'"),
    (f"{EXPORT} --precision int8", "hhdeploy calibrate"),
    (f"{EXPORT} --sites fc1:around", "form must be one of"),
    (f"{EXPORT} --max-rank -1", "--max-rank: expected 0 or more, a whole number, found -1"),
    (f"{EXPORT} --seed -1", "'--seed': -1 is not in the range 0<=x<="),
    (f"{EXPORT} --overwrite --lock-timeout nan", "'--lock-timeout': expected a number, found nan"),
    (f"{EXPORT} --verify-images 0", "'--verify-images'"),
    (f"{CALIBRATE} --precision int4", "'--precision'"),
    (f"{CALIBRATE} --max-drop -1", "'--max-drop'"),
    (f"{TRAIN} --lr -1", "--lr: expected a positive number"),
    (f"{TRAIN} --epochs 2 --warmup-epochs 2", "--warmup-epochs: expected less than --epochs"),
    ("verify nowhere --device tpu", "'--device'"),
    ("triton nowhere out --name a/b", "model name 'a/b': expected letters"),
    ("triton nowhere out --preferred-batch 64", "--preferred-batch 64: expected 1 to --max-batch"),
    # Names.
    ("export out --model x --adapter a=b --adapter a=c", "two adapters are called 'a'"),
    ("export out --model x --adapter backbone=b", "'backbone' is reserved"),
    ("export out --model x --adapter =b", "adapter name '': expected letters"),
    ("export out --model x --adapter b=", "no directory after '='"),
    ("adapter add nowhere a/b=.", "adapter name 'a/b': expected letters"),
    # Options that do not go together.
    (f"{EXPORT} --adapter b=nowhere --fold", "--fold takes exactly one adapter, found 2"),
    (f"{EXPORT} --fold --max-rank 7", "--fold cannot be combined"),
    (f"{EXPORT} --checkpoint x --no-pretrained", "--checkpoint and --no-pretrained exclude"),
    (f"{TRAIN} --checkpoint x --no-pretrained", "--checkpoint and --no-pretrained exclude"),
    ("verify nowhere --against-torch --checkpoint x --no-pretrained", "exclude each other"),
    (f"{EXPORT} --cache-dir x --no-cache", "--cache-dir and --no-cache exclude"),
    (f"{CALIBRATE} --cache-dir x --no-cache", "--cache-dir and --no-cache exclude"),
    ("train --model x --data nowhere", "Only --linear-probe works without OUT"),
    ("train --model x --data nowhere --linear-probe --resume", "--resume needs the OUT"),
    ("build nowhere --backend tensorrt --gpu-arch sm89", "--gpu-arch: TensorRT builds for"),
    (f"{RTX} --precision float16 --tf32", "--tf32 is for float32"),
    (f"{RTX} --min-batch 9 --max-batch 8", "--min-batch, --opt-batch, --max-batch"),
    (f"{RTX} --workspace-mib 9", "--workspace-mib has no effect"),
    (f"{RTX} --hardware-compatible", "--hardware-compatible has no effect"),
    (f"{RTX} --builder-optimization-level 3", "--builder-optimization-level has no effect"),
    (f"{RTX} --precision fp8", "FP8 needs sm89"),
    (f"{RTX} --bank-as-constant --max-slots 9", "--max-slots does not go with --bank-as-constant"),
    ("triton nowhere out --gpu-arch sm89", "--gpu-arch chooses an engine"),
    ("triton nowhere out --cpu --precision bfloat16", "--cpu: ONNX Runtime has no bfloat16"),
    ("triton nowhere out --cpu --backend tensorrt", "--cpu: TensorRT engines run on GPUs"),
    ("serve nowhere --watch-seconds 2", "--watch-seconds: there is nothing to watch"),
    ("serve nowhere --allow-adapter-loading", "--allow-adapter-loading needs --token-file"),
    ("serve nowhere --replicas 2", "--replicas goes with --ray"),
    ("verify nowhere --signature", "--signature and --public-key go together"),
    ("verify nowhere --public-key x", "--signature and --public-key go together"),
    ("sign nowhere", "Missing option '--key'"),
    ("push nowhere hf://nobody", "expected a folder, hf://owner/name"),
    ("push nowhere hf://me/x --overwrite", "--overwrite is for folders"),
    ("pull https://x/y out", "expected a folder, hf://owner/name"),
    # Options that would do nothing.
    ("pull nowhere out --lock-timeout 9", "--lock-timeout needs --overwrite"),
    ("verify nowhere --checkpoint x", "--checkpoint needs --against-torch"),
    ("verify nowhere --no-pretrained", "--no-pretrained needs --against-torch"),
    ("verify nowhere --seed 1", "--seed needs --against-torch"),
    ("verify nowhere --verify-data x", "--verify-data needs --against-torch"),
    ("verify nowhere --verify-images 4", "--verify-images needs --against-torch"),
    ("verify nowhere --against-torch --verify-data x --seed 1", "--seed has nothing to draw"),
    (f"{EXPORT} --no-verify --verify-data x", "--verify-data does not go with --no-verify"),
    (f"{EXPORT} --no-verify --verify-images 9", "--verify-images does not go with --no-verify"),
    (f"{EXPORT} --no-verify --seed 9", "--seed has nothing to draw"),
    (f"{CHECK} --report r.html", "--report does not go with --check"),
    (f"{CHECK} --max-drop 1", "--max-drop does not go with --check"),
    (f"{CHECK} --exclude x", "--exclude does not go with --check"),
    (f"{CHECK} --eval-data x", "--eval-data does not go with --check"),
    (f"{CHECK} --preset robust", "--preset does not go with --check"),
    (f"{CHECK} --seed 1", "--seed does not go with --check"),
    (f"{CHECK} --device cpu", "--device does not go with --check"),
    (f"{CHECK} --threads 1", "--threads does not go with --check"),
    (f"{CHECK} --cache-dir x", "--cache-dir does not go with --check"),
    (f"{CHECK} --no-cache", "--no-cache does not go with --check"),
    (f"{CHECK} --lock-timeout 9", "--lock-timeout does not go with --check"),
    ("verify nowhere --lock-timeout 9", "--lock-timeout needs --against-torch"),
    (f"{EXPORT} --lock-timeout 9", "--lock-timeout needs --overwrite"),
    (f"{TRAIN} --linear-probe --r 2", "--r does not go with --linear-probe"),
    (f"{TRAIN} --linear-probe --form additive", "--form does not go with --linear-probe"),
    (f"{TRAIN} --linear-probe --target q", "--target does not go with --linear-probe"),
    (f"{TRAIN} --val-data x --val-fraction 0.2", "--val-fraction does not go with --val-data"),
    (f"{TRAIN} --no-augment --no-flip", "--no-flip does not go with --no-augment"),
    ("bench nowhere --adapters 3", "--adapters needs --serve"),
    ("bench nowhere --serve --batch 3", "--batch does not go with --serve"),
]
INPUT = [
    (EXPORT, "nowhere"),
    (f"{EXPORT} --checkpoint nowhere", "nowhere"),
    ("adapter import nowhere out --model vit_tiny_patch16_224", "nowhere does not exist"),
    ("adapter inspect nowhere", "nowhere is not a directory"),
    ("adapter add nowhere a=nowhere", "nowhere is not a directory"),
    ("adapter remove nowhere a", "nowhere is not a bundle"),
    ("adapter list nowhere", "nowhere is not a bundle"),
    (TRAIN, "nowhere"),
    (CALIBRATE, "nowhere is not a bundle"),
    (CHECK, "nowhere is not a bundle"),
    ("verify nowhere", "nowhere is not a bundle"),
    ("bom nowhere", "nowhere is not a bundle"),
    ("push nowhere out", "nowhere is not a bundle"),
    ("pull nowhere out", "nowhere is not a bundle"),
    ("sign nowhere --key nowhere.pem", "expected an elliptic-curve key in PEM"),
    ("verify nowhere --against-torch", "nowhere is not a bundle"),
    ("predict nowhere image.png", "nowhere is not a bundle"),
    ("bench nowhere", "nowhere is not a bundle"),
    ("triton nowhere out", "nowhere is not a bundle"),
    ("serve nowhere", "nowhere is not a bundle"),
    ("serve nowhere --adapters-dir nowhere", "--adapters-dir: nowhere is not a directory"),
    ("serve nowhere --allow-adapter-loading --token-file x", "--token-file: x cannot be read"),
    ("demo --examples nowhere", "no starter models"),
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hhdeploy.runtime.serving.logs.log_as_json", lambda level: None)
    yield
    assert not list(tmp_path.iterdir()), "something was written"


def test_a_command_that_is_not_there_is_answered_with_those_that_are_near(call):
    result = call("exprot")
    assert result.exit_code == 2
    assert "No such command 'exprot'. (Did you mean 'export'?)" in result.output
    assert "Did you mean" not in call("zzz").output


@pytest.mark.parametrize(("line", "message"), USAGE, ids=[line for line, _ in USAGE])
def test_a_wrong_command_line_exits_with_2(call, line, message):
    result = call(*line.split())
    assert result.exit_code == 2, result.output
    name = line.split()[0]
    usage = re.findall(r"^Usage: \S+ (\S+) ", result.stderr, re.MULTILINE)
    assert usage == [name]
    (error,) = re.findall(r"^Error: (.*)", result.stderr, re.MULTILINE)
    assert message in error
    assert not result.stdout


@pytest.mark.parametrize(("line", "message"), INPUT, ids=[line for line, _ in INPUT])
def test_wrong_input_exits_with_1(refuse, line, message):
    assert message in refuse(*line.split())


OF_BUNDLES = [line for line, message in INPUT if message == "nowhere is not a bundle"]


@pytest.mark.parametrize("line", OF_BUNDLES)
def test_a_file_of_a_bundle_in_its_place_leads_to_it(refuse, small, line):
    """Such as its model.onnx."""
    words = [str(small / "model.onnx") if word == "nowhere" else word for word in line.split()]
    assert "is a file, and a bundle is a directory" in (said := refuse(*words))
    assert f"Name that: {small}" in said


def test_what_export_advises_next_answers(small):
    """An empty bundle has no NAME to predict with."""
    manifest = Bundle.open(small).manifest
    name = manifest.adapters[0].name
    assert next_step(small, manifest) == f"hhdeploy predict {small} IMAGE --adapter {name}"
    empty = replace(manifest, adapters=())
    layout = replace(empty.layout, backbone_head=True)
    assert next_step(small, replace(empty, layout=layout)) == f"hhdeploy predict {small} IMAGE"
    layout = replace(empty.layout, backbone_head=False)
    assert next_step(small, replace(empty, layout=layout)) == (
        f"hhdeploy adapter add {small} NAME=DIR"
    )


def test_a_bundle_behind_its_pictures_is_told_its_place(call, small):
    result = call("predict", "photo.jpg", str(small))
    assert result.exit_code == 2
    assert f"{small} is a bundle, which comes first: hhdeploy predict BUNDLE IMAGES." in (
        result.stderr
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flag", ["--json", None])
def test_a_full_disk_that_is_printed_to_is_said(small, flag):
    code = "from hhdeploy.cli import main; main(prog_name='hhdeploy')"
    words = [sys.executable, "-c", code, "adapter", "list", str(small), *([flag] if flag else [])]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "Error: What is printed, or a temporary file, could not be written: No space"
    )
