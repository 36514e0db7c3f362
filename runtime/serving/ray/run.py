"""`hhdeploy serve --ray`: the application on a cluster, until a signal stops it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException

from hhdeploy.errors import DeviceError, HhdeployError, PlanError
from hhdeploy.runtime.serving.access.tls import Tls
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.ray.app import application_of
from hhdeploy.runtime.serving.ray.grpc import grpc_side
from hhdeploy.runtime.serving.ray.registry import INGRESS, REPLICA
from hhdeploy.runtime.serving.ray.settings import RaySettings
from hhdeploy.runtime.serving.server import EXPOSED, Addresses
from hhdeploy.runtime.serving.tracing import start_tracing

_LOG = logging.getLogger("hhdeploy.serve.ray")
APP: Final = "hhdeploy"
_NO_GPU: Final = ("cpu", "openvino")
# What requests and uploads travel through, of a cluster that is started here.
_STORE_BYTES = 512 << 20
# For Ray Serve beyond the requests that are answered.
_GRACE_SECONDS = 5.0
# How soon a signal to read again is followed, and how long that may take.
_LOOK_SECONDS, _PATIENCE_SECONDS = 0.5, 60.0


def run_on_ray(
    settings: RaySettings,
    *,
    http_port: int,
    grpc_port: int | None,
    announce: Callable[[Addresses], None],
) -> None:
    """Serve until SIGINT or SIGTERM, then answer what was taken, and stop. SIGHUP: `_read_again`.

    On the cluster that RAY_ADDRESS names, else on one of this machine that ends with the server.

    Args:
        settings: the application's; Ray's proxy listens on the cluster's head node.
        http_port: 0 takes a free one of this machine.
        grpc_port: 0 takes a free one; None: no gRPC.
        announce: called once requests are answered.

    Raises:
        PlanError: the cluster has Ray Serve running already.
        DeviceError: the port is taken, or the replicas do not start.
    """
    # What is wrong with them is said before anything starts.
    access, tls = Access.of(settings), Tls.of(settings)
    start_tracing()
    grace = settings.request_seconds + _GRACE_SECONDS
    with _cluster(settings), _signals() as (stopped, again):
        port = free_port(settings.host, http_port)
        options = HTTPOptions(
            host=settings.host,
            port=port,
            ssl_certfile=str(settings.tls_cert) if tls is not None else None,
            ssl_keyfile=str(settings.tls_key) if tls is not None else None,
        )
        try:
            try:
                serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options)
                serve.run(application_of(_with_gpus(settings)), name=APP)
            except (RayServeException, RayError, RuntimeError, TimeoutError) as error:
                raise DeviceError(f"Ray Serve and its replicas do not start: {error}") from error
            with contextlib.ExitStack() as sides:
                side = None
                if grpc_port is not None:
                    side = sides.enter_context(
                        grpc_side(settings, APP, grpc_port, access, tls, grace)
                    )
                announce(Addresses(settings.host, port, side))
                if missing := settings.exposed():
                    _LOG.warning(EXPOSED, extra={"without": missing})
                _LOG.info("serving", extra={"replicas": settings.replicas})
                while not stopped.wait(_LOOK_SECONDS):
                    if again.is_set():
                        again.clear()
                        _read_again(settings, access, tls)
                _LOG.info("stopping")
            _drain(grace)
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            _LOG.info("stopped")


@contextlib.contextmanager
def _cluster(settings: RaySettings) -> Iterator[None]:
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not address:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet |= {
            "include_dashboard": False,
            # A replica is one of Ray's CPUs, whatever it takes: they share this machine's.
            "num_cpus": settings.replicas,
            "object_store_memory": _STORE_BYTES,
        }
    try:
        ray.init(address or "local", **quiet)
    except Exception as error:
        where = f"the cluster {address} does not answer" if address else "Ray does not start here"
        raise DeviceError(f"{where}: {error}") from error
    try:
        if serve.status().proxies:
            raise PlanError(
                f"Ray Serve runs already on the cluster {address}. Deploy to it with "
                "Ray's own command: serve deploy. Or stop it first: serve shutdown."
            )
        yield
    finally:
        ray.shutdown()  # type: ignore[no-untyped-call]


def _with_gpus(settings: RaySettings) -> RaySettings:
    """A GPU for each replica that computes on one; auto: where the cluster has that many."""
    there = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    wanted = (
        there >= settings.replicas if settings.device == "auto" else settings.device not in _NO_GPU
    )
    return replace(settings, gpus=float(wanted))


@contextlib.contextmanager
def _signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Two events: SIGINT and SIGTERM set the first, SIGHUP the second, also one that was blocked.

    A second SIGINT or SIGTERM does what it did before.
    """
    stopped, again = threading.Event(), threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in (*numbers, signal.SIGHUP)}

    def stop(number: int, frame: object) -> None:
        stopped.set()
        for each in numbers:  # SIGHUP must not end what is answered now
            signal.signal(each, before[each])

    for number in numbers:
        signal.signal(number, stop)
    signal.signal(signal.SIGHUP, lambda number, frame: again.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        yield stopped, again
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_again(settings: RaySettings, access: Access, tls: Tls | None) -> None:
    """Read tokens, gRPC's certificate, and the fleet directory, here and in every replica.

    Ray's own HTTP proxy keeps the certificate that it began with.
    """
    _LOG.info("reading tokens, certificate and fleet directory again")
    reads: list[Callable[[], object]] = [
        lambda: access.read(settings),
        lambda: _all_of(INGRESS, "read_tokens"),
        lambda: _all_of(REPLICA, "look"),
    ]
    for read in (*reads, *([tls.read] if tls is not None else ())):
        try:
            read()
        except (HhdeployError, OSError, TimeoutError, RayError, RayServeException) as error:
            _LOG.error("kept as it was", extra={"problem": str(error)[:500]})


def _all_of(deployment: str, method: str) -> None:
    """Have every replica of a deployment do something."""
    handle = serve.get_deployment_handle(deployment, APP)
    handle.broadcast(method).results(timeout_s=_PATIENCE_SECONDS)


def _drain(seconds: float) -> None:
    handle = serve.get_deployment_handle(INGRESS, APP)
    try:
        handle.broadcast("drain").results(timeout_s=seconds)
    except (TimeoutError, RayError, RayServeException) as error:
        _LOG.warning("not everything was answered", extra={"problem": str(error)})


def free_port(host: str, port: int) -> int:
    """The port, or for 0 one that is free now.

    Raises:
        DeviceError: the port is taken, or may not be listened on; Ray would try for ever.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listening:
            return int(listening.getsockname()[1])
    except OSError as error:
        raise DeviceError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another "
            "`host` or `http_port`."
        ) from error
