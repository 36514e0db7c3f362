"""hhdeploy bench --serve."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hhdeploy.choices import Device, Precision
from hhdeploy.cli import ui
from hhdeploy.cli.naming import OneOf
from hhdeploy.cli.progress import phased_steps
from hhdeploy.loadtest.abuse.kinds import KINDS

if TYPE_CHECKING:
    from hhdeploy.loadtest.report import Latencies, Report
    from hhdeploy.loadtest.run import Start, Subject

F = TypeVar("F", bound=Callable[..., Any])

_SERVER = """
import sys
from hhdeploy.loadtest.process import stop_with_input
stop_with_input()
from hhdeploy.cli import main
sys.exit(main())
"""
_OPTIONS = (
    click.option(
        "--serve",
        is_flag=True,
        help="Start hhdeploy serve and test it under load, faults included.",
    ),
    click.option(
        "--adapters",
        default=64,
        show_default=True,
        type=click.IntRange(1),
        help="--serve: of the fleet: BUNDLE's own, then variants of them made for the test.",
    ),
    click.option("--requests", default=20_000, show_default=True, type=click.IntRange(1),
                 help="--serve: in all."),
    click.option("--clients", default=16, show_default=True, type=click.IntRange(1),
                 help="--serve: connections, each with one request at a time."),
    click.option(
        "--rate",
        type=ui.Number(0, min_open=True),
        help="--serve: images a second, at random times (open loop).  [default: closed loop]",
    ),
    click.option("--skew", default=1.1, show_default=True, type=ui.Number(0),
                 help="--serve: of the adapters' popularity, Zipf's exponent."),
    click.option(
        "--churn",
        default=5.0,
        show_default=True,
        type=ui.Number(0),
        help="--serve: adapters added, replaced, removed and loaded again, a second.",
    ),
    click.option("--images-per-request", default=1, show_default=True, type=click.IntRange(1),
                 help="--serve: all for the same adapter."),
    click.option("--slots", type=click.IntRange(2),
                 help="--serve: rows of the bank; less than --adapters to see evictions."),
    click.option("--seed", default=0, show_default=True, type=ui.SEED,
                 help="--serve: of variants, images, times and changes."),
    click.option(
        "--abuse",
        multiple=True,
        type=OneOf([*KINDS, "all"]),
        help="--serve: 4 honest clients at half of saturation beside one that means harm. "
        "Repeatable.",
    ),
    click.option("--seconds", default=60.0, show_default=True,
                 type=ui.Number(0, min_open=True),
                 help="--abuse: of each kind, and of its control."),
)  # fmt: skip
_ONLY_SERVE = frozenset(
    "adapters requests clients rate skew churn images_per_request slots seed abuse".split()
)
_NEVER_ABUSE = frozenset("requests clients rate churn images_per_request".split())
_NEVER_SERVE = frozenset("against batches runs".split())


def serve_options(command: F) -> F:
    """``--serve`` and what belongs to it, gathered in the argument ``load``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check_load_options(serve: bool, abuse: bool) -> None:
    """Refuse options that would do nothing, with or without ``--serve`` and ``--abuse``."""
    if serve:
        ui.refuse_unused(_NEVER_SERVE, "does not go with --serve")
    else:
        ui.refuse_unused(_ONLY_SERVE, "needs --serve")
    if abuse:
        ui.refuse_unused(_NEVER_ABUSE, "does not go with --abuse")
    else:
        ui.refuse_unused({"seconds"}, "needs --abuse")


def server_command(bundle: Path, **options: object) -> list[str]:
    """The command line of ``hhdeploy serve`` on a free port, HTTP alone, for `running_server`.

    Args:
        bundle: what is served.
        options: by name, ``-`` written ``_``; True for a flag, None to leave one out.
    """
    command = [sys.executable, "-c", _SERVER, "serve", str(bundle)]
    for name, value in {"http_port": 0, "grpc_port": -1, **options}.items():
        if value is not None:
            command.append(f"--{name.replace('_', '-')}")
            command += [] if value is True else [str(value)]
    return command


def bench_server(
    bundle: Path,
    *,
    device: Device,
    precision: Precision,
    threads: int | None,
    as_json: bool,
    options: dict[str, Any],
) -> int:
    """Run the load test and print its report; 0 if nothing was wrong, else 1."""
    from hhdeploy.errors import require

    for module in ("uvicorn", "starlette", "prometheus_client", "aiohttp"):
        require(module, "serve", "hhdeploy bench --serve")
    from hhdeploy.loadtest.run import Subject

    subject = Subject(bundle, options["adapters"], device, precision, threads)
    serving = {
        "precision": precision,
        "threads": threads,
        "slots": options["slots"],
        "cache_dir": options["cache_dir"],
        "no_cache": options["no_cache"] or None,
    }
    if options["abuse"]:
        from hhdeploy.cli.bench_abuse import bench_abuse

        return bench_abuse(subject, serving, as_json=as_json, options=options)
    return _bench_load(subject, serving, as_json=as_json, options=options)


