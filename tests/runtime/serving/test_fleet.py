"""Adapters in rows and on disk: loading, eviction, replacement, removal, the fleet directory."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from hhdeploy.adapters.format import save_adapter
from hhdeploy.bundle import add_adapter, remove_adapter
from hhdeploy.errors import AdapterError, DeviceError, HhdeployError, PlanError, SessionError
from hhdeploy.runtime import open_session
from hhdeploy.runtime.serving.errors import (
    FailedError,
    ForbiddenError,
    LoadFailedError,
    NotFoundError,
    RequestError,
)
from hhdeploy.runtime.serving.fleet import fleet
from hhdeploy.runtime.serving.fleet.fleet import Fleet
from tests.runtime.serving.fleets import (
    PATIENCE,
    check_at_rest,
    files_of,
    make_adapter,
    put_adapter,
    settle,
    until,
)
from tests.support import random_adapter
from tests.workshop import contents, copy_bundle, flip_byte


class Scene:
    """A fleet over `small` (alpha and gamma), its directory, and a reader that can be held up."""

    def __init__(self, session, directory, workshop, pinned=()):
        self.bundle, self.bank = session.bundle, session.adapters
        self.directory = directory
        self.workshop = workshop
        self.fleet = Fleet(self.bundle, self.bank, directory, frozenset(pinned))
        self.reads = []
        self._open = threading.Event()
        self._open.set()
        self._read = self.fleet._files.read
        self.fleet._files.read = self.read

    def read(self, source):
        self.reads.append(source.name)
        assert self._open.wait(PATIENCE)
        return self._read(source)

    @contextmanager
    def reader_held_up(self):
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    @contextmanager
    def writer_held_up(self):
        """An upload is about to be written until the end of the block; gives an event of that."""
        write, begun, go = self.fleet._files.write, threading.Event(), threading.Event()

        def slow(*arguments):
            begun.set()
            assert go.wait(PATIENCE)
            return write(*arguments)

        self.fleet._files.write = slow
        try:
            yield begun
        finally:
            go.set()

    def put(self, name, seed=0):
        return put_adapter(make_adapter(self.workshop, seed), self.directory, name)

    def row(self, seed):
        """What the row of such an adapter holds."""
        return self.bank.pack("any", make_adapter(self.workshop, seed)).row

    async def ask(self, *names):
        return await self.fleet.rows.hold(dict.fromkeys(names))

    async def asked(self, *names):
        """Hold and release: a request that is answered at once."""
        held = await self.ask(*names)
        values = {name: self.bank.rows[hold.row].copy() for name, hold in held.items()}
        self.release(held)
        return values

    def release(self, held):
        for hold in held.values():
            self.fleet.rows.release(hold)

    def state(self, name):
        return self.fleet.status(name).state

    async def looks(self, times):
        for _ in range(times):
            await self.fleet.refresh()

    def away(self, name):
        """Take a folder out of the directory, as the first half of a replacement does."""
        return (self.directory / name).rename(self.directory.parent / f"{name} is away")


@pytest.fixture
def play(small, workshop, tmp_path):
    """Run a scene with a fleet of its own; nothing may be held or leak at its end."""

    def run(scene, *, slots=4, names=("a", "b", "c"), pinned=(), bundle=small, directory=True):
        fleet = tmp_path / "fleet"
        fleet.mkdir(exist_ok=True)
        for seed, name in enumerate(names):
            put_adapter(make_adapter(workshop, seed), fleet, name)

        async def body():
            with open_session(bundle, device="cpu", threads=1, slots=slots, partial=True) as opened:
                made = Scene(opened, fleet if directory else None, workshop, pinned)
                try:
                    await made.fleet.start()
                    made.reads.clear()
                    await asyncio.wait_for(scene(made), PATIENCE)
                    await made.fleet.close()  # loads that nobody waits for any more
                    check_at_rest(made.bank)
                    # Nothing is kept of adapters that come and go.
                    assert set(made.fleet.rows._used) == set(made.bank)
                    assert set(made.fleet.rows._notes) <= set(made.bank)
                    assert not made.fleet.rows._waiting
                    assert not made.fleet._fetching
                finally:
                    await made.fleet.close()

        asyncio.run(body())

    return run


# --- loading on demand --------------------------------------------------------------------------


def test_an_adapter_on_disk_is_loaded_when_it_is_asked_for(play):
    async def scene(s):
        assert [x.name for x in s.fleet.statuses()] == ["a", "alpha", "b", "c", "gamma"]
        assert (s.state("a"), s.state("alpha")) == ("on disk", "ready")
        assert s.fleet.status("a").entry is None
        held = await s.ask("a")
        assert held["a"].entry.name == "a"
        assert np.array_equal(s.bank.rows[held["a"].row], s.row(0))
        assert s.state("a") == "ready"
        s.release(held)
        assert (s.fleet.rows.used, s.fleet.rows.total) == (3, 3)
        await s.asked("a", "alpha", "gamma")
        assert s.reads == ["a"]

    play(scene)


def test_a_fleet_stays_in_its_directory(small, workshop, tmp_path, monkeypatch):
    """Of a relative path, too, when the process goes to where another one has its name."""
    for directory, name in ((tmp_path / "fleet", "a"), (tmp_path / "elsewhere" / "fleet", "b")):
        directory.mkdir(parents=True)
        put_adapter(make_adapter(workshop, 0), directory, name)
    monkeypatch.chdir(tmp_path)
    with open_session(small, device="cpu", threads=1) as opened:
        files = Fleet(opened.bundle, opened.adapters, Path("fleet"))._files
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert "a" in files.sources() and "b" not in files.sources()


def test_an_adapter_that_there_is_not(play):
    async def scene(s):
        with pytest.raises(
            NotFoundError, match=r"unknown adapter 'omega'\. There are: a, alpha, b"
        ):
            await s.ask("omega")
        with pytest.raises(NotFoundError, match="omega"):
            await s.ask("a", "omega")

    play(scene)


def test_many_that_wait_for_one_adapter_cost_one_load(play):
    async def scene(s):
        with s.reader_held_up():
            tasks = [asyncio.create_task(s.ask("a")) for _ in range(20)]
            await settle()
        held = await asyncio.gather(*tasks)
        assert s.reads == ["a"]
        assert len({h["a"].row for h in held}) == 1
        for each in held:
            s.release(each)

    play(scene)


def test_loading_one_does_not_stop_the_others(play):
    async def scene(s):
        with s.reader_held_up():
            waiting = asyncio.create_task(s.ask("a"))
            await until(lambda: s.reads == ["a"])
            for _ in range(5):
                await s.asked("alpha", "gamma")
            assert not waiting.done()
        s.release(await waiting)

    play(scene)


def test_one_that_leaves_takes_nothing_from_those_who_wait_as_well(play):
    async def scene(s):
        with s.reader_held_up():
            left, stays = (asyncio.create_task(s.ask("a")) for _ in range(2))
            await settle()
            left.cancel()
            await asyncio.wait([left])
        held = await stays
        assert np.array_equal(s.bank.rows[held["a"].row], s.row(0))
        s.release(held)

    play(scene)


def test_one_that_leaves_at_the_moment_its_row_is_handed_over_gives_it_back(play):
    async def scene(s):
        left = asyncio.create_task(s.ask("a"))
        # Called when the row was handed over and the request has not woken up yet.
        s.fleet.counters.loaded = lambda seconds: left.cancel()
        await asyncio.wait([left])
        assert left.cancelled()
        assert "a" in s.bank

    play(scene)


def test_a_request_that_fails_half_way_holds_nothing(play):
    """The bundle has no classifier of the bare backbone."""

    async def scene(s):
        for names in (("alpha", None), ("alpha", "a", None)):
            with pytest.raises(RequestError, match="no classifier of the bare backbone"):
                await s.ask(*names)

    play(scene)


# --- more adapters than rows --------------------------------------------------------------------


def test_the_least_recently_used_gives_its_row_up(play):
    async def scene(s):
        await s.asked("gamma")
        await s.asked("alpha")
        await s.asked("a")
        assert set(s.bank) == {"alpha", "a"}
        await s.asked("alpha")
        await s.asked("b")
        assert set(s.bank) == {"alpha", "b"}
        assert s.state("a") == "on disk"
        assert s.fleet.rows.evictions == 2
        await s.asked("gamma")
        assert set(s.bank) == {"b", "gamma"}

    play(scene, slots=3)


def test_many_adapters_in_turn_through_few_rows(play):
    async def scene(s):
        for turn in range(30):
            name = "abc"[turn % 3]
            values = await s.asked(name)
            assert np.array_equal(values[name], s.row("abc".index(name)))
        assert (s.fleet.rows.used, s.fleet.rows.total) == (2, 2)

    play(scene, slots=3)


def test_pinned_adapters_keep_their_rows(play):
    async def scene(s):
        row = s.bank["gamma"].row
        for name in "abcabc":
            await s.asked(name)
            assert s.bank["gamma"].row == row
        assert s.fleet.status("gamma").pinned
        assert s.fleet.status("a").pinned is False
        with pytest.raises(RequestError, match=r"2 adapters at a time, .* room for 1"):
            await s.ask("a", "b")
        await s.asked("a", "gamma")

    play(scene, slots=3, pinned=("gamma",))


def test_pinned_adapters_are_loaded_at_the_start(play):
    async def scene(s):
        assert set(s.bank) == {"a", "b"}
        with pytest.raises(RequestError, match=r"room for 0 that are not pinned.*more `slots`"):
            await s.ask("c")
        for change in (s.fleet.load("c"), s.fleet.upload("d", b"{}", b"")):
            with pytest.raises(RequestError, match="room for 0"):
                await change
        assert not (s.directory / "d").exists()
        await s.asked("a", "b")

    play(scene, slots=3, pinned=("a", "b"))


@pytest.mark.parametrize(
    ("pinned", "message"),
    [(("omega",), "`pinned`: unknown adapter 'omega'"), (("a", "b", "c"), "`slots=4` or more")],
)
def test_pins_that_cannot_be(play, pinned, message):
    with pytest.raises(PlanError, match=message):
        play(None, slots=3, pinned=pinned)


def test_an_evicted_adapter_s_requests_are_answered_before_its_row_changes(play):
    async def scene(s):
        held = await s.ask("alpha", "gamma")
        before = s.bank.rows.copy()
        waiting = asyncio.create_task(s.ask("a"))
        await until(lambda: s.reads == ["a"])
        await until(lambda: len(s.bank) == 1)  # evicted: nobody new gets it
        await settle()
        assert not waiting.done()
        assert np.array_equal(s.bank.rows, before)
        s.release(held)
        s.release(await waiting)

    play(scene, slots=3)


def test_an_idle_adapter_is_evicted_rather_than_one_in_use(play):
    """Though it was used later."""

    async def scene(s):
        held = await s.ask("alpha")
        await s.asked("gamma")
        await s.asked("a")
        assert set(s.bank) == {"alpha", "a"}
        s.release(held)

    play(scene, slots=3)


def test_nobody_waits_for_a_row_that_drains_while_another_is_idle(play):
    async def scene(s):
        held = await s.ask("alpha")
        await s.fleet.unload("alpha")
        await s.asked("a")  # takes gamma's
        assert set(s.bank) == {"a"}
        s.release(held)

    play(scene, slots=3)


def test_more_adapters_in_a_request_than_rows(play):
    async def scene(s):
        with pytest.raises(RequestError, match="3 adapters at a time, the bank has room for 2"):
            await s.ask("a", "b", "c")
        values = await s.asked("a", "b")
        assert np.array_equal(values["a"], s.row(0))
        assert np.array_equal(values["b"], s.row(1))

    play(scene, slots=3)


@pytest.mark.parametrize(
    "pairs",
    [
        [("a", "b"), ("b", "c"), ("c", "a"), ("alpha", "gamma"), ("gamma", "a")] * 4,
        [("a", "b"), ("c", "alpha"), ("gamma", "a")],
    ],
)
def test_requests_that_need_all_rows_do_not_wait_for_each_other_for_ever(play, pairs):
    async def scene(s):
        found = await asyncio.gather(*(s.asked(*pair) for pair in pairs), s.asked("c"))
        for values in found:
            for name, row in values.items():
                if name in "abc":
                    assert np.array_equal(row, s.row("abc".index(name)))

    play(scene, slots=3)


def test_a_request_that_gathers_rows_does_not_hold_up_a_replacement_of_one(play):
    """Nor itself: the old row must drain, and it would be the one to hold it."""

    async def scene(s):
        await s.asked("a")
        s.reads.clear()
        s.put("a", seed=7)
        with s.reader_held_up():
            change = asyncio.create_task(s.fleet.load("a"))
            await until(lambda: s.reads == ["a"])
            both = asyncio.create_task(s.asked("a", "b"))
            await settle()
        await change
        values = await both
        assert np.array_equal(values["a"], s.row(7))
        assert np.array_equal(values["b"], s.row(1))

    play(scene, slots=3)


def test_a_single_row_serves_all(play):
    async def scene(s):
        found = await asyncio.gather(*(s.asked(name) for name in "abcabcabc"))
        for values, name in zip(found, "abcabcabc", strict=True):
            assert np.array_equal(values[name], s.row("abc".index(name)))

    play(scene, slots=2)


# --- replace, remove ----------------------------------------------------------------------------


def test_a_replaced_adapter_answers_who_holds_it_and_the_new_one_all_later(play):
    async def scene(s):
        old = await s.ask("a")
        s.put("a", seed=7)
        await s.fleet.load("a")
        new = await s.ask("a")
        assert np.array_equal(s.bank.rows[old["a"].row], s.row(0))
        assert np.array_equal(s.bank.rows[new["a"].row], s.row(7))
        s.release(old)
        assert np.array_equal(s.bank.rows[new["a"].row], s.row(7))
        s.release(new)

    play(scene)


def test_a_replacement_where_all_other_rows_are_pinned(play):
    async def scene(s):
        old = await s.ask("a")
        s.put("a", seed=7)
        change = asyncio.create_task(s.fleet.load("a"))
        await until(lambda: "a" not in s.bank)
        later = asyncio.create_task(s.asked("a"))
        await settle()
        assert np.array_equal(s.bank.rows[old["a"].row], s.row(0))
        s.release(old)
        await change
        assert np.array_equal((await later)["a"], s.row(7))

    play(scene, slots=3, pinned=("gamma",))


def test_a_broken_replacement_keeps_the_old_one_answering(play):
    async def scene(s):
        await s.asked("a")
        (s.directory / "a" / TENSOR_FILE).write_bytes(b"no tensors")
        with pytest.raises(HhdeployError, match="cannot be read as safetensors"):
            await s.fleet.load("a")
        assert s.state("a") == "ready"
        assert "safetensors" in s.fleet.status("a").problem
        assert np.array_equal((await s.asked("a"))["a"], s.row(0))
        # Its row is the last to be given up: it could not come back.
        await s.asked("alpha", "gamma")
        await s.asked("b")
        assert "a" in s.bank
        await s.asked("alpha", "b", "gamma")
        assert s.state("a") == "broken"
        with pytest.raises(RequestError, match=r"'a' cannot be loaded: .*safetensors"):
            await s.ask("a")

    play(scene)


def test_an_unloaded_adapter_drains_and_answers_no_more(play):
    async def scene(s):
        held = await s.ask("alpha")
        row, values = held["alpha"].row, s.bank.rows[held["alpha"].row].copy()
        await s.fleet.unload("alpha")
        assert s.state("alpha") == "unloaded"
        assert not s.fleet.status("alpha").answers
        with pytest.raises(NotFoundError, match=r"'alpha' was unloaded\. Load it again first"):
            await s.ask("alpha")
        await s.fleet.refresh()
        assert s.state("alpha") == "unloaded"
        assert np.array_equal(s.bank.rows[row], values)
        s.release(held)
        assert not s.bank.rows[row].any()
        entry = await s.fleet.load("alpha")
        assert (entry.name, s.state("alpha")) == ("alpha", "ready")
        assert np.array_equal((await s.asked("alpha"))["alpha"], values)
        with pytest.raises(NotFoundError, match="omega"):
            await s.fleet.unload("omega")

    play(scene)


def test_an_unloaded_adapter_stays_so_when_its_files_change(play):
    async def scene(s):
        await s.fleet.unload("a")
        s.put("a", seed=7)
        await s.fleet.refresh()
        assert s.state("a") == "unloaded"
        with pytest.raises(NotFoundError, match="unloaded"):
            await s.ask("a")
        await s.fleet.load("a")
        assert np.array_equal((await s.asked("a"))["a"], s.row(7))

    play(scene)


def test_an_adapter_unloaded_while_it_is_loaded_is_not_put_into_a_row(play):
    async def scene(s):
        with s.reader_held_up():
            waiting = asyncio.create_task(s.ask("a"))
            await until(lambda: s.reads == ["a"])
            await s.fleet.unload("a")
            change = asyncio.create_task(s.fleet.load("b"))
            await settle()
            shutil.rmtree(s.directory / "b")
        for task in (waiting, change):
            with pytest.raises(HhdeployError):
                await task
        assert set(s.bank) == {"alpha", "gamma"}

    play(scene)


def test_an_adapter_unloaded_while_it_waits_for_a_row_gets_none(play):
    async def scene(s):
        held = await s.ask("alpha", "gamma")
        waiting = asyncio.create_task(s.ask("a"))
        await until(lambda: len(s.bank) == 1)  # one was evicted, and drains
        await s.fleet.unload("a")
        s.release(held)
        with pytest.raises(NotFoundError, match="unloaded or removed meanwhile"):
            await waiting
        assert "a" not in s.bank

    play(scene, slots=3)


def test_an_adapter_unloaded_before_its_load_has_begun(play):
    async def scene(s):
        waiting = asyncio.create_task(s.ask("a"))
        await asyncio.sleep(0)  # it waits; the load is scheduled
        await s.fleet.unload("a")
        with pytest.raises(NotFoundError):
            await waiting

    play(scene)


def test_what_is_read_first_is_put_first(play):
    async def scene(s):
        with s.reader_held_up():
            waiting = asyncio.create_task(s.asked("a"))
            await until(lambda: s.reads == ["a"])
            config, tensors = files_of(make_adapter(s.workshop, 7), s.directory.parent)
            change = asyncio.create_task(s.fleet.upload("a", config, tensors))
            await settle()
        await asyncio.gather(waiting, change)
        assert np.array_equal((await s.asked("a"))["a"], s.row(7))

    play(scene)


def test_a_bank_in_the_graph_is_left_alone(play, constant):
    async def scene(s):
        await s.asked("alpha")
        with pytest.raises(SessionError, match="baked"):
            await s.fleet.unload("alpha")
        assert s.state("alpha") == "ready"
        assert s.state("a") == "broken"
        assert "baked" in s.fleet.status("a").problem

    play(scene, bundle=constant, slots=None)


# --- the directory ------------------------------------------------------------------------------


def test_new_changed_and_removed_adapters_are_found(play):
    async def scene(s):
        await s.asked("a")
        await s.fleet.refresh()
        assert s.reads == ["a"]  # nothing changed, nothing is read
        s.put("d", seed=9)
        s.put("a", seed=7)
        shutil.rmtree(s.directory / "b")
        await s.looks(2)
        assert sorted(s.reads[1:]) == ["a", "d"]
        assert set(s.fleet.names) == {"a", "alpha", "c", "d", "gamma"}
        assert np.array_equal((await s.asked("a"))["a"], s.row(7))
        assert s.state("d") == "on disk"
        held = await s.ask("a")
        shutil.rmtree(s.directory / "a")
        await s.looks(2)
        with pytest.raises(NotFoundError):
            await s.ask("a")
        assert np.array_equal(s.bank.rows[held["a"].row], s.row(7))  # it drains
        s.release(held)

    play(scene)


@pytest.mark.parametrize("unpacked", ["written over", "moved there"])
def test_a_change_that_sets_the_old_times_is_found(play, tmp_path, unpacked):
    """As archives whose times are fixed do, and copies that keep times."""

    async def scene(s):
        await s.asked("a")
        config, tensors = files_of(make_adapter(s.workshop, 7), tmp_path)
        for name, content in ((CONFIG_FILE, config), (TENSOR_FILE, tensors)):
            file = s.directory / "a" / name
            before = file.stat()
            new = file if unpacked == "written over" else tmp_path / name
            new.write_bytes(content)
            os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
            if new != file:
                new.replace(file)
            assert (file.stat().st_size, file.stat().st_mtime_ns) == (
                before.st_size,
                before.st_mtime_ns,
            )
        await s.looks(2)
        assert np.array_equal((await s.asked("a"))["a"], s.row(7))

    play(scene)


def test_a_broken_adapter_is_reported_and_skipped(play, workshop, caplog):
    async def scene(s):
        (s.directory / "half").mkdir()
        (s.directory / "half" / CONFIG_FILE).write_text("{")
        shutil.copytree(s.directory / "a", s.directory / "cut")
        data = (s.directory / "a" / TENSOR_FILE).read_bytes()
        (s.directory / "cut" / TENSOR_FILE).write_bytes(data[: len(data) // 2])
        deep = s.directory / "deep"
        deep.mkdir()
        (deep / CONFIG_FILE).write_text("[" * 100_000)
        (deep / TENSOR_FILE).write_bytes(data)
        wide = random_adapter(workshop.backbone.facts, targets=("fc1",), classes=3, seed=1)
        put_adapter(wide, s.directory, "wide")
        s.put("zeta", seed=9)
        await s.looks(2)
        for name in ("half", "cut", "deep", "wide"):
            assert s.state(name) == "broken"
            assert s.fleet.status(name).problem
            assert name in [getattr(r, "adapter", None) for r in caplog.records]
        assert s.fleet.counters.failures == 4
        await s.asked("zeta")
        with pytest.raises(RequestError, match="'cut' cannot be loaded"):
            await s.ask("cut")
        # Once the copy is complete it answers.
        (s.directory / "cut" / TENSOR_FILE).write_bytes(data)
        await s.fleet.refresh()
        assert np.array_equal((await s.asked("cut"))["cut"], s.row(0))
        assert s.fleet.status("cut").problem == ""

    play(scene)


@pytest.mark.parametrize("often", [1, 1000])
def test_an_adapter_that_changes_while_it_is_read_is_read_again(play, often, monkeypatch):
    """It may be half of the old and half of the new one; one that never rests is not taken."""

    async def scene(s):
        pack, changes = s.bank.pack, []

        def slow(name, path, **options):
            packed = pack(name, path, **options)
            if len(changes) < often:
                changes.append(s.put("a", seed=7 + len(changes)))
            return packed

        await s.asked("a")
        s.bank.pack = slow
        if often == 1:
            await s.fleet.load("a")
            assert np.array_equal((await s.asked("a"))["a"], s.row(7))
        else:
            monkeypatch.setattr(fleet, "_GAP_SECONDS", 0.0)
            with pytest.raises(HhdeployError, match="was changed while it was read, 3 times"):
                await s.fleet.load("a")
            await s.looks(2)  # other files at each: it may be whole at the next
            assert s.state("a") == "ready"
            assert np.array_equal((await s.asked("a"))["a"], s.row(0))
            often_enough = len(changes)
            del s.bank.pack
            await s.fleet.refresh()
            assert np.array_equal((await s.asked("a"))["a"], s.row(6 + often_enough))
            return
        del s.bank.pack

    play(scene)


def test_links_that_lead_out_of_the_directory_are_not_followed(play, tmp_path):
    async def scene(s):
        outside = put_adapter(make_adapter(s.workshop, 3), tmp_path, "outside")
        (s.directory / "away").symlink_to(outside)
        shutil.copytree(outside, s.directory / "partly")
        (s.directory / "partly" / TENSOR_FILE).unlink()
        (s.directory / "partly" / TENSOR_FILE).symlink_to(outside / TENSOR_FILE)
        (s.directory / "loop").symlink_to(s.directory / "loop")
        (s.directory / "within").symlink_to(s.directory / "a")
        await s.fleet.refresh()
        for name in ("away", "partly"):
            assert s.state(name) == "broken"
            assert "leads out" in s.fleet.status(name).problem
            with pytest.raises(HhdeployError, match="leads out"):
                await s.fleet.load(name)
        assert "loop" not in s.fleet.names
        assert np.array_equal((await s.asked("within"))["within"], s.row(0))

    play(scene)


def test_names_that_are_none(play, tmp_path):
    async def scene(s):
        for name in (".hidden", "lost+found", "new\nline", "backbone"):
            shutil.copytree(s.directory / "a", s.directory / name)
        (s.directory / "a file").write_text("")
        for left in ("__MACOSX", "#recycle"):  # and no adapter of that name
            (s.directory / left).mkdir()
        await s.looks(3)
        assert set(s.fleet.names) == {
            "a", "alpha", "b", "backbone", "c", "gamma", "lost+found", "'new\\nline'",
        }  # fmt: skip
        for name in ("lost+found", "'new\\nline'", "backbone"):
            assert s.state(name) == "broken"
        before = contents(tmp_path)
        config, tensors = (s.directory / "a" / f for f in (CONFIG_FILE, TENSOR_FILE))
        for name in (
            "../b",
            "..",
            ".",
            "",
            "/etc",
            "a/../../b",
            "backbone",
            ".a",
            "a\0",
            "x" * 129,
        ):
            with pytest.raises(NotFoundError):
                await s.fleet.load(name)
            with pytest.raises(PlanError):
                await s.fleet.upload(name, config.read_bytes(), tensors.read_bytes())
        assert contents(tmp_path) == before

    play(scene)


def test_a_fleet_directory_s_adapter_goes_before_the_bundle_s(play):
    async def scene(s):
        bundled = (await s.asked("alpha"))["alpha"]
        s.put("alpha", seed=7)
        await s.fleet.refresh()
        assert np.array_equal((await s.asked("alpha"))["alpha"], s.row(7))
        shutil.rmtree(s.directory / "alpha")
        await s.looks(2)
        assert np.array_equal((await s.asked("alpha"))["alpha"], bundled)

    play(scene)


def test_a_bundle_s_adapter_that_was_tampered_with_is_not_loaded(play, small, tmp_path):
    bundle = copy_bundle(small, tmp_path / "copy")

    async def scene(s):
        await s.asked("a")
        assert set(s.bank) == {"a"}
        flip_byte(bundle / "adapters" / "alpha" / TENSOR_FILE)
        with pytest.raises(RequestError, match="sha256"):
            await s.ask("alpha")
        with pytest.raises(HhdeployError, match="sha256"):
            await s.fleet.load("alpha")
        assert s.state("alpha") == "broken"

    play(scene, slots=2, bundle=bundle)


def test_a_bundle_with_more_adapters_than_rows(play):
    async def scene(s):
        assert set(s.bank) == {"alpha"}
        assert s.state("gamma") == "on disk"
        values = await s.asked("gamma")
        stored = s.bank.pack("gamma", s.workshop.adapters["gamma"]).row
        assert np.array_equal(values["gamma"], stored)
        assert s.bank["gamma"].verified

    play(scene, slots=2, directory=False)


def test_watching_goes_on_whatever_happens_to_the_directory(play, tmp_path):
    async def scene(s):
        watching = asyncio.create_task(s.fleet.watch(0.01))
        s.put("d", seed=9)
        await until(lambda: "d" in s.fleet.names)
        s.directory.rename(tmp_path / "away")
        with pytest.raises(OSError, match="fleet"):
            await s.fleet.refresh()
        assert "d" in s.fleet.names  # what was there is not taken for removed
        await asyncio.sleep(0.03)
        (tmp_path / "away").rename(s.directory)
        s.put("e", seed=10)
        await until(lambda: "e" in s.fleet.names)
        shutil.rmtree(s.directory / "e")
        await until(lambda: "e" not in s.fleet.names)
        watching.cancel()
        await asyncio.wait([watching])

    play(scene)


def test_two_that_look_at_the_same_time_read_what_is_new_once(play):
    async def scene(s):
        s.put("d", seed=9)
        await asyncio.gather(s.fleet.refresh(), s.fleet.refresh())
        assert s.reads == ["d"]

    play(scene)


# --- half way through a replacement --------------------------------------------------------------


def errors(caplog):
    return [r for r in caplog.records if r.levelname == "ERROR"]


def test_a_folder_that_is_away_for_one_look_is_not_gone(play, caplog):
    async def scene(s):
        await s.asked("a")
        for name in ("a", "b"):
            s.away(name)
        await s.fleet.refresh()
        assert {"a", "b"} <= set(s.fleet.names)
        assert np.array_equal((await s.asked("a"))["a"], s.row(0))
        s.put("a", seed=7)
        s.put("b", seed=8)
        await s.fleet.refresh()
        assert np.array_equal((await s.asked("a"))["a"], s.row(7))
        assert np.array_equal((await s.asked("b"))["b"], s.row(8))
        # It was not found missing twice in a row: the first time is forgotten.
        shutil.rmtree(s.directory / "b")
        await s.fleet.refresh()
        assert "b" in s.fleet.names
        await s.fleet.refresh()
        assert "b" not in s.fleet.names

    play(scene)
    assert not errors(caplog)


def test_the_bundle_s_adapter_does_not_answer_for_one_that_is_away_for_a_moment(play):
    async def scene(s):
        s.put("alpha", seed=7)
        await s.fleet.refresh()
        folder = s.away("alpha")
        await s.fleet.refresh()
        assert np.array_equal((await s.asked("alpha"))["alpha"], s.row(7))
        folder.rename(s.directory / "alpha")
        await s.looks(2)
        assert np.array_equal((await s.asked("alpha"))["alpha"], s.row(7))

    play(scene)


@pytest.mark.parametrize("name", ["a", "new"])
def test_a_folder_that_is_half_there_is_broken_at_the_second_look_alone(play, caplog, name):
    async def scene(s):
        await s.asked("a")
        known = set(s.fleet.names)
        tensors = s.put(name, seed=7) / TENSOR_FILE
        written = tensors.rename(s.directory.parent / "tensors are late")
        await s.fleet.refresh()
        assert set(s.fleet.names) == known
        assert s.fleet.status("a").problem == ""
        assert np.array_equal((await s.asked("a"))["a"], s.row(0))
        assert s.fleet.counters.failures == 0
        assert not errors(caplog)
        written.rename(tensors)
        await s.fleet.refresh()
        assert np.array_equal((await s.asked(name))[name], s.row(7))
        tensors.unlink()
        await s.fleet.refresh()
        assert not errors(caplog)
        await s.fleet.refresh()
        assert s.fleet.counters.failures == 1
        assert [r.adapter for r in errors(caplog)] == [name]
        assert TENSOR_FILE in s.fleet.status(name).problem
        # The one in its row goes on answering.
        assert np.array_equal((await s.asked(name))[name], s.row(7))
        await s.looks(2)
        assert len(errors(caplog)) == 1  # told once

    play(scene)


def test_a_folder_that_goes_while_it_is_read_is_not_broken(play, caplog):
    async def scene(s):
        await s.asked("a")
        s.put("a", seed=7)
        with s.reader_held_up():
            looking = asyncio.create_task(s.fleet.refresh())
            await until(lambda: s.reads[-1:] == ["a"] and len(s.reads) == 2)
            s.away("a")
        await looking
        assert (s.state("a"), s.fleet.status("a").problem) == ("ready", "")
        assert np.array_equal((await s.asked("a"))["a"], s.row(0))
        s.put("a", seed=8)
        await s.fleet.refresh()
        assert np.array_equal((await s.asked("a"))["a"], s.row(8))
        assert s.fleet.counters.failures == 0

    play(scene)
    assert not errors(caplog)


@pytest.mark.parametrize("how", ["request", "load"])
def test_one_that_is_asked_for_while_it_is_away_is_waited_for(play, monkeypatch, how):
    monkeypatch.setattr(fleet, "_GAP_SECONDS", PATIENCE)

    async def scene(s):
        s.put("alpha", seed=6)
        await s.fleet.refresh()
        looked = []
        for called in ("find", "read"):
            work = getattr(s.fleet._files, called)
            monkeypatch.setattr(
                s.fleet._files,
                called,
                lambda *given, work=work: (looked.append(1), work(*given))[1],
            )
        for name in ("a", "alpha"):  # one is the bundle's as well, whose is the wrong one
            if how == "request" and name in s.bank:
                s.fleet.rows.remove(name)
            s.away(name)
            begun = len(looked)
            ask = s.asked(name) if how == "request" else s.fleet.load(name)
            asked = asyncio.create_task(ask)
            await until(lambda begun=begun: len(looked) >= begun + 2)
            assert not asked.done()
            s.put(name, seed=7)
            await asked
            assert np.array_equal((await s.asked(name))[name], s.row(7))

    play(scene)


def test_one_that_stays_away_is_refused_and_not_for_ever(play, monkeypatch):
    monkeypatch.setattr(fleet, "_GAP_SECONDS", 0.0)

    async def scene(s):
        folder = s.away("a")
        for _ in range(2):
            with pytest.raises(RequestError, match=r"a is not a directory|does not exist"):
                await s.ask("a")
        with pytest.raises(NotFoundError):
            await s.fleet.load("a")
        assert s.state("a") == "on disk"
        folder.rename(s.directory / "a")  # the same files: no look would see a change
        assert np.array_equal((await s.asked("a"))["a"], s.row(0))

    play(scene)


def test_at_the_start_a_folder_that_is_half_there_is_looked_at_twice(
    play, workshop, tmp_path, monkeypatch
):
    monkeypatch.setattr(fleet, "_GAP_SECONDS", 0.0)
    put_adapter(make_adapter(workshop, 5), tmp_path, "fleet")  # makes tmp_path/fleet: an adapter
    shutil.move(tmp_path / "fleet", tmp_path / "half")
    (tmp_path / "fleet").mkdir()
    (tmp_path / "half" / TENSOR_FILE).unlink()
    shutil.move(tmp_path / "half", tmp_path / "fleet" / "half")

    async def scene(s):
        assert s.state("half") == "broken"
        assert TENSOR_FILE in s.fleet.status("half").problem

    play(scene)


def test_folders_that_are_replaced_again_and_again_answer_with_the_old_or_the_new(
    play, monkeypatch
):
    """A look and a request in the middle of each replacement, the adapter in a row or not."""
    monkeypatch.setattr(fleet, "_GAP_SECONDS", PATIENCE)

    async def scene(s):
        await s.asked("a")
        old = 0
        for new in range(7, 13):
            if new % 2:
                await s.asked("b")  # which takes its row
            shutil.rmtree(s.away("a"))
            await s.fleet.refresh()
            asking = asyncio.create_task(s.asked("a"))
            await settle()
            s.put("a", seed=new)
            found = (await asking)["a"]
            assert np.array_equal(found, s.row(new if new % 2 else old))
            await s.fleet.refresh()
            assert np.array_equal((await s.asked("a"))["a"], s.row(new))
            old = new
        assert s.fleet.counters.failures == 0

    play(scene, slots=2)


# --- changes while a look is under way ------------------------------------------------------------


@contextmanager
def list_held_up(s):
    """The look has its list of the directory, and does not get it yet; gives an event of that.

    A second thread reads, so that the fleet's other work goes on meanwhile.
    """
    listed, go, sources = threading.Event(), threading.Event(), s.fleet._files.sources

    def slow():
        found = sources()
        listed.set()
        assert go.wait(PATIENCE)
        return found

    s.fleet._files.sources = slow
    s.fleet._reader.shutdown()
    s.fleet._reader = ThreadPoolExecutor(2)
    try:
        yield listed
    finally:
        go.set()
        s.fleet._files.sources = sources


@pytest.mark.parametrize("name", ["fresh", "a", "alpha"])
@pytest.mark.parametrize("how", ["upload", "load", "unload", "unload and load"])
def test_what_is_changed_while_a_look_is_under_way_is_newer(play, tmp_path, name, how):
    """New, replaced and in place of the bundle's; the look's list was made before."""

    async def scene(s):
        if name == "fresh" and how.startswith("unload"):
            s.put("fresh", seed=5)
            await s.fleet.refresh()
        files = files_of(make_adapter(s.workshop, 7), tmp_path)
        if how == "unload" and name == "alpha":
            s.put("alpha", seed=5)  # else the list has nothing to say of it
        with list_held_up(s) as listed:
            looking = asyncio.create_task(s.fleet.refresh())
            await until(listed.is_set)
            if how == "upload":
                await s.fleet.upload(name, *files)
            elif how == "unload":
                await s.fleet.unload(name)
            else:
                if how == "unload and load":
                    await s.fleet.unload(name)
                s.put(name, seed=7)
                await s.fleet.load(name)
            known = s.fleet._known[name]
        await looking
        assert s.fleet._known[name] is known
        if how == "unload":
            assert s.state(name) == "unloaded"
            with pytest.raises(NotFoundError, match="unloaded"):
                await s.ask(name)
            return
        assert np.array_equal((await s.asked(name))[name], s.row(7))
        reads = len(s.reads)
        await s.looks(2)
        assert len(s.reads) == reads  # it is known as it is
        assert np.array_equal((await s.asked(name))[name], s.row(7))

    play(scene, slots=6)


def test_an_upload_survives_a_look_that_reads_what_it_replaces(play, tmp_path):
    """The look reads the bundle's alpha, which answers again, after the upload was written."""

    async def scene(s):
        s.put("alpha", seed=5)
        await s.fleet.refresh()
        s.away("alpha")
        await s.fleet.refresh()
        s.put("a", seed=9)  # looked at before alpha is
        reads = len(s.reads)
        with s.reader_held_up():
            looking = asyncio.create_task(s.fleet.refresh())
            await until(lambda: s.reads[reads:] == ["a"])
            files = files_of(make_adapter(s.workshop, 7), tmp_path)
            uploading = asyncio.create_task(s.fleet.upload("alpha", *files))
            await settle()
        await asyncio.gather(looking, uploading)
        assert s.reads[reads:] == ["a", "alpha"]
        assert np.array_equal((await s.asked("alpha"))["alpha"], s.row(7))

    play(scene)


