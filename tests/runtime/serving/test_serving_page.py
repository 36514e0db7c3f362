"""docs/serving.md: its servers as they are started there, and what the page asks of them."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from hhdeploy.adapters.config import TENSOR_FILE
from hhdeploy.runtime.session import open_session
from tests.docs.pages import Block, blocks, commands
from tests.quantised import INT8
from tests.runtime.serving.certificates import make_certificate
from tests.runtime.serving.fleets import make_adapter, put_adapter
from tests.runtime.serving.servers import Server, running_server
from tests.workshop import copy_bundle, run_command

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("curl", "jq", "openssl"))), reason="needs curl, jq and openssl"
)
PAGE = blocks("docs/serving.md")
# The page's adapters -> those of the test's bundle.
NAMES = {"digits": "alpha", "fashion": "beta"}


def block(head: str) -> Block:
    """The block of the page that has a line beginning so."""
    (found,) = (b for b in PAGE if any(line.startswith(head) for line in commands(b)))
    return found


def options_of(block: Block) -> list[str]:
    """Of the server that a block starts."""
    (line,) = (line for line in commands(block) if line.startswith("hhdeploy serve OUT "))
    return [NAMES.get(word, word) for word in shlex.split(line)[3:]]


def shell(text: str, server: Server | None = None) -> str:
    """What lines of the page print in bash; localhost's ports are the server's."""
    return program(["bash", "-eo", "pipefail", "-c"], text, server)


def program(interpreter: list[str], text: str, server: Server | None) -> str:
    names = NAMES
    if server is not None:
        names = {**NAMES, "localhost:8000": server.http, "localhost:8001": server.grpc}
    for theirs, ours in names.items():
        text = text.replace(theirs, ours)
    done = run_command([*interpreter, text], cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_asked_as_the_page_says(branches, workshop, pictures, tmp_path, monkeypatch):
    """Every block of bash and Python, of one server that has the options of both with a fleet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet").mkdir()
    (tmp_path / "picture.png").write_bytes(pictures[0])
    put_adapter(make_adapter(workshop, 1), tmp_path, "birds")
    fleet, guarded = (b for b in PAGE if "--adapters-dir fleet" in b.text)
    key, _ = commands(guarded)
    shell(key)
    asked = [b for b in PAGE if b.kind in ("bash", "python")]
    assert [b.kind for b in asked] == ["bash", "python", "python", "bash"]
    options = [*options_of(fleet), *options_of(guarded)]
    with (
        open_session(branches, device="cpu", threads=1) as session,
        running_server(branches, tmp_path / "log", *options) as server,
    ):
        printed = [
            shell(b.text, server)
            if b.kind == "bash"
            else program([sys.executable, "-c"], b.text, server)
            for b in asked
        ]
        with Image.open(io.BytesIO(pictures[0])) as opened:
            x = session.preprocess([opened], "alpha")
        best = session.entry("alpha").label(int(session.run(x, "alpha")[0, :7].argmax()))
    answer = json.loads(printed[0])
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["labels"]["data"] == [best]
    scores = [text.split(":") for text in outputs["probabilities"]["data"]]
    assert len(scores) == 3 and scores[0][2] == best
    (shown,) = (json.loads(b.text) for b in PAGE if b.kind == "json")
    assert shown.keys() == answer.keys()
    assert shown["parameters"].keys() == answer["parameters"].keys()
    assert printed[1] == f"[{best.encode()!r}]\n"
    assert printed[2].startswith("[[")
    index = "[" + printed[3].rpartition("}[")[2]  # after what the two loads were answered with
    states = {m["name"]: m["state"] for m in json.loads(index)}
    assert states["birds"] == "UNAVAILABLE" and states["alpha"] == "READY"
    assert (tmp_path / "fleet" / "birds" / TENSOR_FILE).is_file()


def test_its_first_servers(small, tmp_path):
    """One of any bundle, and one in INT8, which OpenVINO computes."""
    named, quantised = (shlex.split(line)[3:] for line in commands(PAGE[0]))
    with running_server(small, tmp_path / "log", *named) as server:
        assert server.json("GET", "/v2/models/vit")[0] == 200
    bundle = copy_bundle(INT8, tmp_path / "int8")
    with running_server(bundle, tmp_path / "log", *quantised) as server:
        status, found = server.json("GET", "/v2/models/int8")
    assert status == 200 and found["parameters"]["device"].startswith("openvino CPU")


def test_it_is_asked_over_tls_with_a_token(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_certificate(tmp_path)  # of localhost
    secured = block("(umask 077; openssl rand")
    tokens, _, ask = commands(secured)
    shell(tokens)
    with running_server(small, tmp_path / "log", *options_of(secured)) as server:
        _, port = server.http.split(":")
        ask = re.sub(r"https://[\w.]+:8000", f"https://localhost:{port}", ask)
        assert json.loads(shell(ask.replace("curl ", "curl -sf ")))["name"] == "vit"
