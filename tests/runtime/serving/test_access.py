"""Tokens and TLS, with the clients that people have: who is answered, and who is not."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import signal
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from hhdeploy.errors import PlanError
from hhdeploy.runtime.serving.access.tls import Tls
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.errors import ForbiddenError, UnauthorizedError
from hhdeploy.runtime.serving.settings import ServeSettings
from tests.runtime.serving.certificates import make_certificate
from tests.runtime.serving.fleets import PATIENCE, make_adapter, put_adapter
from tests.runtime.serving.servers import TOKEN, Server, running_server

ONE, TWO, NEW = ("a-token-of-one-client", "a-token-of-another", "a-token-that-comes-later")
GUESS = "a-token-that-is-a-guess"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


# --- files ----------------------------------------------------------------------------------------


def settings_of(folder: Path, **chosen: object) -> ServeSettings:
    return ServeSettings(folder, inference_token_file=folder / "tokens", **chosen)


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"two words of a token", b"x" * 1025, b"\xff" * 32, "ümlaut-ümlaut-ü".encode(),
     f"{ONE}\n\n{TWO}".encode(), b"\n".join(b"a-token-among-many" for _ in range(65))],
)  # fmt: skip
def test_files_that_hold_no_tokens(tmp_path, content):
    (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(PlanError, match="`inference_token_file`") as caught:
        Access.of(settings_of(tmp_path))
    if len(content) > 1:
        assert content.decode("utf-8", "replace") not in str(caught.value)


def test_the_token_of_loading_is_one(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{ONE}\n{TWO}\n")
    settings = ServeSettings(tmp_path, allow_adapter_loading=True, token_file=file)
    with pytest.raises(PlanError, match=r"`token_file`.*expected one line"):
        Access.of(settings)
    file.unlink()
    with pytest.raises(PlanError, match=r"`token_file`.*cannot be read"):
        Access.of(settings)
    for mark in ("", "\ufeff"):  # of Notepad
        file.write_text(f"{mark}{ONE}\n", encoding="utf-8")
        Access.of(settings).check_loading(f"Bearer {ONE}")


def test_a_file_that_everybody_may_read_is_warned_of(tmp_path, caplog):
    file = tmp_path / "tokens"
    file.write_text(ONE)
    with caplog.at_level(logging.WARNING):
        file.chmod(0o640)
        Access.of(settings_of(tmp_path))
        assert not caplog.records
        file.chmod(0o644)
        Access.of(settings_of(tmp_path))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["others may read the token: chmod 600"]


def test_who_may_do_what():
    access = Access(TOKEN, [ONE, TWO])
    for token in (ONE, TWO, TOKEN):  # whoever may load may ask
        access.check_asking(f"bearer {token}")
    for header in (
        None,
        "",
        "Bearer",
        ONE,
        f"Basic {ONE}",
        f"Bearer {ONE}{TWO}",
        f"Bearer {GUESS}",
    ):
        with pytest.raises(UnauthorizedError):
            access.check_asking(header)
    access.check_loading(f"Bearer {TOKEN}")
    with pytest.raises(UnauthorizedError):  # whoever may ask may not load
        access.check_loading(f"Bearer {ONE}")
    with pytest.raises(ForbiddenError):
        Access(None, [ONE]).check_loading(f"Bearer {ONE}")
    Access(TOKEN).check_asking(None)  # no inference token: nobody needs one


def test_files_are_read_again_as_a_whole(tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "tokens").write_text(ONE)
    settings = settings_of(tmp_path, allow_adapter_loading=True, token_file=tmp_path / "token")
    access = Access.of(settings)
    (tmp_path / "token").write_text(NEW)
    (tmp_path / "tokens").write_text("short")
    with pytest.raises(PlanError):
        access.read(settings)
    access.check_loading(f"Bearer {TOKEN}")
    access.check_asking(f"Bearer {ONE}")
    (tmp_path / "tokens").write_text(TWO)
    access.read(settings)
    for check, old in ((access.check_loading, TOKEN), (access.check_asking, ONE)):
        with pytest.raises(UnauthorizedError):
            check(f"Bearer {old}")


def served(context: ssl.SSLContext, protocol: str, client: ssl.SSLContext) -> bool:
    """Whether both shake hands, and speak this protocol then."""
    client.set_alpn_protocols([protocol])
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_hostname="localhost"),
        context.wrap_bio(up, down, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return {end.selected_alpn_protocol() for end in ends} == {protocol}


def test_certificates_that_are_none(tmp_path):
    cert, key = make_certificate(tmp_path)
    tls = Tls(cert, key)
    other = tmp_path / "other"
    other.mkdir()
    key.write_bytes(make_certificate(other)[1].read_bytes())
    with pytest.raises(PlanError, match=r"`tls_cert`, `tls_key`: .*tls.crt"):
        tls.read()  # a key of another certificate
    for context, protocol in ((tls.http, "http/1.1"), (tls.grpc, "h2")):  # the old one still
        assert served(context, protocol, ssl.create_default_context(cafile=str(cert)))
    key.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n")
    for files in ((cert, key), (key, cert), (cert, tmp_path / "none")):
        with pytest.raises(PlanError, match="not encrypted"):
            Tls(*files)


def test_what_is_wrong_with_a_certificate_or_its_key_is_said(tmp_path):
    """OpenSSL says "[SSL] PEM lib (_ssl.c:3905)" of most of them."""
    signer, own = tmp_path / "signer", tmp_path / "own"
    for folder in (signer, own):
        folder.mkdir()
    first, _ = make_certificate(signer)
    cert, key = make_certificate(own)
    written = {
        "chain": cert.read_bytes() + first.read_bytes(),
        "reverse": first.read_bytes() + cert.read_bytes(),
        "none": b"",
        "text": b"a password",
        "cut": cert.read_bytes()[:200],
        "half": key.read_bytes()[:60] + b"\n-----END PRIVATE KEY-----\n",
    }
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    Tls(tmp_path / "chain", key)
    for files, said in (
        ((tmp_path / "reverse", key), "the key belongs to certificate 2 of 2. The server's own"),
        ((first, key), "the key belongs to another certificate."),
        ((key, cert), "`tls_cert`: no PEM block is a CERTIFICATE, found PRIVATE KEY."),
        ((cert, cert), "`tls_key`: no PEM block is a PRIVATE KEY, found CERTIFICATE."),
        ((tmp_path / "none", key), "`tls_cert`: no PEM block is a CERTIFICATE, found none."),
        ((cert, tmp_path / "text"), "`tls_key`: no PEM block is a PRIVATE KEY, found none."),
        ((tmp_path / "cut", key), "`tls_cert`: it is damaged."),
        ((cert, tmp_path / "half"), "`tls_key`: it is damaged, or of an unknown kind."),
    ):
        with pytest.raises(PlanError) as caught:
            Tls(*files)
        assert said in str(caught.value) and "_ssl.c" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"), [("ec", "rsa"), ("rsa", "ec"), ("ec", "ec"), ("rsa", "rsa")]
)
def test_a_renewed_certificate_is_the_only_one(tmp_path, old, new):
    """Also with a key of another type, beside which OpenSSL would keep the old certificate."""
    tls = Tls(*make_certificate(tmp_path, "old", old))
    trusts_old = (tmp_path / "tls.crt").read_text()
    cert, _ = make_certificate(tmp_path, "new", new)
    tls.read()
    for context, protocol in ((tls.http, "http/1.1"), (tls.grpc, "h2")):
        assert served(context, protocol, ssl.create_default_context(cafile=str(cert)))
        for types in ("aRSA", "aECDSA"):  # whatever a client takes
            client = ssl.create_default_context(cadata=trusts_old)
            client.maximum_version = ssl.TLSVersion.TLSv1_2
            client.set_ciphers(types)
            with pytest.raises(ssl.SSLError):
                served(context, protocol, client)


EXPIRED, LATER = (-48, -24), (24, 24 * 365 * 200)  # years beyond 2049 are written in another way


@pytest.mark.parametrize(("hours", "said"), [(EXPIRED, "ended at 2"), (LATER, "begins at 2")])
def test_a_certificate_out_of_its_time(tmp_path, caplog, hours, said):
    cert, key = make_certificate(tmp_path)
    tls = Tls(cert, key)
    trusts = ssl.create_default_context(cafile=str(cert))
    assert not caplog.records
    make_certificate(tmp_path, hours=hours)
    with pytest.raises(PlanError, match=rf"`tls_cert`: .*tls.crt: .* that {said}"):
        tls.read()
    for context, protocol in ((tls.http, "http/1.1"), (tls.grpc, "h2")):  # the old one still
        assert served(context, protocol, trusts)
    # A server that has no other one begins with it: a clock may be wrong until it is set.
    Tls(cert, key)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and said in record.problem


def test_a_chain_is_as_good_as_its_worst_certificate(tmp_path):
    (tmp_path / "old").mkdir()
    cert, key = make_certificate(tmp_path)
    tls = Tls(cert, key)
    old, _ = make_certificate(tmp_path / "old", hours=EXPIRED)
    cert.write_text(
        f"Subject: this one's, as openssl writes it\n{cert.read_text()}\n{old.read_text()}"
    )
    with pytest.raises(PlanError, match="ended at"):
        tls.read()


def test_files_that_are_renewed_while_they_are_read(tmp_path, monkeypatch):
    """Certificate first, key later: what is read once is one pair for both wires."""
    cert, key = make_certificate(tmp_path)
    trusted = ssl.create_default_context(cafile=str(cert))
    load, loads = ssl.SSLContext.load_cert_chain, []

    def slowly(self, *files):
        load(self, *files)
        loads.append(files)
        if len(loads) == 1:
            make_certificate(tmp_path / "new")
            cert.write_bytes((tmp_path / "new" / "tls.crt").read_bytes())

    (tmp_path / "new").mkdir()
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", slowly)
    tls = Tls(cert, key)
    assert len(loads) == 2
    for context, protocol in ((tls.http, "http/1.1"), (tls.grpc, "h2")):
        assert served(context, protocol, trusted)
    with pytest.raises(PlanError, match="tls_cert"):
        tls.read()  # half of the renewal


# --- a server with all of it ----------------------------------------------------------------------


class Secured:
    """A server that needs TLS and a token, and the folder that its files are in."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "tls.crt"))

    def request(
        self, method: str, path: str, token: str | None = None, body: bytes | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPSConnection(
            self.server.http, timeout=PATIENCE, context=self.context()
        )
        with contextlib.closing(connection):
            connection.request(method, path, body, {} if token is None else bearer(token))
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    @contextlib.contextmanager
    def stub(self) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
        root = (self.folder / "tls.crt").read_bytes()
        with grpc.secure_channel(self.server.grpc, grpc.ssl_channel_credentials(root)) as channel:
            yield service_pb2_grpc.GRPCInferenceServiceStub(channel)

    def code(self, method: str, message: object, token: str | None) -> str:
        """How gRPC answers a call."""
        metadata = () if token is None else tuple(bearer(token).items())
        with self.stub() as stub:
            try:
                answer = getattr(stub, method)(message, metadata=metadata, timeout=PATIENCE)
                list(answer) if method == "ModelStreamInfer" else answer
            except grpc.RpcError as error:
                return error.code().name
        return "OK"


@pytest.fixture(scope="module")
def secured(small, tmp_path_factory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    cert, key = make_certificate(folder)
    for name, content in (("token", TOKEN), ("tokens", f"{ONE}\n{TWO}\n")):
        (folder / name).write_text(content)
        (folder / name).chmod(0o600)
    (folder / "fleet").mkdir()
    options = {
        "tls-cert": cert, "tls-key": key, "token-file": folder / "token",
        "inference-token-file": folder / "tokens", "adapters-dir": folder / "fleet",
        "model-name": "tiny", "host": "127.0.0.1", "log-level": "debug",
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    with running_server(small, folder / "log", "--allow-adapter-loading", *flags) as server:
        yield Secured(server, folder)


def test_health_and_the_page_are_there_for_all_over_tls(secured):
    for path in ("/v2/health/live", "/v2/health/ready", "/", "/page.css", "/page.js"):
        assert secured.request("GET", path)[0] == 200
    assert secured.code("ServerLive", pb.ServerLiveRequest(), None) == "OK"
    assert secured.code("ServerReady", pb.ServerReadyRequest(), None) == "OK"


@pytest.mark.parametrize("token", [None, GUESS, ONE[:-1], f"{ONE}x"])
def test_without_a_right_token_nothing_else_is(secured, token):
    for method, path in (
        ("GET", "/v2"), ("GET", "/status"), ("GET", "/metrics"), ("GET", "/v2/models/tiny"),
        ("GET", "/v2/models/tiny/ready"), ("GET", "/v2/models/tiny/stats"),
        ("GET", "/v2/models/alpha/config"), ("POST", "/v2/repository/index"),
        ("POST", "/v2/models/tiny/infer"), ("POST", "/v2/models/nobody/infer"),
    ):  # fmt: skip
        status, headers, body = secured.request(method, path, token, b"{}")
        assert (status, headers["www-authenticate"]) == (401, "Bearer"), path
        assert b"Authorization: Bearer TOKEN" in body
    for name, message in (
        ("ModelInfer", pb.ModelInferRequest()),
        ("ModelStreamInfer", iter([pb.ModelInferRequest()])),
        ("ModelReady", pb.ModelReadyRequest(name="tiny")),
        ("RepositoryIndex", pb.RepositoryIndexRequest()),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="alpha")),
    ):
        assert secured.code(name, message, token) == "UNAUTHENTICATED", name


def test_tritonclient_asks_with_a_token_over_both_wires(secured, small):
    pixels = np.full((1, 3, 64, 64), 0.25, np.float32)
    root = str(secured.folder / "tls.crt")
    over_http = tritonclient.http.InferenceServerClient(
        secured.server.http, ssl=True, ssl_context_factory=secured.context
    )
    over_grpc = tritonclient.grpc.InferenceServerClient(
        secured.server.grpc, ssl=True, root_certificates=root
    )
    found = []
    for module, client in ((tritonclient.http, over_http), (tritonclient.grpc, over_grpc)):
        with contextlib.closing(client):
            assert client.is_server_live() and client.is_server_ready()
            size = client.get_model_metadata("tiny", headers=bearer(ONE))
            shape = size["inputs"][0]["shape"] if isinstance(size, dict) else size.inputs[0].shape
            images = np.resize(pixels, (1, *shape[1:]))
            tensor = module.InferInput("images", images.shape, "FP32")
            tensor.set_data_from_numpy(images)
            found.append(client.infer("alpha", [tensor], headers=bearer(TWO)).as_numpy("logits"))
            with pytest.raises(InferenceServerException, match="Authorization: Bearer TOKEN"):
                client.infer("alpha", [tensor], headers=bearer(GUESS))
    np.testing.assert_array_equal(*found)


def test_plain_text_is_not_answered(secured):
    with pytest.raises((http.client.HTTPException, OSError)):
        secured.server.request("GET", "/v2/health/live")
    with (
        grpc.insecure_channel(secured.server.grpc) as channel,
        pytest.raises(grpc.RpcError, match="UNAVAILABLE"),
    ):
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(
            pb.ServerLiveRequest(), timeout=PATIENCE
        )
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"https://{secured.server.http}/v2/health/live", timeout=PATIENCE)