def test_an_upload_survives_a_request_that_reads_what_it_replaces(play, tmp_path):
    """It was on its way to the bundle's adapter, and reads it after the upload was written."""

    async def scene(s):
        await s.asked("a")
        assert "alpha" not in s.bank
        files = files_of(make_adapter(s.workshop, 7), tmp_path)
        with s.writer_held_up() as begun:
            uploading = asyncio.create_task(s.fleet.upload("alpha", *files))
            await until(begun.is_set)
            asking = asyncio.create_task(s.asked("alpha"))
            await settle()
        values, _ = await asyncio.gather(asking, uploading)
        await s.fleet.close()
        assert "alpha" in s.reads
        for found in (values, await s.asked("alpha")):
            assert np.array_equal(found["alpha"], s.row(7))

    play(scene, slots=2)


@pytest.mark.parametrize("how", ["request", "load"])
def test_one_that_a_look_finds_while_an_older_one_waits_for_a_row(play, how):
    """It was read before, and would stay: no later look sees a change."""

    async def scene(s):
        held = await s.ask("alpha", "gamma")
        bringing = asyncio.create_task(s.asked("a") if how == "request" else s.fleet.load("a"))
        await until(lambda: len(s.bank) == 1)  # it was read, and one gives its row up
        s.put("a", seed=7)
        await s.fleet.refresh()
        assert not bringing.done()
        s.release(held)
        await bringing
        assert np.array_equal((await s.asked("a"))["a"], s.row(7))

    play(scene, slots=3)


