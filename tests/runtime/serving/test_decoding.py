"""Whose picture is decoded next."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import os
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hhdeploy.errors import DeviceError
from hhdeploy.preprocess import Preprocess
from hhdeploy.runtime.serving.errors import FailedError, RequestError, TooLargeError
from hhdeploy.runtime.serving.pictures import images
from hhdeploy.runtime.serving.pictures.decoding import VAST, Decoders
from hhdeploy.runtime.serving.pictures.images import Pictures
from hhdeploy.runtime.serving.processes.threads import start_threads
from hhdeploy.runtime.serving.settings import ServeSettings

PATIENCE = 60


class Bench:
    """Decoders whose jobs wait until they are let go, and note when they begin."""

    def __init__(self, count: int, most_pixels: int = 10 * VAST) -> None:
        self.decoders = Decoders(count, most_pixels)
        self.began: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self.threads: dict[str, str] = {}
        self.nice: dict[str, int] = {}

    def picture(self, name: str, pixels: int, turn: int | None = None) -> asyncio.Future[str]:
        gate = self.gates[name] = threading.Event()

        def job() -> str:
            self.began.append(name)
            self.threads[name] = threading.current_thread().name
            self.nice[name] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            assert gate.wait(PATIENCE)
            return name

        if turn is None:
            turn = self.decoders.first_turn + pixels
        return self.decoders.begin(job, pixels, turn)

    async def end(self, name: str, future: asyncio.Future[str]) -> None:
        self.gates[name].set()
        assert await asyncio.wait_for(future, PATIENCE) == name

    async def running(self, *names: str) -> None:
        """Until these have begun; nothing else has."""
        while len(self.began) < len(names):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        assert sorted(self.began) == sorted(names)

    async def overtaken(self, last: str, waiting: dict[str, asyncio.Future[str]], size: int) -> int:
        """How many pictures of an endless stream begin before ``last``, on one thread."""
        while not self.began:
            await asyncio.sleep(0)
        for count in range(2000):
            if last in self.began:
                break
            name, running = f"stream{count}", self.began[-1]
            waiting[name] = self.picture(name, size)
            await self.end(running, waiting.pop(running))
            while self.began[-1] == running:
                await asyncio.sleep(0)
        before = self.began[: self.began.index(last)]
        for gate in self.gates.values():
            gate.set()
        await asyncio.gather(*waiting.values())
        return sum(name.startswith("stream") for name in before)


def played(scene, count: int, **options: int) -> None:
    async def run() -> None:
        bench = Bench(count, **options)
        try:
            await asyncio.wait_for(scene(bench), PATIENCE)
        finally:
            for gate in bench.gates.values():
                gate.set()
            bench.decoders.close()

    asyncio.run(run())


def test_a_request_s_second_picture_waits_for_another_s_first():
    async def scene(bench: Bench) -> None:
        many = [bench.picture(f"many{i}", 100_000, 100_000 * (i + 1)) for i in range(3)]
        one = bench.picture("one", 150_000)
        await bench.running("many0")
        await bench.end("many0", many[0])
        await bench.running("many0", "one")
        await bench.end("one", one)
        await bench.running("many0", "one", "many1")
        await bench.end("many1", many[1])
        await bench.end("many2", many[2])

    played(scene, 1)


def test_small_pictures_never_wait_for_vast_ones():
    async def scene(bench: Bench) -> None:
        vast = [bench.picture(f"vast{i}", VAST) for i in range(3)]
        await bench.running("vast0")
        for i in range(3):
            small = bench.picture(f"small{i}", VAST - 1)
            await bench.running("vast0", *(f"small{j}" for j in range(i + 1)))
            await bench.end(f"small{i}", small)
        for i, each in enumerate(vast):
            await bench.end(f"vast{i}", each)
        assert bench.threads["vast0"] != bench.threads["small0"]
        if sys.platform == "linux":
            assert bench.nice["vast0"] == min(bench.nice["small0"] + 5, 19)

    played(scene, 2)


def test_vast_pictures_never_wait_for_ever():
    async def scene(bench: Bench) -> None:
        first = bench.picture("first", 10)
        vast = bench.picture("vast", VAST)
        small = [bench.picture(f"small{i}", 10) for i in range(3)]
        await bench.running("first", "vast")
        await bench.end("vast", vast)
        await bench.running("first", "vast", "small0")
        await bench.end("first", first)
        for i, each in enumerate(small):
            await bench.end(f"small{i}", each)

    played(scene, 2)


@pytest.mark.parametrize(("small", "counted"), [(VAST // 7, VAST // 7), (10, 1 << 16)])
def test_a_vast_picture_comes_to_its_turn_on_one_thread(small, counted):
    """A small one counts for 2^16 pixels at least."""

    async def scene(bench: Bench) -> None:
        ahead = {"ahead": bench.picture("ahead", small)}
        ahead["vast"] = bench.picture("vast", VAST)
        overtook = await bench.overtaken("vast", ahead, small)
        assert 3 * VAST < overtook * counted < 5 * VAST

    played(scene, 1)


def test_the_last_picture_of_many_comes_to_its_turn():
    async def scene(bench: Bench) -> None:
        size = 1 << 20
        many = {f"many{i}": bench.picture(f"many{i}", size, (i + 1) * size) for i in range(3)}
        assert 4 < await bench.overtaken("many2", many, size) < 12

    played(scene, 1)


def test_vast_pictures_at_the_same_time_have_a_limit_together():
    async def scene(bench: Bench) -> None:
        first = bench.picture("first", 2 * VAST)
        second = bench.picture("second", 2 * VAST)
        await bench.running("first")
        await bench.end("first", first)
        await bench.running("first", "second")
        third = bench.picture("third", VAST)
        await bench.running("first", "second", "third")
        await bench.end("second", second)
        await bench.end("third", third)
        alone = bench.picture("alone", 9 * VAST)  # beyond it, and nobody else's
        await bench.end("alone", alone)

    played(scene, 4, most_pixels=3 * VAST)


def test_one_that_is_given_up_leaves_nothing_and_its_place_to_others():
    class Held:
        pass

    async def scene(bench: Bench) -> None:
        first = bench.picture("first", 10)
        held = Held()
        gone = weakref.ref(held)
        given_up = bench.decoders.begin(lambda h=held: h, 11, 11)
        last = bench.picture("last", 12)
        given_up.cancel()
        del held
        await asyncio.sleep(0)
        gc.disable()
        try:
            assert gone() is None
        finally:
            gc.enable()
        await bench.end("first", first)
        await bench.running("first", "last")
        await bench.end("last", last)

    played(scene, 1)


def test_an_error_is_the_picture_s_own():
    async def scene(bench: Bench) -> None:
        def fails() -> None:
            raise ValueError("planted")

        with pytest.raises(ValueError, match="planted"):
            await bench.decoders.begin(fails, 10, 10)
        after = bench.picture("after", 10)
        await bench.end("after", after)

    played(scene, 1)


def encoded(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(file, "PNG")
    return file.getvalue()


def test_the_pictures_of_a_request_have_a_limit_together():
    way = Preprocess((3, 31, 29), (0.5,) * 3, (0.25,) * 3)
    settings = ServeSettings(Path("tiny"), image_pixels=1000, request_pixels=1500)

    async def run() -> None:
        pictures = Pictures(settings)
        try:
            found = await pictures.pixels([encoded(20, 50), encoded(25, 20)], [0, 1], [way] * 2)
            assert found.shape == (2, 3, 31, 29) and found.dtype == np.float32
            with pytest.raises(TooLargeError, match="up to image 1 have 1506 pixels, at most 1500"):
                await pictures.pixels(
                    [encoded(20, 50), encoded(22, 23), b"never opened"], [0, 1], [way] * 2
                )
        finally:
            pictures.close()

    asyncio.run(run())


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_vast_pictures_are_decoded_in_a_process_and_are_the_same(monkeypatch, form):
    """What libwebp decoded is copied with the interpreter's lock: that of another process."""
    way = Preprocess((3, 31, 29), (0.5,) * 3, (0.25,) * 3)
    pixels = np.random.default_rng(5).integers(0, 256, (41, 37, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    content = file.getvalue()
    settings = ServeSettings(Path("tiny"))
    held = []

    async def run() -> None:
        pictures = Pictures(settings)
        try:
            here = await pictures.pixels([content], [0], [way])
            assert pictures._processes[0]._process is None
            monkeypatch.setattr(images, "VAST", 41 * 37)
            there = await pictures.pixels([content, encoded(3, 2)], [0, 1], [way] * 2)
            held.append(pictures._processes[0]._process)
            np.testing.assert_array_equal(there[0], here[0])
            with pytest.raises(RequestError, match=r"^image 1: ") as caught:
                await pictures.pixels([content, content[: len(content) // 2]], [0, 1], [way] * 2)
            assert "process" not in str(caught.value)
            assert pictures._processes[0]._process is held[0] and held[0].poll() is None
            held[0].kill()
            with pytest.raises(FailedError, match="the process that decodes has ended"):
                await pictures.pixels([content], [0], [way])
            again = await pictures.pixels([content], [0], [way])
            np.testing.assert_array_equal(again, here)
            held.append(pictures._processes[0]._process)
        finally:
            pictures.close()

    asyncio.run(run())
    assert all(process.returncode is not None for process in held)


def no_more_threads(monkeypatch, left: int) -> None:
    """As `ulimit -u`, a container's pids.max, or a memory that is used up."""
    start, begun = threading.Thread.start, itertools.count()

    def refuse(thread: threading.Thread) -> None:
        if next(begun) >= left:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_a_system_without_another_thread_keeps_no_picture_waiting(monkeypatch):
    """A thread that could not be started counted as busy: no picture was answered any more."""

    async def scene(bench: Bench) -> None:
        no_more_threads(monkeypatch, 0)
        asked = {name: bench.picture(name, pixels) for name, pixels in (("a", 1), ("b", VAST))}
        await bench.running(*asked)
        for name, future in asked.items():
            await bench.end(name, future)

    played(scene, 2)


def test_threads_that_the_system_has_not_end_a_start(monkeypatch):
    before = threading.active_count()
    no_more_threads(monkeypatch, 2)
    with pytest.raises(DeviceError, match=r"cannot start 3 of the threads some: .* `decoders` or"):
        start_threads(3, "some")
    assert threading.active_count() == before
