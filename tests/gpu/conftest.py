"""What each test needs, and why it is skipped where that is not there.

What is absent is skipped by name; what is there and broken fails. Nothing is exported or built
before a test knows that it will run.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hhdeploy.choices import BACKENDS
from hhdeploy.doctor.probes import Driver, find_driver
from hhdeploy.packages import import_tensorrt
from hhdeploy.runtime.cuda import Gpu
from tests.gpu.folding import products_in
from tests.gpu.part import PartReport
from tests.gpu.scale import DRY, SCALE
from tests.gpu.wants import lacks, need
from tests.gpu.workbench import PRECISIONS, Workbench
from tests.onnxruntime_double import stand_in

_HERE = Path(__file__).parent
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_REPORT: pytest.StashKey[PartReport] = pytest.StashKey()
# The oldest architecture with bfloat16 products.
_BFLOAT16 = 80
_TENSORRT_MAJORS = (10, 11)


# -- the report: of a run that `python -m tests.gpu` started ------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """ONNX Runtime first: what a borrowed GPU can run, should the time be up before the end."""
    ours = [item for item in items if item.path.is_relative_to(_HERE)]
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        # Versions that nobody has tried yet: what they warn of is shown, and is not a failure.
        item.add_marker(pytest.mark.filterwarnings("default"))
    if len(ours) == len(items):
        items.sort(key=lambda item: item.path.name == "test_engines.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    file = os.environ.get("GPU_PART_REPORT")
    if file and all(item.path.is_relative_to(_HERE) for item in session.items):
        tests = [_test(item.nodeid) for item in session.items]
        session.config.stash[_REPORT] = PartReport(Path(file), tests, dry=DRY)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    report = session.config.stash.get(_REPORT, None)
    if report is not None:
        ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        report.end("finished" if ended else "interrupted")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    report = item.config.stash.get(_REPORT, None)
    if report is not None:
        report.begin(_test(item.nodeid))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    found: Any = yield
    report = item.config.stash.get(_REPORT, None)
    if report is not None:
        report.add(_test(item.nodeid), found)
    return found


def _test(nodeid: str) -> str:
    return nodeid.rpartition("tests/gpu/")[2]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(error=0.1)`` puts figures into the report, at once."""
    report = request.config.stash.get(_REPORT, None)

    def note(**figures: object) -> None:
        if report is not None:
            report.note(_test(request.node.nodeid), figures)

    return note


# -- the machine --------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def one_thread_in_onnx_runtime() -> None:
    """Not here: what is measured has the threads that users have."""


@pytest.fixture(scope="package", autouse=True)
def _dry() -> Iterator[None]:
    """In a dry run ``device="cuda"`` means the CPU, with all else as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if DRY:
            stand_in(patch, "cuda", SCALE.providers["cuda"])
        yield


@pytest.fixture(scope="session")
def driver() -> Driver:
    return find_driver()


@pytest.fixture(scope="session")
def gpu(driver: Driver) -> Gpu:
    """The GPU that sessions use; in a dry run a name for none."""
    if DRY:
        return Gpu("no GPU", "sm0")
    if driver.state == "absent":
        lacks("driver", driver.detail)
    assert driver.state == "ok", driver.detail
    return driver.gpus[0]


@pytest.fixture(scope="session")
def _export() -> None:
    need("torch", "timm", "onnx", "onnx_ir", "onnxscript", extra="export")


@pytest.fixture(scope="session")
def workbench(_export: None) -> Iterator[Workbench]:
    """Shared bundles and engines; kernels that TensorRT-RTX compiles go to its directory too."""
    with ExitStack() as stack:
        given = os.environ.get("GPU_WORKBENCH")
        root = Path(given or stack.enter_context(tempfile.TemporaryDirectory()))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("HHDEPLOY_CACHE", str(root / "cache"))
        yield Workbench(root)


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest, gpu: Gpu) -> str:
    """A graph that the GPU has arithmetic for."""
    found: str = request.param
    if found == "bfloat16" and int(gpu.architecture.removeprefix("sm")) < _BFLOAT16:
        where = "ONNX Runtime's CPU" if DRY else f"{gpu.name} ({gpu.architecture})"
        lacks("chip", f"{where} has no bfloat16 products")
    return found


# -- TensorRT -----------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=BACKENDS)
def builder(request: pytest.FixtureRequest) -> str:
    """A backend that can build here: in a check of the GPU, TensorRT-RTX needs none for that."""
    backend: str = request.param
    need(backend.replace("-", "_"), extra=_EXTRAS[backend])
    if DRY:
        lacks("chip", f"a dry run has no GPU for {backend}")
    if backend != "tensorrt-rtx" or _REPORT not in request.config.stash:
        request.getfixturevalue("gpu")
    return backend


@pytest.fixture(scope="session")
def runner(builder: str, gpu: Gpu) -> str:
    """A backend that can run here."""
    try:
        importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        lacks("package", f"cuda-bindings (pip install 'hhdeploy[{_EXTRAS[builder]}]')")
    if builder == "tensorrt-rtx":
        trt = import_tensorrt(builder)
        if not hasattr(trt.ComputeCapability, gpu.architecture.upper()):
            lacks("chip", f"{builder} {trt.__version__} does not cover {gpu.architecture}")
    return builder


# -- ONNX Runtime and torch -----------------------------------------------------------------------


@pytest.fixture(scope="session", params=tuple(SCALE.providers))
def provider(request: pytest.FixtureRequest, gpu: Gpu) -> str:
    """A device of ONNX Runtime on the GPU."""
    return _provider(request.param)


@pytest.fixture(scope="session")
def ort_cuda(gpu: Gpu) -> str:
    """ONNX Runtime's CUDA provider, which every figure is of."""
    return _provider("cuda")


def _provider(device: str) -> str:
    need("onnxruntime", extra="gpu")
    if not DRY and importlib.util.find_spec("torch") is not None:
        import torch  # noqa: F401  brings CUDA and cuDNN, before the first session looks for them
    import onnxruntime as ort

    if SCALE.providers[device] not in ort.get_available_providers():
        lacks(
            "package",
            f"onnxruntime-gpu: onnxruntime {ort.__version__} has no {SCALE.providers[device]} "
            "(pip uninstall onnxruntime, then pip install 'hhdeploy[gpu]')",
        )
    if device == "ort-tensorrt" and not _libnvinfer():
        lacks("package", "TensorRT's libnvinfer, which onnxruntime-gpu does not bring")
    return device


def _libnvinfer() -> bool:
    """Whether TensorRT's library can be loaded, from its package if that is there."""
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("tensorrt")
        return True
    for major in _TENSORRT_MAJORS:
        with contextlib.suppress(OSError):
            ctypes.CDLL(f"libnvinfer.so.{major}")
            return True
    return False


@pytest.fixture(scope="session")
def torch_device(gpu: Gpu) -> Iterator[str]:
    """Where torch runs; convolutions too are not rounded to TensorFloat-32."""
    need("torch", "timm", extra="export")
    import torch

    if DRY:
        yield "cpu"
        return
    if torch.version.cuda is None:
        lacks("package", f"torch for CUDA: torch {torch.__version__} is built without")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # as versions go
        lacks("driver", f"torch {torch.__version__} cannot use the GPU: {error}")
    with products_in("ieee"):
        yield "cuda"