def test_an_adapter_unloaded_while_a_look_reads_it_stays_unloaded(play):
    async def scene(s):
        await s.asked("a")
        s.put("a", seed=7)
        with s.reader_held_up():
            looking = asyncio.create_task(s.fleet.refresh())
            await until(lambda: len(s.reads) == 2)
            await s.fleet.unload("a")
        await looking
        assert s.state("a") == "unloaded"
        assert "a" not in s.bank
        await s.fleet.refresh()
        assert s.state("a") == "unloaded"
        await s.fleet.load("a")
        assert np.array_equal((await s.asked("a"))["a"], s.row(7))

    play(scene)


def test_what_is_assumed_of_an_adapter_is_logged_as_adapter_add_says_it(play, tmp_path, caplog):
    caplog.set_level("INFO", "hhdeploy.serve.fleet")

    async def scene(s):
        vague = make_adapter(s.workshop, 7)
        vague = replace(vague, config=replace(vague.config, preprocess=None, base_sha256=None))
        put_adapter(vague, s.directory, "vague")
        await s.looks(1)
        await s.asked("vague")
        await s.fleet.upload("sent", *files_of(vague, tmp_path))
        bundle, said = copy_bundle(s.bundle.path, tmp_path / "copy"), []
        for name in ("vague", "sent"):
            add_adapter(bundle, name, s.directory / name, progress=said.append)
        assert len(said) == 4
        for name, lines in (("vague", said[:2]), ("sent", said[2:])):
            logged = [r for r in caplog.records if getattr(r, "adapter", "") == name]
            assert {r.message for r in logged} >= {"adapter loaded"}
            assert [(r.verified, r.notes) for r in logged] == [(False, lines)] * len(logged)
            assert list(s.fleet.rows.notes(name)) == lines
        assert [r.message for r in caplog.records if r.adapter == "vague"] == [
            "adapter found",
            "adapter loaded",
        ]
        await s.fleet.unload("sent")
        assert not s.fleet.rows.notes("sent")

    play(scene)