def test_loading_needs_the_operator_s_own_token(secured):
    path = "/v2/repository/models/alpha/unload"
    assert secured.request("POST", path, ONE, b"{}")[0] == 401
    load = pb.RepositoryModelLoadRequest(model_name="alpha")
    assert secured.code("RepositoryModelLoad", load, TWO) == "UNAUTHENTICATED"
    assert secured.code("RepositoryModelLoad", load, TOKEN) == "OK"
    assert secured.request("GET", "/v2", TOKEN)[0] == 200


def soon(true) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_hangup_reads_tokens_certificate_and_fleet_again(secured, workshop):
    """The last test of this server: its files change."""
    with contextlib.closing(
        http.client.HTTPSConnection(
            secured.server.http, timeout=PATIENCE, context=secured.context()
        )
    ) as kept:
        kept.request("GET", "/v2", headers=bearer(ONE))
        assert kept.getresponse().read()
        (secured.folder / "tokens").write_text(f"{TWO}\n{NEW}\n")
        make_certificate(secured.folder, "renewed")
        put_adapter(make_adapter(workshop, 3), secured.folder / "fleet", "later")
        secured.server.process.send_signal(signal.SIGHUP)
        soon(lambda: b'"later"' in index(secured, kept))
        # Who was connected stays so, and needs a token that is left.
        kept.request("GET", "/v2", headers=bearer(ONE))
        answer = kept.getresponse()
        assert (answer.status, bool(answer.read())) == (401, True)
    assert secured.request("GET", "/v2", NEW)[0] == 200  # with the new certificate
    assert secured.code("ModelReady", pb.ModelReadyRequest(name="later"), NEW) == "OK"
    assert secured.code("ModelReady", pb.ModelReadyRequest(name="later"), ONE) == "UNAUTHENTICATED"

    (secured.folder / "tokens").write_text("short")
    (secured.folder / "tls.key").write_text("no key")
    secured.server.process.send_signal(signal.SIGHUP)
    said = "kept as it was"
    soon(lambda: sum(r["message"] == said for r in secured.server.records()) == 2)
    assert secured.request("GET", "/v2", NEW)[0] == 200
    log = secured.server.log.read_text()
    assert not any(token in log for token in (ONE, TWO, NEW, GUESS, TOKEN))