def _bench_load(
    subject: Subject, serving: dict[str, Any], *, as_json: bool, options: dict[str, Any]
) -> int:
    from hhdeploy.loadtest.run import run_load_test
    from hhdeploy.loadtest.traffic import Load

    load = Load(
        requests=options["requests"],
        clients=options["clients"],
        rate=options["rate"],
        skew=options["skew"],
        churn=options["churn"],
        images=options["images_per_request"],
        seed=options["seed"],
    )

    def command(start: Start) -> list[str]:
        return server_command(
            subject.bundle,
            **serving,
            device=start.device,
            model_name=start.model,
            adapters_dir=start.fleet,
            token_file=start.token_file,
            allow_adapter_loading=True,
        )

    with phased_steps(as_json) as (step, phase):
        report = run_load_test(subject, load, command, step, phase)
    if as_json:
        ui.print_json({"precision": subject.precision, **report.to_json()})
    else:
        _show(report, subject.bundle.name, subject.adapters)
    return 0 if report.passed else 1


def _show(report: Report, name: str, adapters: int) -> None:
    console = ui.console()
    console.print(
        ui.table(
            ui.titled(
                f"{report.requests} requests over {adapters} adapters of {name}",
                "the bundle's own and variants with random values, made for this test",
            ),
            ("answers", "requests"),
            [(verdict.value, number) for verdict, number in report.verdicts.items()],
        )
    )
    if report.statuses:
        console.print(f"refused, by status: {report.statuses}")
    for fault in report.faults:
        console.print(fault, style="red", markup=False)
    groups = {f"requests, {key}": found for key, found in report.latencies.items()}
    groups |= {f"changes: {key}": found for key, found in report.changes.items()}
    console.print()
    console.print(
        ui.table(
            "Latency seen by the client",
            ("", "count", "p50 ms", "p90 ms", "p99 ms", "max ms"),
            [(key, *_cells(found)) for key, found in groups.items()],
        )
    )
    console.print()
    console.print(ui.table("Throughput and cost", ("", ""), _costs(report)))
    console.print(
        ui.verdict(
            report.passed,
            "passed: every answer was what its adapter had to say",
            f"FAILED: {report.faulty} of {report.requests} requests, {report.failed_changes} "
            f"changes of adapters; the server's exit code was {report.exit_code}",
        )
    )


def _cells(found: Latencies) -> list[object]:
    times = (found.p50_ms, found.p90_ms, found.p99_ms, found.max_ms)
    return [found.count, *("" if t is None else f"{t:.2f}" for t in times)]


def _costs(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("requests/s", f"{report.requests / report.seconds:.1f}"),
        ("images/s", f"{report.images / report.seconds:.1f}"),
        ("seconds", f"{report.seconds:.1f}"),
        ("answers that another version's would be told from", f"{report.told_apart:.3%}"),
        ("client's CPU seconds", f"{report.client_cpu_seconds:.1f}"),
    ]
    counts = report.counts
    if counts is None:
        return [*rows, ("server", "does not answer")]
    if counts.cpu_seconds is not None:
        rows.append(("server's CPU seconds", f"{counts.cpu_seconds:.1f}"))
    if counts.rss_bytes is not None and report.rss_at_start is not None:
        sizes = f"{report.rss_at_start / 2**20:.0f} -> {counts.rss_bytes / 2**20:.0f}"
        rows.append(("server's memory, MB", sizes))
    rows += [
        ("batches", f"{counts.batches:.0f}"),
        ("images of a batch, mean", f"{counts.images / max(1.0, counts.batches):.2f}"),
        ("adapters loaded", f"{counts.loads:.0f}"),
        ("of a load in the server, mean ms",
         f"{1e3 * counts.load_seconds / max(1.0, counts.loads):.2f}"),
        ("evictions", f"{counts.evictions:.0f}"),
    ]  # fmt: skip
    for name, seconds in counts.seconds.items():
        rows.append((f"of a request, {name.replace('_', ' ')}, mean ms",
                     f"{1e3 * seconds / max(1.0, counts.requests):.2f}"))  # fmt: skip
    return rows