# --- uploads ------------------------------------------------------------------------------------


def test_an_upload_is_loaded_and_stays(play, tmp_path):
    async def scene(s):
        config, tensors = files_of(make_adapter(s.workshop, 7), tmp_path)
        entry = await s.fleet.upload("fresh", config, tensors)
        assert (entry.name, entry.classes, entry.verified) == ("fresh", 7, False)
        assert np.array_equal((await s.asked("fresh"))["fresh"], s.row(7))
        assert (s.directory / "fresh" / TENSOR_FILE).read_bytes() == tensors
        held = await s.ask("fresh")
        await s.fleet.upload("fresh", *files_of(make_adapter(s.workshop, 8), tmp_path))
        assert np.array_equal(s.bank.rows[held["fresh"].row], s.row(7))
        s.release(held)
        assert np.array_equal((await s.asked("fresh"))["fresh"], s.row(8))
        reads = len(s.reads)
        await s.fleet.refresh()
        assert len(s.reads) == reads  # it is known as it is
        assert sorted(p.name for p in s.directory.iterdir()) == ["a", "b", "c", "fresh"]

    play(scene)


def test_an_upload_that_is_not_acceptable_changes_nothing(play, tmp_path):
    async def scene(s):
        config, tensors = files_of(make_adapter(s.workshop, 7), tmp_path)
        before = contents(s.directory)
        await s.asked("a")
        for bad in ((b"{", tensors), (config, tensors[:-1]), (b"[" * 100_000, tensors), (b"", b"")):
            with pytest.raises(HhdeployError) as caught:
                await s.fleet.upload("a", *bad)
            assert str(s.directory) not in str(caught.value)
        assert contents(s.directory) == before
        assert sorted(p.name for p in s.directory.iterdir()) == ["a", "b", "c"]
        assert s.fleet.status("a").problem == ""
        assert np.array_equal((await s.asked("a"))["a"], s.row(0))

    play(scene)