def test_hangup_while_it_starts_is_followed_once_it_serves(small, tmp_path):
    """The token file holds up the start: it is a pipe whose other end is here."""
    file, later = tmp_path / "tokens", tmp_path / "later"
    os.mkfifo(file, 0o600)
    later.write_text(TWO)
    later.chmod(0o600)

    def hang_up() -> None:
        with file.open("w") as pipe:  # once the server reads it
            (process,) = [c for c in psutil.Process().children() if str(file) in c.cmdline()]
            process.send_signal(signal.SIGHUP)
            later.replace(file)
            pipe.write(ONE)

    thread = threading.Thread(target=hang_up)
    thread.start()
    flags = ["--inference-token-file", file, "--grpc-port", "-1"]
    with running_server(small, tmp_path / "log", *flags) as server:
        thread.join()
        soon(lambda: server.request("GET", "/v2", headers=bearer(TWO))[0] == 200)
        assert server.request("GET", "/v2", headers=bearer(ONE))[0] == 401


@pytest.mark.parametrize("what", ["a pipe", "a device"])
def test_hangup_waits_for_no_pipe_and_no_device(small, tmp_path, what):
    """Nobody would be answered meanwhile, and the server could not even be stopped."""
    files = [tmp_path / "tokens", *make_certificate(tmp_path)]
    files[0].write_text(ONE)
    flags = ["--inference-token-file", files[0], "--tls-cert", files[1], "--tls-key", files[2]]
    with running_server(small, tmp_path / "log", *flags, "--grpc-port", "-1") as server:
        for file in files:
            file.unlink()
            if what == "a pipe":
                os.mkfifo(file)
            else:
                file.symlink_to("/dev/zero")
        server.process.send_signal(signal.SIGHUP)

        def kept() -> list[str]:
            return [r["problem"] for r in server.records() if r["message"] == "kept as it was"]

        soon(lambda: len(kept()) == 2)
        assert all(f"it is {what}; a plain file was expected" in problem for problem in kept())


def index(secured: Secured, connection: http.client.HTTPSConnection) -> bytes:
    connection.request("POST", "/v2/repository/index", b"{}", bearer(TWO))
    return connection.getresponse().read()


@pytest.mark.parametrize("secure", [False, True])
def test_a_server_that_others_reach_says_what_it_is_without(small, tmp_path, secure):
    flags: list[object] = ["--host", "0.0.0.0", "--log-level", "warning"]
    if secure:
        cert, key = make_certificate(tmp_path)
        (tmp_path / "tokens").write_text(ONE)
        os.chmod(tmp_path / "tokens", 0o600)
        flags += ["--tls-cert", cert, "--tls-key", key]
        flags += ["--inference-token-file", tmp_path / "tokens"]
    with running_server(small, tmp_path / "log", *flags) as server:
        pass
    said = [r for r in map(json.loads, server.log.read_text().splitlines()) if "without" in r]
    assert [r["without"] for r in said] == (
        [] if secure else ["`tls_cert`, `inference_token_file`"]
    )
