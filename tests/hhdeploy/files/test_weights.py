"""Files and directories of weights that are another tool's: what they are, and what to do."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hhdeploy.adapters.importers import import_adapter
from hhdeploy.adapters.importers.checkpoint import extract_adapter
from hhdeploy.backbones.weights import read_state
from hhdeploy.errors import AdapterError, BackboneError
from hhdeploy.files.checkpoints import unwrapped
from hhdeploy.files.weights import content_of, not_floats
from tests.support import tiny_backbone, tiny_spec


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("read", [content_of, not_floats])
def test_a_pipe_is_not_waited_for(tmp_path, read, name):
    """Also where it is one of the files that an index lists."""
    os.mkfifo(tmp_path / name)
    listed = tmp_path / "model.safetensors.index.json"
    listed.write_text(json.dumps({"weight_map": {"w": name}}))
    for file in (tmp_path / name, listed):
        with pytest.raises(OSError, match="it is a pipe; a plain file was expected"):
            read(file)


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"of another")


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda p: np.savez(p.with_suffix(".npz"), a=np.ones(3)), r"NumPy's arrays \(\.npz\)"),
        (lambda p: zipped(p, "config.json", "model.weights.h5"), "model of Keras"),
        (lambda p: zipped(p, "weights.pth"), "zip archive of other files: unpack it"),
        (lambda p: p.write_bytes(gzip.compress(b"\x80\x02")), "compressed with gzip: unpack it"),
        (lambda p: p.write_bytes(b"GGUF" + bytes(60)), "GGUF"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(60)), "HDF5 file, as Keras"),
        (lambda p: p.write_bytes(b"\x81\xa6params\x81\xa4head"), "begins with .* as no file of to"),
        (lambda p: p.write_bytes(b"\x80\x02(R.x"), "cut|early|pop|Weights only load failed"),
        (lambda p: save_file({"a": torch.ones(2)}, p), "safetensors by another .* call it .saf"),
        (lambda p: p.write_bytes(pickle.dumps({"a": np.ones(2)})), "a pickle that torch.save did"),
    ],
    ids=["npz", "keras", "zip", "gzip", "gguf", "hdf5", "msgpack", "harmed", "tensors", "pickle"],
)
def test_another_tools_file_is_called_what_it_is(tmp_path, write, expected):
    """Of bytes that are no pickle torch's reader raises whatever they mean there (IndexError)."""
    write(tmp_path / "weights.pt")
    (file,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match=expected):
        content_of(file.rename(tmp_path / "weights.pt"))


def test_a_file_by_another_name_is_called_what_it_is(tmp_path):
    for old in (False, True):
        file = tmp_path / "weights.safetensors"
        torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=not old)
        with pytest.raises(ValueError, match=r"begins as a file of torch\.save: call it \.pth"):
            content_of(file)
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\x08\x0a\x12\x07pytorch")
    with pytest.raises(ValueError, match=r"a graph of ONNX.* Give the weights that it was"):
        content_of(file)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"state": {"model": {"a": torch.ones(2)}}, "rng": [1]}, r"state \(dict\), rng \(list\)"),
        ([torch.ones(2)], "list"),
        (None, "NoneType"),
    ],
    ids=["nested", "list", "nothing"],
)
def test_what_is_no_state_dict_is_told(tmp_path, content, found):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=rf"tensors by name, found {found}\. Keep that of"):
        read_state(tmp_path / "w.pth")


def test_a_file_that_changed_on_its_way_is_refused(tmp_path):
    """Its archive keeps sums, which torch does not look at; a training may write none."""
    file, value = tmp_path / "w.pth", torch.full((64,), 0.7)
    torch.save({"a": value}, file)
    whole = file.read_bytes()
    at = whole.index(value.numpy().tobytes())
    file.write_bytes(whole[: at + 2] + bytes([whole[at + 2] ^ 1]) + whole[at + 3 :])
    with pytest.raises(ValueError, match=r"it is damaged: .*data/0'\. Copy or download it again"):
        content_of(file)
    torch.serialization.set_crc32_options(False)
    torch.save({"a": value}, file)
    torch.serialization.set_crc32_options(True)
    assert torch.equal(content_of(file)["a"], value)


class DTensor(torch.Tensor):
    """Called as torch's of several processes is."""


class Int8Tensor(torch.Tensor):
    """Called as torchao's is."""


@pytest.mark.parametrize(
    ("kind", "advice"), [(DTensor, "full_state_dict=True"), (Int8Tensor, "as they were trained")]
)
def test_a_tensor_that_is_more_than_numbers_is_refused(kind, advice):
    state = {"a": torch.ones(2), "b": torch.ones(2).as_subclass(kind)}
    with pytest.raises(
        ValueError, match=rf"b: expected a plain tensor, .*{kind.__name__}.*{advice}"
    ):
        unwrapped(state)


def test_quantised_tensors_that_are_not_known_are_called_what_they_are(tmp_path, monkeypatch):
    """Advice on modules helped nobody, whose weights are no others."""
    monkeypatch.setattr(Int8Tensor, "__module__", "torchao.quantization")
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, sys.modules[__name__])
    torch.save({"a": torch.ones(2).as_subclass(Int8Tensor)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"are torchao's, quantised\. Bring the weights as they"):
        content_of(tmp_path / "w.pth")


def test_a_whole_module_is_told_apart_from_a_trainings_checkpoint(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"found\.state_dict\(\), .* of a module, .*checkpoint"):
        content_of(tmp_path / "weights.pt")


def test_a_distributed_checkpoint_is_made_a_file_of_first(tmp_path):
    backbone, spec = tiny_backbone(depth=1), tiny_spec(depth=1)
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / name).write_bytes(b"of torch")
    advice = rf"format_utils dcp_to_torch {tmp_path} weights\.pth"
    with pytest.raises(AdapterError, match=advice):
        import_adapter(tmp_path, backbone)
    for source in (spec, tiny_spec("transformers:no-such-directory")):
        with pytest.raises(AdapterError, match=advice):
            extract_adapter(tmp_path, source, backbone=backbone)
    with pytest.raises(BackboneError, match=rf"is a directory\. .*{advice}"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_blocks_0_attn_proj.lora_down.weight",
        "unet.blocks.0.attn.proj.lora.up.weight",
        "lycoris_blocks_0_attn_qkv.hada_w1_a",
        "blocks.0.attn.qkv.lora_B",
    ],
)
def test_an_adapters_tensors_are_no_checkpoint(tmp_path, key):
    torch.save({key: torch.ones(4, 48)}, tmp_path / "lora.pth")
    with pytest.raises(BackboneError, match=r"adapter's tensors alone\..*import_adapter"):
        extract_adapter(tmp_path / "lora.pth", tiny_spec(depth=1), backbone=tiny_backbone(depth=1))
