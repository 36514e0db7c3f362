"""What each part needs, and why it is skipped where that is not there.

What is absent is skipped with its reason; what is there and broken fails. Nothing is exported
or built before a test knows that it will run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hhdeploy.probes import Driver, find_driver
from hhdeploy.runtime.cuda import Gpu
from hhdeploy.trt import BACKENDS, import_tensorrt
from tests.gpu.report import REPORT, Report
from tests.gpu.workbench import Workbench

_HERE = Path(__file__).parent
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


# -- the report ---------------------------------------------------------------------------------


def pytest_collection_finish(session: pytest.Session) -> None:
    """A run of these tests alone is a check of the GPU, which leaves a report."""
    if all(item.path.is_relative_to(_HERE) for item in session.items):
        session.config.stash[REPORT] = Report()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    found: Any = yield
    report = item.config.stash.get(REPORT, None)
    if report is not None:
        report.add(found)
    return found


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    report = config.stash.get(REPORT, None)
    if report is not None and report.parts:
        terminalreporter.section("GPU report")
        terminalreporter.write_line(report.write(config.rootpath))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(error=0.1)`` puts figures into the report."""
    return lambda **figures: request.node.user_properties.extend(figures.items())


# -- the machine --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def driver() -> Driver:
    return find_driver()


@pytest.fixture(scope="session")
def gpu(driver: Driver) -> Gpu:
    """The GPU that sessions use."""
    if driver.state == "absent":
        pytest.skip(driver.detail)
    assert driver.state == "ok", driver.detail
    return driver.gpus[0]


@pytest.fixture(scope="session")
def workbench(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Workbench]:
    """Shared bundles and engines; kernels that TensorRT-RTX compiles go to its directory too."""
    root = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HHDEPLOY_CACHE", str(root / "cache"))
        yield Workbench(root)


# -- TensorRT -----------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=BACKENDS)
def builder(request: pytest.FixtureRequest, driver: Driver) -> str:
    """A backend that can build here: TensorRT-RTX needs no GPU for that."""
    backend: str = request.param
    without = backend == "tensorrt-rtx" and REPORT in request.config.stash
    if not without:
        request.getfixturevalue("gpu")
    if importlib.util.find_spec(backend.replace("-", "_")) is None:
        pytest.skip(f"{backend} is not installed: pip install 'hhdeploy[{_EXTRAS[backend]}]'")
    return backend


@pytest.fixture(scope="session")
def runner(builder: str, gpu: Gpu) -> str:
    """A backend that can run here."""
    try:
        importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"cuda-bindings is not installed: pip install 'hhdeploy[{_EXTRAS[builder]}]'")
    if builder == "tensorrt-rtx":
        trt = import_tensorrt(builder)
        if not hasattr(trt.ComputeCapability, gpu.architecture.upper()):
            pytest.skip(f"{builder} {trt.__version__} does not cover {gpu.architecture}")
    return builder


# -- others -------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=sorted(_PROVIDERS))
def provider(request: pytest.FixtureRequest, gpu: Gpu) -> str:
    """A device of ONNX Runtime on the GPU."""
    return _provider(request.param)


@pytest.fixture(scope="session")
def ort_cuda(gpu: Gpu) -> str:
    """ONNX Runtime's CUDA provider, to compare with."""
    return _provider("cuda")


def _provider(device: str) -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed: pip install 'hhdeploy[gpu]'")
    import onnxruntime as ort

    if _PROVIDERS[device] not in ort.get_available_providers():
        pytest.skip(
            f"onnxruntime {ort.__version__} has no {_PROVIDERS[device]}: pip uninstall "
            "onnxruntime, then pip install 'hhdeploy[gpu]'"
        )
    return device


@pytest.fixture(scope="session")
def torch_cuda(gpu: Gpu) -> Any:
    """torch with a usable GPU; convolutions too are not rounded to TensorFloat-32."""
    import torch

    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is built without CUDA")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # as versions go
        pytest.skip(f"torch {torch.__version__} cannot use the GPU: {error}")
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    yield torch
    convolutions.fp32_precision = before