@pytest.mark.parametrize("failure", [OSError(errno.EMFILE, "too many"), MemoryError()])
def test_an_adapter_that_the_machine_cannot_read_now_is_not_broken(
    play, monkeypatch, caplog, tmp_path, failure
):
    """E.g. idle connections have all the files that may be open: it is asked for again later."""

    def fail(*_, **__):
        raise failure

    async def scene(s):
        before = (await s.asked("b"))["b"]
        s.put("b", 5)
        s.put("d", 6)
        with monkeypatch.context() as patched:
            patched.setattr(s.bank, "pack", fail)
            for ask in (s.ask, s.fleet.load):
                with pytest.raises(LoadFailedError, match=r"'a' cannot be read now: .*again later"):
                    await ask("a")
            with pytest.raises(FailedError, match="cannot be read back"):
                await s.fleet.upload("e", *files_of(make_adapter(s.workshop, 7), tmp_path))
            await s.looks(3)
            said = {r.adapter for r in caplog.records if r.message == "adapter not read"}
            assert {"a", "b", "d"} <= said
            assert np.array_equal((await s.asked("b"))["b"], before)
        assert (s.state("a"), s.fleet.status("a").problem) == ("on disk", "")
        assert np.array_equal((await s.asked("a"))["a"], s.row(0))
        await s.looks(1)
        assert np.array_equal((await s.asked("b"))["b"], s.row(5))
        assert np.array_equal((await s.asked("d"))["d"], s.row(6))

    play(scene, slots=8)


