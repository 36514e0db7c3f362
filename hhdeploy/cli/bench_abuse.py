"""hhdeploy bench --serve --abuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hhdeploy.cli import ui
from hhdeploy.cli.bench_serve import server_command
from hhdeploy.cli.progress import phased_steps

if TYPE_CHECKING:
    from hhdeploy.loadtest.abuse.bounds import AbuseReport, Siege
    from hhdeploy.loadtest.run import Start, Subject

# How often the server of the abuse looks through its fleet.
_WATCH_SECONDS = 1


def bench_abuse(
    subject: Subject, serving: dict[str, Any], *, as_json: bool, options: dict[str, Any]
) -> int:
    """Try every kind of abuse that was asked for and print what others saw; 0 if all bounds hold.

    Args:
        subject: what is tested.
        serving: options of the server.
        as_json: print JSON instead of tables.
        options: of the command.
    """
    from hhdeploy.errors import require

    for module in ("tritonclient.grpc", "PIL.Image"):
        require(module, "serve", "hhdeploy bench --serve --abuse")
    from hhdeploy.loadtest.abuse.kinds import KINDS
    from hhdeploy.loadtest.abuse.run import Campaign, run_abuse

    kinds = list(KINDS) if "all" in options["abuse"] else list(dict.fromkeys(options["abuse"]))
    campaign = Campaign(kinds, options["seconds"], skew=options["skew"], seed=options["seed"])

    def command(start: Start) -> list[str]:
        return server_command(
            subject.bundle,
            **serving,
            device=start.device,
            model_name=start.model,
            adapters_dir=start.fleet,
            watch_seconds=_WATCH_SECONDS,
            grpc_port=0,
        )

    with phased_steps(as_json) as (step, phase):
        report = run_abuse(subject, campaign, command, step, phase)
    if as_json:
        ui.print_json({"precision": subject.precision, **report.to_json()})
    else:
        _show(report, subject.bundle.name)
    return 0 if report.passed else 1


def _show(report: AbuseReport, name: str) -> None:
    console = ui.console()
    rates = ", ".join(f"{rate:.0f} over {wire}" for wire, rate in report.saturation.items())
    console.print(
        ui.table(
            ui.titled(
                f"Beside abuse of {name}, {report.seconds:g} s each; saturation: {rates} a second",
                "in parentheses: what is allowed, from a control whose abuser meets a listener "
                "that closes",
            ),
            ("abuse", "asked", "wrong", "lost", "p99 ms", "health's", "MB"),
            [(kind, *_cells(siege)) for kind, siege in report.sieges.items()],
        )
    )
    for kind, siege in report.sieges.items():
        came = ", ".join(f"{said}: {number}" for said, number in siege.attacks.items())
        console.print(f"{kind}: attacks ended with {came or 'nothing yet'}", markup=False)
        broken = [*siege.answers_broken(), *siege.bounds_broken()]
        for line in [*broken, *siege.control.faults, *siege.abused.faults]:
            console.print(f"{kind}: {line}", style="red", markup=False)
    console.print(
        ui.verdict(
            report.passed,
            "passed: nobody else had a wrong answer, none or a late one",
            f"FAILED; the server's exit code was {report.exit_code}",
        )
    )


def _cells(siege: Siege) -> list[object]:
    seen = siege.abused
    memory = siege.memory
    return [
        seen.requests,
        seen.wrong,
        seen.lost,
        _within(seen.latencies.p99_ms, siege.allowed_ms),
        _within(seen.health.p99_ms, siege.health_allowed_ms),
        "" if memory is None else f"{(memory[1] - memory[0]) / 2**20:+.0f}",
    ]


def _within(found: float | None, allowed: float | None) -> str:
    return " ".join(
        "none" if each is None else form.format(each)
        for each, form in ((found, "{:.1f}"), (allowed, "({:.1f})"))
    )
