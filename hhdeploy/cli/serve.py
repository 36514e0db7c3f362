"""hhdeploy serve."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from hhdeploy.cli import ui


@click.command()
@click.argument("bundle", type=ui.DIRECTORY)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--http-port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--grpc-port",
    default=8001,
    show_default=True,
    type=click.IntRange(-1, 65535),
    help="-1: no gRPC.",
)
@click.option("--device", type=ui.DEVICES, default="auto", show_default=True)
@click.option("--precision", default="float32", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads of one run.")
@ui.cache_options("compiled models")
@click.option(
    "--contexts",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Batches at the same time; with openvino the threads are divided among them.",
)
@click.option(
    "--slots",
    type=click.IntRange(2),
    help="Rows of the bank, the backbone's included.  [default: 64, or what the bundle needs]",
)
@click.option(
    "--max-batch", default=32, show_default=True, type=click.IntRange(1), help="Images of one run."
)
@click.option(
    "--max-wait-ms",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0),
    help="How long a request waits for company while another batch runs, if --contexts lets it.",
)
@click.option(
    "--max-queue",
    default=1024,
    show_default=True,
    type=click.IntRange(1),
    help="Images that may wait; more are refused (429, UNAVAILABLE).",
)
@click.option(
    "--request-seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Limit of one request, from its first byte to its answer.",
)
@click.option("--model-name", help="Of the bundle in the protocol.  [default: its directory's]")
@click.option(
    "--adapters-dir",
    type=ui.DIRECTORY,
    help="Fleet directory: further adapters, one a folder, loaded when they are asked for.",
)
@click.option(
    "--watch-seconds",
    type=click.FloatRange(0.05),
    help="Look through --adapters-dir that often for new, changed and removed adapters.",
)
@click.option("--pin", "pinned", multiple=True, help="An adapter that never loses its row.")
@click.option(
    "--allow-adapter-loading",
    is_flag=True,
    help="Let the network load and unload adapters; needs --token-file.",
)
@click.option("--token-file", type=ui.FILE, help="The token that loading adapters needs.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="A name by which requests may call the server, e.g. that of a proxy on this machine.  "
    "[default: localhost on a loopback --host, any on others]",
)
@click.option(
    "--ray",
    "on_ray",
    is_flag=True,
    help="Several replicas on Ray: on the cluster of RAY_ADDRESS, or a local one. HTTP only.",
)
@click.option("--replicas", type=click.IntRange(1), help="With --ray.  [default: 2]")
@click.option("--log-level", default="info", show_default=True,
              type=click.Choice(["debug", "info", "warning", "error"]))  # fmt: skip
def command(
    bundle: Path,
    host: str,
    http_port: int,
    grpc_port: int,
    device: str,
    precision: str,
    threads: int | None,
    cache_dir: Path | None,
    no_cache: bool,
    contexts: int,
    slots: int | None,
    max_batch: int,
    max_wait_ms: float,
    max_queue: int,
    request_seconds: float,
    model_name: str | None,
    adapters_dir: Path | None,
    watch_seconds: float | None,
    pinned: tuple[str, ...],
    allow_adapter_loading: bool,
    token_file: Path | None,
    allowed_hosts: tuple[str, ...],
    on_ray: bool,
    replicas: int | None,
    log_level: str,
) -> None:
    """Serve BUNDLE: Open Inference Protocol v2 over HTTP and gRPC, all adapters in one batch.

    Any client of the protocol works, e.g. tritonclient. A request names its adapter by the
    parameter `adapter`, by the model's name, or one for each image by the input `adapters`.

    \b
    hhdeploy serve OUT                                       then open http://127.0.0.1:8000
    hhdeploy serve OUT --precision int8 --device openvino    the fastest on a CPU
    hhdeploy serve OUT --adapters-dir FLEET --watch-seconds 2
                                                             more adapters than rows
    hhdeploy serve OUT --ray --replicas 4                    several replicas, on Ray

    Log lines are JSON, on standard error. SIGTERM answers what was taken, then stops.
    """
    from hhdeploy.errors import require

    cache = ui.check_cache_options(cache_dir, no_cache)
    if on_ray:
        _serve_on_ray(click.get_current_context())
        return
    if replicas is not None:
        raise click.UsageError("--replicas goes with --ray; --contexts is for one process.")
    require("uvicorn", "serve", "hhdeploy serve")
    require("starlette", "serve", "hhdeploy serve")
    require("tritonclient.grpc", "serve", "hhdeploy serve")
    from hhdeploy.runtime.serving.logs import log_as_json
    from hhdeploy.runtime.serving.server import Addresses, serve
    from hhdeploy.runtime.serving.service import Service
    from hhdeploy.runtime.serving.settings import Limits, ServeSettings, read_token
    from hhdeploy.runtime.session import open_session

    log_as_json(log_level)
    settings = ServeSettings(
        model_name=model_name or bundle.resolve().name,
        max_batch=max_batch,
        max_wait=max_wait_ms / 1e3,
        contexts=contexts,
        adapters_dir=adapters_dir,
        watch_seconds=watch_seconds,
        pinned=frozenset(pinned),
        adapter_loading=allow_adapter_loading,
        token=read_token(token_file) if token_file is not None else None,
        allowed_hosts=frozenset(allowed_hosts),
        limits=Limits(queued_images=max_queue, request_seconds=request_seconds),
    )
    session = open_session(
        bundle,
        device=device,
        precision=precision,
        slots=slots,
        threads=threads,
        contexts=contexts,
        hint="throughput" if contexts > 1 and device == "openvino" else "latency",
        cache=cache,
        partial=True,
    )
    service_device = session.device

    def announce(where: Addresses) -> None:
        shown = f"[{where.host}]" if ":" in where.host else where.host
        grpc = f", gRPC {shown}:{where.grpc_port}" if where.grpc_port is not None else ""
        click.echo(
            f"{bundle} on {service_device}, {precision}: http://{shown}:{where.http_port}{grpc}"
        )

    async def run() -> None:
        await serve(
            Service(session, settings),
            host=host,
            http_port=http_port,
            grpc_port=grpc_port if grpc_port >= 0 else None,
            announce=announce,
        )

    with session:  # also when the service does not even start
        asyncio.run(run())


def _serve_on_ray(context: click.Context) -> None:
    from hhdeploy.errors import require

    require("ray.serve", "ray", "hhdeploy serve --ray")
    from hhdeploy.runtime.serving.logs import log_as_json
    from hhdeploy.runtime.serving.ray.args import RayArgs
    from hhdeploy.runtime.serving.ray.run import run_on_ray
    from hhdeploy.runtime.serving.server import Addresses

    options = context.params
    told = context.get_parameter_source("grpc_port") is ParameterSource.COMMANDLINE
    if told and options["grpc_port"] >= 0:
        raise click.UsageError("--ray serves HTTP only: leave --grpc-port out.")
    given = {name: options.get(name) for name in RayArgs.model_fields}
    args = RayArgs(**{name: _whole(value) for name, value in given.items() if value is not None})

    def announce(where: Addresses) -> None:
        address = f"http://{where.host}:{where.http_port}"
        click.echo(
            f"{options['bundle']} on {args.replicas} replicas, {args.device}, {args.precision}: "
            f"{address}"
        )

    log_as_json(options["log_level"])
    run_on_ray(args, http_port=options["http_port"], announce=announce)


def _whole(value: Any) -> Any:
    """Replicas have working directories of their own."""
    return value.resolve() if isinstance(value, Path) else value