def test_an_upload_onto_a_full_disk_is_the_servers_fault(play, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def scene(s):
        files, before = files_of(make_adapter(s.workshop, 7), tmp_path), contents(s.directory)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", full)
            with pytest.raises(FailedError, match="disk is full"):
                await s.fleet.upload("a", *files)
        assert contents(s.directory) == before
        assert np.array_equal((await s.asked("a"))["a"], s.row(0))

    play(scene)


def test_an_upload_replaces_no_folder_that_holds_more_and_says_what(play, tmp_path):
    """It is not the server's fault, and the message is for who uploads: what is in the way."""
    reasons = {"a": "it holds README.md, which", "b": "it has no adapter_conf", "c": "it is a file"}

    async def scene(s):
        files = files_of(make_adapter(s.workshop, 7), tmp_path)
        (s.directory / "a" / "README.md").write_text("as a hub has it")
        (s.directory / "b" / CONFIG_FILE).write_text("{")
        shutil.rmtree(s.directory / "c")
        (s.directory / "c").write_text("no folder")
        before = contents(s.directory)
        for name, reason in reasons.items():
            with pytest.raises(RequestError, match=reason) as caught:
                await s.fleet.upload(name, *files)
            assert caught.value.status == 400 and repr(name) in str(caught.value)
            for word in (str(s.directory), "overwrite", "output directory"):
                assert word not in str(caught.value)
            assert contents(s.directory) == before
        await s.fleet.upload("fresh", *files)

    play(scene)


def test_an_upload_without_a_directory(play, tmp_path):
    async def scene(s):
        with pytest.raises(ForbiddenError, match="`adapters_dir`"):
            await s.fleet.upload("a", *files_of(make_adapter(s.workshop, 7), tmp_path))

    play(scene, directory=False)


def test_an_upload_whose_client_leaves_is_finished(play, tmp_path):
    """Else the disk would have the new adapter, and the bank the old one, until who knows when."""

    async def scene(s):
        await s.asked("a")
        files = files_of(make_adapter(s.workshop, 7), tmp_path)
        with s.writer_held_up() as begun:
            change = asyncio.create_task(s.fleet.upload("a", *files))
            await until(begun.is_set)
            change.cancel()
            await asyncio.wait([change])
        await s.fleet.close()
        assert np.array_equal((await s.asked("a"))["a"], s.row(7))

    play(scene)


def test_an_upload_during_a_refresh_is_not_taken_for_removed(play, tmp_path):
    async def scene(s):
        s.put("slow", seed=9)
        with s.reader_held_up():
            refreshing = asyncio.create_task(s.fleet.refresh())
            await until(lambda: s.reads == ["slow"])
            files = files_of(make_adapter(s.workshop, 7), tmp_path)
            change = asyncio.create_task(s.fleet.upload("fresh", *files))
            await settle()
        await asyncio.gather(refreshing, change)
        assert np.array_equal((await s.asked("fresh"))["fresh"], s.row(7))

    play(scene)


# --- what is no adapter ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        *itertools.product((CONFIG_FILE, TENSOR_FILE), ("pipe", "directory", "huge")),
        *itertools.product(("README.md",), ("pipe", "directory")),
    ],
)
def test_files_that_are_none_or_too_large_are_refused_unread(play, file, kind):
    """A pipe would hold the reading thread for ever, a sparse file take its size in memory."""

    async def scene(s):
        path = s.put("odd") / file
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        else:
            with path.open("wb") as stream:
                stream.truncate(8 << 30)
        await s.looks(2)
        assert s.state("odd") == "broken"
        said = s.fleet.status("odd").problem
        assert file in said and ("at most" if kind == "huge" else "expected a file") in said
        with pytest.raises(RequestError, match="cannot be loaded"):
            await s.ask("odd")
        await s.asked("b")  # the thread reads on

    play(scene)


