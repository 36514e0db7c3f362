"""hhdeploy serve."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hhdeploy.cli import ui
from hhdeploy.runtime.serving.settings import LEVELS, Option, ServeSettings

if TYPE_CHECKING:
    from hhdeploy.runtime.serving.server import Addresses

F = TypeVar("F", bound=Callable[..., Any])

# Types of options by their fields' annotations, where they have no range.
_TYPES: dict[str, Any] = {
    "str": str,
    "frozenset[str]": str,
    "Path | None": ui.FILE,
}
_OF_ONE = {
    "device": ui.DEVICE,
    "precision": ui.PRECISION,
    "log_level": click.Choice(LEVELS),
    "adapters_dir": ui.DIRECTORY,
}


def _settings_options(command: F) -> F:
    """An option for every field of the settings that has one, under the field's name."""
    for option in reversed(list(_options())):
        command = option(command)
    return command


def _options() -> Iterator[Callable[[F], F]]:
    for field in dataclasses.fields(ServeSettings):
        told: Option | None = field.metadata.get("option")
        if field.name == "cache_dir":
            yield ui.cache_options("compiled models")
        if told is None:
            continue
        flag = told.flag or f"--{field.name.replace('_', '-')}"
        shown: dict[str, Any] = {"help": told.help or None}
        if field.type == "bool":
            yield click.option(flag, field.name, is_flag=True, **shown)
        elif field.type == "frozenset[str]":
            yield click.option(flag, field.name, multiple=True, **shown)
        else:
            yield click.option(
                flag,
                field.name,
                type=_type(field.name, str(field.type), told),
                default=field.default or None,
                show_default=bool(field.default),
                **shown,
            )


def _type(name: str, annotation: str, told: Option) -> Any:
    if name in _OF_ONE:
        return _OF_ONE[name]
    if annotation.startswith("int"):
        return click.IntRange(None if told.least is None else int(told.least), told.most)
    if annotation.startswith("float"):
        return ui.Number(
            told.least if told.above is None else told.above, min_open=told.above is not None
        )
    return _TYPES[annotation]


@click.command()
@click.argument("bundle", type=ui.SOURCE)
@click.option("--http-port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--grpc-port",
    default=8001,
    show_default=True,
    type=click.IntRange(-1, 65535),
    help="-1: no gRPC.",
)
@_settings_options
@click.option(
    "--ray",
    "on_ray",
    is_flag=True,
    help="Several replicas on Ray: on the cluster of RAY_ADDRESS, or a local one.",
)
@click.option("--replicas", type=click.IntRange(1), help="With --ray.  [default: 2]")
def command(
    http_port: int, grpc_port: int, on_ray: bool, replicas: int | None, **options: Any
) -> None:
    """Serve BUNDLE: Open Inference Protocol v2 over HTTP and gRPC, all adapters in one batch.

    Any client of the protocol works, e.g. tritonclient. A request names its adapter by the
    parameter `adapter`, by the model's name, or one for each image by the input `adapters`.

    \b
    For this machine, and its browser at http://127.0.0.1:8000:
      hhdeploy serve bundle/
    The fastest on a CPU, after hhdeploy calibrate:
      hhdeploy serve bundle/ --precision int8 --device openvino
    More adapters than rows:
      hhdeploy serve bundle/ --adapters-dir fleet/ --watch-seconds 2
    Several replicas, on Ray:
      hhdeploy serve bundle/ --ray --replicas 4

    Log lines are JSON, on standard error. SIGTERM answers what was taken, then stops; SIGHUP
    reads tokens, certificate and fleet directory again.
    """
    ui.check_cache_options(options["cache_dir"], options["no_cache"])
    # What was not given keeps the default of its field.
    given = {name: value for name, value in options.items() if value is not None}
    given |= {name: frozenset(given[name]) for name in ("pinned", "allowed_hosts")}
    if replicas is not None and not on_ray:
        raise click.UsageError("--replicas goes with --ray; --contexts is for one process.")
    with _hangups_wait():
        if on_ray:
            _serve_on_ray(given, replicas, http_port, grpc_port)
        else:
            _serve(ServeSettings(**given), http_port, grpc_port)


@contextlib.contextmanager
def _hangups_wait() -> Iterator[None]:
    """A SIGHUP waits until the server, which unblocks it, reads again: it ends no start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(settings: ServeSettings, http_port: int, grpc_port: int) -> None:
    from hhdeploy.errors import require

    require("uvicorn", "serve", "hhdeploy serve")
    require("starlette", "serve", "hhdeploy serve")
    # gRPC's own lines are no JSON, and every failed handshake of anybody is one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for module in ("tritonclient.grpc", "grpc_health.v1", "grpc_reflection.v1alpha", "hpack"):
        require(module, "serve", "hhdeploy serve")
    from hhdeploy.runtime.serving.access.tls import Tls
    from hhdeploy.runtime.serving.access.tokens import Access
    from hhdeploy.runtime.serving.logs import log_as_json
    from hhdeploy.runtime.serving.server import serve
    from hhdeploy.runtime.serving.service import Service
    from hhdeploy.runtime.serving.tracing import start_tracing
    from hhdeploy.runtime.session import open_session

    log_as_json(settings.log_level)
    start_tracing()
    access, tls = Access.of(settings), Tls.of(settings)
    session = open_session(settings.bundle, **settings.session_options())
    served = f"{settings.bundle} on {session.device}, {settings.precision}"

    def announce(where: Addresses) -> None:
        scheme = "http" if tls is None else "https"
        click.echo(f"{served}: {scheme}://{_shown(where)}")

    async def run() -> None:
        await serve(
            Service(session, settings),
            access=access,
            tls=tls,
            http_port=http_port,
            grpc_port=grpc_port if grpc_port >= 0 else None,
            announce=announce,
        )

    with session:  # also when the service does not even start
        asyncio.run(run())


def _serve_on_ray(
    given: dict[str, Any], replicas: int | None, http_port: int, grpc_port: int
) -> None:
    from hhdeploy.errors import require

    require("ray.serve", "ray", "hhdeploy serve --ray")
    from hhdeploy.runtime.serving.logs import log_as_json
    from hhdeploy.runtime.serving.ray.run import run_on_ray
    from hhdeploy.runtime.serving.ray.settings import RaySettings

    if replicas is not None:
        given = {**given, "replicas": replicas}
    settings = RaySettings(**{name: _whole(value) for name, value in given.items()})

    def announce(where: Addresses) -> None:
        scheme = "http" if settings.tls_cert is None else "https"
        click.echo(
            f"{settings.bundle} on {settings.replicas} replicas, {settings.device}, "
            f"{settings.precision}: {scheme}://{_shown(where)}"
        )

    log_as_json(settings.log_level)
    run_on_ray(
        settings,
        http_port=http_port,
        grpc_port=grpc_port if grpc_port >= 0 else None,
        announce=announce,
    )


def _shown(where: Addresses) -> str:
    """Both addresses, after the first one's scheme."""
    host = f"[{where.host}]" if ":" in where.host else where.host
    grpc = f", gRPC {host}:{where.grpc_port}" if where.grpc_port is not None else ""
    return f"{host}:{where.http_port}{grpc}"


def _whole(value: Any) -> Any:
    """Replicas have working directories of their own."""
    return value.resolve() if isinstance(value, Path) else value
