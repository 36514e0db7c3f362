"""``hhdeploy serve`` on the GPU under ``hhdeploy bench --serve``, for a minute."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hhdeploy.cli.bench_serve import server_command
from hhdeploy.loadtest.report import Report
from hhdeploy.loadtest.run import Start, Subject, run_load_test
from hhdeploy.loadtest.traffic import Load
from tests.gpu.opening import open_on
from tests.gpu.scale import DRY, SCALE
from tests.gpu.wants import need
from tests.leash import leashed

PACKAGES = (
    "aiohttp", "grpc", "grpc_health", "grpc_reflection", "hpack", "prometheus_client",
    "starlette", "tritonclient", "uvicorn",
)  # fmt: skip
# A fleet of more adapters than the bank has rows for.
ADAPTERS, SLOTS = (5, 4) if DRY else (64, 48)
# From it follows how many requests the time has.
TRIAL = Load(requests=40 if DRY else 2000, clients=4 if DRY else 32, churn=5.0)


@pytest.fixture
def _serve() -> None:
    need(*PACKAGES, extra="serve")


@pytest.mark.parametrize("served", ["float32"] if DRY else ["float32", "float16"])
@pytest.mark.usefixtures("_serve")
def test_under_load(ort_cuda, workbench, served, record):
    """Adapters come, go and are evicted meanwhile; every answer is compared."""
    path = workbench.model(SCALE.model).path
    with open_on(path, ort_cuda, precision=served) as session:
        record(model=SCALE.model, precision=served, device=session.device)
    trial = ask(path, ort_cuda, served, TRIAL)
    assert trial.passed, trial.faults or trial.to_json()
    requests = max(TRIAL.requests, round(SCALE.seconds * trial.requests / trial.seconds))
    report = ask(path, ort_cuda, served, replace(TRIAL, requests=requests))
    latencies = report.latencies["all"]
    record(
        adapters=ADAPTERS,
        rows=SLOTS - 1,
        seconds=report.seconds,
        requests=report.requests,
        faulty=report.faulty,
        images_per_second=report.images / report.seconds,
        p50_ms=latencies.p50_ms,
        p99_ms=latencies.p99_ms,
        changes=sum(found.count for found in report.changes.values()),
        report=report.to_json(),
    )
    assert report.passed, report.faults or report.to_json()


def ask(path: Path, device: str, precision: str, load: Load) -> Report:
    """A load test of a server that ends with this process."""

    def command(start: Start) -> list[str]:
        whole = server_command(
            path,
            device=device,
            precision=precision,
            slots=SLOTS,
            model_name=start.model,
            adapters_dir=start.fleet,
            token_file=start.token_file,
            allow_adapter_loading=True,
        )
        arguments = whole[whole.index("serve") :]
        return leashed([sys.executable, "-m", "tests.gpu.hhdeploy_cli", *arguments])

    subject = Subject(path, ADAPTERS, device, precision)
    return run_load_test(subject, load, command, lambda step: None, lambda *given: None)
