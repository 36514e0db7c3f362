"""What takes long: files that `make test-fast` leaves out, families that `make test` leaves out.

The files start processes, train, trace many models, or build engines. One list, so that it can be
read and kept; a single test is marked `slow` where it stands. Tests marked `families` climb the
parity ladder on more architectures and on models of real size; `--families` (`make families`) runs
them too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = frozenset(
    TESTS / name
    for name in (
        "calibration/test_cache.py",
        "calibration/test_int8.py",
        "calibration/test_other_sources.py",
        "calibration/test_qdq.py",
        "calibration/test_ranges.py",
        "calibration/test_report.py",
        "calibration/test_sites.py",
        "calibration/test_tensorrt.py",
        "cli/test_bench_abuse.py",
        "cli/test_bench_serve.py",
        "cli/test_calibrate.py",
        "cli/test_commands.py",
        "cli/test_commands_page.py",
        "cli/test_machine_commands.py",
        "examples/test_cpp.py",
        "cli/test_start_page.py",
        "docs/test_site.py",
        "examples/test_models_page.py",
        "examples/test_starter.py",
        "exporters/test_bake.py",
        "exporters/test_branches.py",
        "exporters/test_fold.py",
        "exporters/test_precision.py",
        "exporters/test_streaming.py",
        "exporters/test_trace.py",
        "exporters/test_triton.py",
        "hhdeploy/adapters/test_peft_methods.py",
        "hhdeploy/bundle/test_crashes.py",
        "hhdeploy/bundle/test_full_disks.py",
        "hhdeploy/bundle/test_rebase.py",
        "hhdeploy/exporting/test_bundles.py",
        "hhdeploy/exporting/test_outputs.py",
        "hhdeploy/exporting/test_parts.py",
        "hhdeploy/exporting/test_sources.py",
        "hhdeploy/exporting/test_strength.py",
        "hhdeploy/exporting/test_survival.py",
        "hhdeploy/test_quantising.py",
        "hhdeploy/test_building.py",
        "hhdeploy/test_training_recipe.py",
        "hhdeploy/verifying/test_overflow.py",
        "js/test_package.py",
        "js/test_pictures.py",
        "js/test_refusals.py",
        "js/test_web.py",
        "parity/test_islands.py",
        "parity/test_ladder.py",
        "parity/test_methods.py",
        "parity/test_parts.py",
        "parity/test_runtimes.py",
        "parity/test_witnesses.py",
        "runtime/serving/test_access.py",
        "runtime/serving/test_collectors.py",
        "runtime/serving/test_examples.py",
        "runtime/serving/test_fleet.py",
        "runtime/serving/test_fuzz.py",
        "runtime/serving/test_grpc.py",
        "runtime/serving/test_grpc_fuzz.py",
        "runtime/serving/test_grpc_server.py",
        "runtime/serving/test_http.py",
        "runtime/serving/test_http_codec.py",
        "runtime/serving/test_leftovers.py",
        "runtime/serving/test_page_browser.py",
        "runtime/serving/test_parsing.py",
        "runtime/serving/test_ray.py",
        "runtime/serving/test_ray_parts.py",
        "runtime/serving/test_safety.py",
        "runtime/serving/test_server.py",
        "runtime/serving/test_serving_page.py",
        "runtime/test_openvino.py",
        "runtime/test_openvino_cache.py",
        "runtime/test_tensorrt.py",
        "soak/test_soak.py",
        "test_alone.py",
        "test_gpu_check.py",
        "test_gpu_report.py",
        "test_imports.py",
    )
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that brings the rest of the ladder."""
    parser.addoption(
        "--families", action="store_true", help="every architecture of the parity ladder"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of nothing but slow tests are not even imported where none is asked for."""
    unasked = config.getoption("markexpr") == "not slow" and collection_path in FILES
    return True if unasked else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test of these files; leave out what was not asked for."""
    for item in items:
        if item.path in FILES:
            item.add_marker(pytest.mark.slow)
    # The long files first: of two processes neither waits for the other's last one.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not config.getoption("--families"):
        left = [item for item in items if item.get_closest_marker("families")]
        items[:] = [item for item in items if not item.get_closest_marker("families")]
        config.hook.pytest_deselected(items=left)
