"""hhdeploy doctor."""

from __future__ import annotations

from dataclasses import asdict

import click

from hhdeploy.cli import ui

_COLOURS = {"ok": "green", "absent": "yellow", "problem": "red"}


@click.command()
@ui.json_option
def command(as_json: bool) -> None:
    """Tell what this machine can do, what is missing and what clashes; exit 1 on a problem."""
    from hhdeploy.doctor.examining import examine

    findings = examine()
    if as_json:
        ui.print_json([asdict(f) for f in findings])
    else:
        for finding in findings:
            state = click.style(f"{finding.state:8}", fg=_COLOURS[finding.state])
            click.echo(f"{state} {finding.what}: {finding.detail}")
    if any(f.state == "problem" for f in findings):
        raise SystemExit(1)
