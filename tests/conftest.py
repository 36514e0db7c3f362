"""What every test gets: one thread, and seeded tiny backbones and bundles that are built once."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

# Before jsonschema is imported: see the module there.
sys.path.insert(0, str(Path(__file__).parent / "later"))
# Before torch and numpy are imported: the tests share their cores with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor do they fill the user's cache of traced graphs and compiled models.
if "HHDEPLOY_CACHE" not in os.environ:
    os.environ["HHDEPLOY_CACHE"] = tempfile.mkdtemp(prefix="hhdeploy-tests-")
    atexit.register(shutil.rmtree, os.environ["HHDEPLOY_CACHE"], ignore_errors=True)

from typing import TYPE_CHECKING

import pytest

from tests.alone import pytest_pyfunc_call
from tests.once import made_once, share_directory
from tests.skips import pytest_terminal_summary
from tests.slow import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_ignore_collect,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hhdeploy.backbones.spec import Backbone
    from tests.workshop import Workshop

__all__ = [
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_ignore_collect",
    "pytest_pyfunc_call",
    "pytest_terminal_summary",
]

share_directory()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """The millions of objects that imports make are no garbage: looking through them again and
    again is a third of what collecting costs. Tests' own garbage is collected as ever."""
    gc.disable()
    try:
        return (yield)
    finally:
        _freeze()
        gc.enable()


# So many modules make the next collections slow: torch.onnx with what it imports, NNCF, PEFT.
_MANY_MODULES = 200
_modules_frozen = 0


def _freeze() -> None:
    """What is there now is not looked through for garbage again."""
    global _modules_frozen
    gc.collect()
    gc.freeze()
    _modules_frozen = len(sys.modules)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[object]:
    """What a test was the first to import is no garbage either; every export collects."""
    done = yield
    if len(sys.modules) > _modules_frozen + _MANY_MODULES:
        _freeze()
    return done


@pytest.fixture(scope="session", autouse=True)
def one_thread_in_onnx_runtime() -> Iterator[None]:
    """Its sessions take one thread where nothing else is asked for: the others would spin."""
    try:
        import onnxruntime
    except ImportError:
        yield
        return

    class OneThread(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", OneThread)
        yield


@pytest.fixture(scope="session")
def tiny_facts():
    """`BackboneFacts` of the perturbed tiny ViT."""
    from tests.support import tiny_backbone

    return tiny_backbone().facts


@pytest.fixture
def tiny() -> Backbone:
    """A perturbed tiny ViT of the test's own, free to be changed."""
    from tests.support import tiny_backbone

    return tiny_backbone()


@pytest.fixture(scope="session")
def workshop() -> Workshop:
    """Checkpoint, adapters and cache that the shared bundles are exported from."""
    from tests.workshop import make_workshop, open_workshop

    return open_workshop(made_once("workshop", make_workshop))


def exported(request: pytest.FixtureRequest, bundle: str, names: Sequence[str], **options) -> Path:
    """A shared bundle of the workshop. Where it is there already, no torch is imported."""

    def make(out: Path) -> None:
        request.getfixturevalue("workshop").export(out, names, **options)

    return made_once(bundle, make)


@pytest.fixture(scope="session")
def branches(request) -> Path:
    """Five adapters of all kinds, one without a head, beside a backbone with its classifier.

    Read only: `tests.workshop.copy_bundle` gives a copy to change.
    """
    return exported(request, "branches", ("alpha", "rival", "beta", "gamma", "headless"))


@pytest.fixture(scope="session")
def starter() -> Path:
    """The bundle of the starter models, by the commands of their README.md. Read only."""
    from tests.starter import export_as_the_page_does

    return made_once("starter", export_as_the_page_does)


@pytest.fixture(scope="session")
def small(request) -> Path:
    """Alpha and gamma, without the backbone's classifier. Read only."""
    return exported(request, "small", ("alpha", "gamma"))


@pytest.fixture(scope="session")
def heads(request) -> Path:
    """Alpha's classes, independent labels, one value, and a head alone. Read only."""
    from tests.workshop import AGE, PROBE, TAGS

    return exported(request, "heads", ("alpha", TAGS, AGE, PROBE))


@pytest.fixture(scope="session")
def folded(request) -> Path:
    """Alpha in the weights. Read only."""
    return exported(request, "folded", ("alpha",), fold=True)


@pytest.fixture(scope="session")
def constant(request) -> Path:
    """Alpha and gamma, the bank baked into the graph. Read only."""
    return exported(request, "constant", ("alpha", "gamma"), bank_as_constant=True)


@pytest.fixture(scope="session")
def scaled_workshop(workshop) -> Workshop:
    """Adapters with s_in, s_out, db and values of parameters."""
    from tests.workshop import make_scaled_adapters, other_workshop

    adapters = make_scaled_adapters(workshop)
    root = made_once("scaled-workshop", lambda root: other_workshop(root, workshop, adapters))
    return replace(workshop, root=root, adapters=adapters)


@pytest.fixture(scope="session")
def scaled(scaled_workshop) -> Path:
    """All of them that can stand beside one backbone. Read only."""
    names = ("scaled", "ia3", "after", "plain")
    return made_once("scaled", lambda out: scaled_workshop.export(out, names))