def long_number(folder):
    text = (folder / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(text.replace("{", '{"x": ' + "9" * 5000 + ",", 1))


def link_to_itself(folder):
    (folder / CONFIG_FILE).unlink()
    (folder / CONFIG_FILE).symlink_to(CONFIG_FILE)


def link_without_end(folder):
    shutil.rmtree(folder)
    folder.symlink_to("x" * 300)


def nothing_of_it(folder):
    """What nobody thought of."""


@pytest.mark.parametrize("odd", [long_number, link_to_itself, link_without_end, nothing_of_it])
def test_an_odd_folder_stops_no_other(play, monkeypatch, odd):
    """One that is sorted behind it is found and removed, and another server starts."""

    async def scene(s):
        odd(s.put("b"))
        if odd is nothing_of_it:
            pack = s.bank.pack

            def fail(name, *rest, **options):
                if name == "b":
                    raise LookupError("nobody thought of it")
                return pack(name, *rest, **options)

            monkeypatch.setattr(s.bank, "pack", fail)
        s.put("d", seed=9)
        shutil.rmtree(s.directory / "c")
        await s.looks(2)
        assert s.state("b") == "broken" and s.fleet.status("b").problem
        assert "c" not in s.fleet.names
        assert np.array_equal((await s.asked("d"))["d"], s.row(9))
        with pytest.raises(HhdeployError):
            await s.fleet.load("b")
        with open_session(s.bundle.path, device="cpu", threads=1) as opened:
            another = Fleet(opened.bundle, opened.adapters, s.directory)
            await another.start()
            assert "d" in another.names
            await another.close()

    play(scene)


def test_an_upload_that_raises_what_nobody_thought_of_is_refused(play, tmp_path, monkeypatch):
    async def scene(s):
        config, tensors = files_of(make_adapter(s.workshop, 3), tmp_path)
        with pytest.raises(AdapterError, match="is not valid JSON"):
            await s.fleet.upload("new", b'{"x": ' + b"9" * 5000 + b"}", tensors)

        def fail(*_, **__):
            raise LookupError("nobody thought of it")

        monkeypatch.setattr(s.bank, "pack", fail)
        with pytest.raises(AdapterError, match="new cannot be read: nobody thought of it"):
            await s.fleet.upload("new", config, tensors)
        assert not (s.directory / "new").exists()

    play(scene)


def test_the_bundle_s_name_is_no_adapter_s(play, caplog):
    async def scene(s):
        s.fleet.reserve("served")
        s.put("served")
        await s.looks(3)
        assert "served" not in s.fleet.names
        with pytest.raises(NotFoundError):
            await s.fleet.load("served")
        said = [r for r in caplog.records if getattr(r, "adapter", "") == "served"]
        assert [(r.message, "bundle's in the protocol" in r.problem) for r in said] == [
            ("adapter not loaded", True)
        ]
        with pytest.raises(PlanError, match="could not tell them apart"):
            s.fleet.reserve("a")

    play(scene)


def test_a_device_that_fails_while_an_adapter_is_loaded_is_not_the_request_s_fault(play):
    async def scene(s):
        def fail(row):
            raise DeviceError("lost")

        s.bank.row_changed, before = fail, s.bank.row_changed
        with pytest.raises(LoadFailedError, match="lost") as caught:
            await s.ask("a")
        assert (caught.value.status, caught.value.code) == (503, "UNAVAILABLE")
        assert caught.value.reason == "BACKEND"  # which a replica's health goes by
        s.bank.row_changed = before
        await s.asked("a")  # and not held against the adapter

    play(scene)


@pytest.mark.parametrize(("mask", "folder", "file"), [(0o027, 0o750, 0o640), (0o002, 0o775, 0o664)])
def test_what_is_uploaded_has_the_rights_that_the_umask_leaves(
    play, workshop, tmp_path, mask, folder, file
):
    """A group that shares a fleet directory, or nobody else at all."""

    async def scene(s):
        await s.fleet.upload("new", *files_of(make_adapter(workshop, 5), tmp_path))
        await s.fleet.upload("a", *files_of(make_adapter(workshop, 6), tmp_path))  # replaces one
        for name in ("new", "a"):
            written = s.directory / name
            assert stat.S_IMODE(written.stat().st_mode) == folder
            assert {stat.S_IMODE(p.stat().st_mode) for p in written.iterdir()} == {file}

    before = os.umask(mask)
    try:
        play(scene)
    finally:
        os.umask(before)


def test_a_bundle_that_is_edited_while_it_is_served_is_not_followed(
    play, small, workshop, tmp_path
):
    """The old version answers, or nobody: never another one than the session was opened with."""
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(small, copy)
    save_adapter(make_adapter(workshop, 3), other)

    async def scene(s):
        gamma = (await s.asked("gamma"))["gamma"]
        alpha = (await s.asked("alpha"))["alpha"]  # the one row is alpha's now
        await asyncio.to_thread(add_adapter, copy, "new", other)
        await asyncio.to_thread(remove_adapter, copy, "gamma")
        with pytest.raises(NotFoundError, match="unknown adapter 'new'"):
            await s.asked("new")
        np.testing.assert_array_equal((await s.asked("gamma"))["gamma"], gamma)
        await asyncio.to_thread(remove_adapter, copy, "alpha")
        await asyncio.to_thread(add_adapter, copy, "alpha", other)
        for _ in range(2):  # which is no fault of the request, and nobody can run it again
            with pytest.raises(FailedError, match=r"'alpha' has no row .* Start the server again"):
                await s.asked("alpha")  # its files are others now
        np.testing.assert_array_equal((await s.asked("gamma"))["gamma"], gamma)
        await asyncio.to_thread(remove_adapter, copy, "alpha")
        await asyncio.to_thread(add_adapter, copy, "alpha", small / "adapters" / "alpha")
        np.testing.assert_array_equal((await s.asked("alpha"))["alpha"], alpha)

    play(scene, slots=2, names=(), bundle=copy, directory=False)


@pytest.mark.parametrize("harm", ["away", "damaged", "unreadable"])
def test_a_bundle_that_is_harmed_while_it_is_served_is_the_servers_fault(
    play, small, tmp_path, harm
):
    """With looks it was the request's, 400, and went on when the bundle was back."""
    copy, away = tmp_path / "copy", tmp_path / "away"
    shutil.copytree(small, copy)
    file = copy / "adapters" / "alpha" / TENSOR_FILE
    content = file.read_bytes()

    async def scene(s):
        alpha = (await s.asked("alpha"))["alpha"]
        await s.asked("gamma")  # the one row is gamma's now
        if harm == "away":
            copy.rename(away)
        else:
            file.unlink()
            if harm == "damaged":
                file.write_bytes(content[:-1] + b"?")
            else:
                file.symlink_to(file)
        for looks in (0, 0, 2):
            await s.looks(looks)
            with pytest.raises(FailedError, match="'alpha' has no row now") as caught:
                await s.asked("alpha")
            assert caught.value.status == 500
        assert s.state("alpha") == "broken"
        with pytest.raises(FailedError, match="'alpha' has no row now"):  # as its metadata says
            s.fleet.status("alpha").check()
        if harm == "away":
            away.rename(copy)
        else:
            file.unlink()
            file.write_bytes(content)
        np.testing.assert_array_equal((await s.asked("alpha"))["alpha"], alpha)
        # A server without a fleet directory never looks.
        assert (s.state("alpha"), s.fleet.status("alpha").problem) == ("ready", "")
        await s.looks(2)
        assert (s.state("alpha"), s.fleet.status("alpha").problem) == ("ready", "")

    play(scene, slots=2, names=(), bundle=copy, directory=False)


def test_an_upload_makes_no_fleet_directory_in_the_place_of_one_that_is_away(play, tmp_path):
    """The next look found that alone there, and took all other adapters for gone."""

    async def scene(s):
        files, before = files_of(make_adapter(s.workshop, 7), tmp_path), await s.asked("a", "b")
        s.directory.rename(tmp_path / "away")
        with pytest.raises(FailedError, match="fleet directory is not there now"):
            await s.fleet.upload("fresh", *files)
        assert not s.directory.exists()
        with pytest.raises(NotFoundError, match=r"unknown adapter 'a'\. There are: alpha, b"):
            await s.fleet.load("a")
        for name, values in (await s.asked("a", "b")).items():
            np.testing.assert_array_equal(values, before[name])
        (tmp_path / "away").rename(s.directory)
        await s.looks(2)
        await s.fleet.upload("fresh", *files)
        assert s.state("fresh") == "ready"

    play(scene, slots=8)


@pytest.mark.parametrize("left", ["nothing", "an empty directory", "one with a file", "a new disk"])
def test_a_fleet_directory_whose_disk_is_unmounted_takes_no_adapter_with_it(play, tmp_path, left):
    """Its mount point is another directory, an empty one: all adapters were taken for gone."""

    async def scene(s):
        files, before = files_of(make_adapter(s.workshop, 7), tmp_path), await s.asked("a")
        s.directory.rename(tmp_path / "away")
        if left != "nothing":
            s.directory.mkdir()
        if left == "a new disk":
            (s.directory / "lost+found").mkdir()
        if left == "one with a file":
            (s.directory / "NOT MOUNTED").touch()
        for _ in range(3):
            with pytest.raises(FileNotFoundError, match="fleet"):
                await s.fleet.refresh()
        np.testing.assert_array_equal((await s.asked("a"))["a"], before["a"])
        with pytest.raises(LoadFailedError, match=r"fleet directory is not there.*mounted"):
            await s.asked("b")
        with pytest.raises(FailedError, match="fleet directory is not there now"):
            await s.fleet.upload("fresh", *files)
        if left != "nothing":
            shutil.rmtree(s.directory)
        (tmp_path / "away").rename(s.directory)
        await s.looks(2)
        assert (await s.asked("b")).keys() == {"b"}
        assert s.state("c") == "on disk"

    play(scene, slots=8)


def test_a_fleet_directory_that_is_emptied_or_replaced_is_believed(play, tmp_path):
    async def scene(s):
        for name in "abc":
            shutil.rmtree(s.directory / name)
        await s.looks(2)
        assert {"a", "b", "c"}.isdisjoint(s.fleet.names)
        s.directory.rename(tmp_path / "away")
        s.directory.mkdir()
        await s.looks(2)  # another one, and nothing is lost with it
        s.put("d")
        await s.looks(2)
        assert "d" in s.fleet.names
        s.directory.rename(tmp_path / "away too")
        s.directory.mkdir()
        s.put("e")
        await s.looks(2)
        assert "e" in s.fleet.names
        assert "d" not in s.fleet.names

    play(scene)


# --- visitors -------------------------------------------------------------------------------------

MANY = tuple(f"n{i:02}" for i in range(14))  # with alpha and gamma as many as the bank has rows
SEEN = tuple(f"v{i}" for i in range(5))


async def visit(s, *names):
    s.release(await s.fleet.rows.hold(dict.fromkeys(names), visitor=True))


def test_visitors_take_few_rows_of_a_full_bank(play):
    async def scene(s):
        for name in MANY:
            await s.asked(name)
        assert s.fleet.rows.visitor_rows == 2
        for _ in range(2):
            for names in (SEEN[:2], SEEN[2:4], SEEN[4:]):
                await visit(s, *names)
        assert sum(name in s.bank for name in (*MANY, "alpha", "gamma")) == 14
        assert [name for name in SEEN if name in s.bank] == ["v3", "v4"]
        await s.asked("v3")  # one that others ask for is theirs
        await visit(s, "v0")
        await visit(s, "v1")
        assert "v3" in s.bank
        for name in (*MANY, "alpha", "gamma"):  # visitors' rows go first
            await s.asked(name)
        assert "v0" not in s.bank and "v1" not in s.bank

    play(scene, slots=17, names=(*MANY, *SEEN))


def test_a_visitor_s_request_loads_few_adapters(play):
    async def scene(s):
        with pytest.raises(RequestError, match="3 adapters have no row, a visitor's request may"):
            await visit(s, *SEEN[:3])
        assert not s.reads
        await visit(s, "alpha", "gamma", *SEEN[:2])

    play(scene, slots=17, names=SEEN)


def test_visitors_who_name_what_there_is_not_leave_nothing(play):
    async def scene(s):
        (s.directory / "v0" / "adapter_model.safetensors").write_bytes(b"broken")
        await s.fleet.refresh()
        for name in ("nobody", "v0"):
            with pytest.raises(RequestError):
                await visit(s, name)
        assert not s.fleet.rows._visited

    play(scene, names=SEEN)


def test_visitors_who_come_together_all_are_answered(play):
    async def scene(s):
        for name in MANY:
            await s.asked(name)
        pairs = [(a, b) for a in SEEN for b in SEEN if a < b]
        await asyncio.gather(*(visit(s, *pair) for pair in pairs), *map(s.asked, MANY))

    play(scene, slots=17, names=(*MANY, *SEEN))
