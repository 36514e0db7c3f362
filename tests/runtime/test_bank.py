"""The bank of an open session: adapters come and go while requests are in flight."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hhdeploy.bundle import Bundle
from hhdeploy.errors import AdapterError, CapacityError, DeviceError, PlanError, SessionError
from hhdeploy.runtime import AdapterBank, open_session
from hhdeploy.runtime.bank import Hold
from tests.support import assert_caught, assert_parity, images, random_adapter
from tests.workshop import HEAVY, TOO_WIDE, contents, run_python

# For a machine that is busy; nothing here is about time.
PATIENCE = 30.0

# --- add, remove, replace -----------------------------------------------------------------------


def test_an_adapter_added_to_an_open_session(own, small, workshop):
    before = contents(small)
    x = images(5)
    names = ["rival", "alpha", "rival", "gamma", "alpha"]
    old = own.run(x, "alpha")
    entry = own.adapters.add("rival", workshop.directory("rival"))
    assert (entry.name, entry.row, entry.classes, entry.verified) == ("rival", 3, 7, False)
    assert list(own.adapters) == ["alpha", "gamma", "rival"]
    assert len(own.adapters) == 3
    assert "rival" in own.adapters
    truth = workshop.mixed_truth(names, x, 7)
    assert_parity(truth, own.run(x, names), "branches", "float32")
    assert_caught(truth[[0, 2]], own.run(x[[0, 2]], "alpha"), "branches", "float32")
    assert np.array_equal(own.run(x, "alpha"), old)
    assert contents(small) == before  # in memory only


def test_an_adapter_in_memory(own, workshop):
    said = []
    rival = workshop.adapters["rival"]
    vague = replace(rival, config=replace(rival.config, preprocess=None))
    own.adapters.add("here", vague, progress=said.append)
    assert ["does not say how its images become inputs" in line for line in said] == [True]
    x = images(2)
    truth = workshop.mixed_truth(["rival"] * 2, x, 7)
    assert_parity(truth, own.run(x, "here"), "branches", "float32")


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_an_adapter_that_the_ranges_of_its_graph_do_not_know(precision):
    """At another strength, or another adapter: its INT8 answers may have nothing to do with it."""
    witness = Path(__file__).parents[1] / "witnesses" / "v1"
    said = []
    with open_session(witness / "int8", device="cpu", precision=precision, slots=8) as session:
        bank = session.adapters
        bank.add("guest", witness / "rival", progress=said.append)
        name = next(iter(bank))
        kept = bank.pack(name, session.bundle.load_adapter(name), bundled=True)
    lines = [
        "adapter 'guest': the ranges of int8 were found without it, and values beyond them are"
    ]
    assert [line[: len(lines[0])] for line in said] == (lines if precision == "int8" else [])
    assert not any("ranges" in note for note in kept.notes)


def test_the_bank_of_a_closed_session_takes_and_gives_no_adapter(small, workshop):
    """It did, as if a graph was there that uses it; what was held is still given back."""
    session = open_session(small, device="cpu", threads=1, slots=4)
    bank = session.adapters
    hold, packed = bank.hold("alpha"), bank.pack("rival", workshop.directory("rival"))
    session.close()
    for call in (
        lambda: bank.add("rival", workshop.directory("rival")),
        lambda: bank.put(packed),
        lambda: bank.remove("gamma"),
        lambda: bank.hold("gamma"),
        lambda: bank.hold(None),
    ):
        with pytest.raises(SessionError, match=r"the session is closed\."):
            call()
    bank.release(hold)
    assert list(bank) == ["alpha", "gamma"]


def test_a_removed_adapter_is_unknown_and_its_row_is_reused(own, workshop):
    x = images(3)
    gamma = own.run(x, "gamma")
    own.adapters.remove("alpha")
    assert list(own.adapters) == ["gamma"]
    with pytest.raises(SessionError, match=r"unknown adapter 'alpha'\. Loaded are: gamma\."):
        own.run(x, "alpha")
    with pytest.raises(SessionError, match="unknown adapter 'alpha'"):
        own.adapters.remove("alpha")
    assert not own.adapters.rows[1].any()
    assert own.adapters.add("rival", workshop.directory("rival")).row == 1
    truth = workshop.mixed_truth(["rival"] * 3, x, 7)
    assert_parity(truth, own.run(x, "rival"), "branches", "float32")
    assert np.array_equal(own.run(x, "gamma"), gamma)


def test_nothing_of_the_previous_adapter_stays_in_a_reused_row(own, workshop):
    """alpha changes sites that the low-rank adapter leaves alone."""
    plain = random_adapter(workshop.backbone.facts, targets=("v",), r=0, classes=2, seed=29)
    own.adapters.remove("alpha")
    reused = own.adapters.add("plain", plain)
    fresh = own.adapters.add("again", plain)
    assert (reused.row, fresh.row) == (1, 3)
    assert np.array_equal(own.adapters.rows[1], own.adapters.rows[3])


def test_a_name_that_is_taken(own, workshop):
    with pytest.raises(SessionError, match="'alpha' is loaded already"):
        own.adapters.add("alpha", workshop.directory("rival"))
    x = images(2)
    assert_parity(
        workshop.mixed_truth(["alpha"] * 2, x, 7), own.run(x, "alpha"), "branches", "float32"
    )


def test_replacing_gives_a_new_row_and_frees_the_old(own, workshop):
    x = images(3)
    entry = own.adapters.add("alpha", workshop.directory("rival"), replace_existing=True)
    assert entry.row == 3
    truth = workshop.mixed_truth(["rival"] * 3, x, 7)
    assert_parity(truth, own.run(x, "alpha"), "branches", "float32")
    assert own.adapters.add("alpha", workshop.directory("alpha"), replace_existing=True).row == 1


def test_an_adapter_with_fewer_classes_and_its_own_preprocessing(own, workshop):
    entry = own.adapters.add("gamma", workshop.directory("gamma"), replace_existing=True)
    assert entry.classes == 3
    assert entry.preprocess == workshop.adapters["gamma"].config.preprocess
    assert entry.label(2) == "class 2"
    found = own.run(images(2), "gamma")
    assert np.isneginf(found[:, 3:]).all()
    assert np.isfinite(found[:, :3]).all()


# --- refusals -----------------------------------------------------------------------------------


def test_no_free_row(own, workshop):
    own.adapters.add("rival", workshop.directory("rival"))
    before = own.adapters.rows.copy()
    with pytest.raises(CapacityError, match=r"all 3 rows .* `slots=8`"):
        own.adapters.add("one", workshop.directory("alpha"))
    assert list(own.adapters) == ["alpha", "gamma", "rival"]
    assert np.array_equal(own.adapters.rows, before)


def test_too_few_slots_say_how_many(small):
    with pytest.raises(SessionError, match=r"`slots=2` is too small.*`slots=3` or more"):
        open_session(small, device="cpu", slots=2)
    with open_session(small, device="cpu", slots=3) as exact:
        assert exact.adapters.slots == 3


def test_the_default_bank_has_64_rows(small):
    assert AdapterBank(Bundle.open(small), None).slots == 64
    assert AdapterBank(Bundle.open(small), None, 2).slots == 3, "or what is needed"


def test_an_adapter_that_was_added_is_held_by_nobody(small, workshop):
    bank = AdapterBank(Bundle.open(small), 4)
    entry = bank.add("guest", workshop.directory("rival"))
    assert not bank.held("guest")
    bank.remove("guest")
    assert bank.free_rows == 1
    assert not bank.rows[entry.row].any()


def test_adapters_that_do_not_belong(own, workshop):
    facts, x = workshop.backbone.facts, images(2)
    before = own.run(x, "alpha")
    elsewhere = random_adapter(replace(facts, sha256="0" * 64))
    other = random_adapter(replace(facts, model="vit_small_patch16_224", sha256="0" * 64))
    refused = [
        ("omega", elsewhere, AdapterError, "base_sha256"),
        ("omega", other, AdapterError, "base_model_name_or_path"),
        ("omega", workshop.adapters[TOO_WIDE], CapacityError, "sites|max_rank|max_classes"),
        ("omega", workshop.adapters["headless"], CapacityError, "sites|keep_backbone_head"),
        ("backbone", workshop.adapters["rival"], PlanError, "reserved"),
        ("../omega", workshop.adapters["rival"], PlanError, "letters, digits"),
    ]
    for name, adapter, error, message in refused:
        with pytest.raises(error, match=message):
            own.adapters.add(name, adapter)
    assert list(own.adapters) == ["alpha", "gamma"]
    assert not own.adapters.rows[3].any()
    assert np.array_equal(own.run(x, "alpha"), before)
    # A failed add keeps no row: there is still room for one.
    assert own.adapters.add("rival", workshop.directory("rival")).row == 3


# --- leases -------------------------------------------------------------------------------------


def test_a_row_is_freed_when_the_last_lease_ends(own, workshop):
    bank = own.adapters
    bank.add("rival", workshop.directory("rival"))  # no row is left
    packed = bank.rows[1].copy()
    with bank.lease(["alpha", "gamma", "alpha"]) as outer:
        assert outer.tolist() == [1, 2, 1]
        assert outer.dtype == np.int64
        with bank.lease(["alpha"]):
            bank.remove("alpha")
            with pytest.raises(CapacityError), bank.lease(["gamma"]):
                bank.add("one", workshop.directory("alpha"))
        with pytest.raises(CapacityError):
            bank.add("one", workshop.directory("alpha"))
        assert np.array_equal(bank.rows[1], packed)
    assert not bank.rows[1].any()
    assert bank.add("one", workshop.directory("alpha")).row == 1


def test_a_replaced_row_stays_for_those_who_lease_it(own, workshop):
    bank = own.adapters
    old = bank.rows[1].copy()
    with bank.lease(["alpha"]) as rows:
        bank.add("alpha", workshop.directory("rival"), replace_existing=True)
        assert rows.tolist() == [1]
        assert np.array_equal(bank.rows[1], old)
        with bank.lease(["alpha"]) as newer:
            assert newer.tolist() == [3]
    assert not bank.rows[1].any()
    assert bank.rows[3].any()


def test_an_unknown_name_leases_nothing(own):
    bank = own.adapters
    with pytest.raises(SessionError, match="omega"), bank.lease(["alpha", "omega"]):
        pass
    bank.remove("alpha")
    assert not bank.rows[1].any()


def test_a_request_that_fails_gives_its_rows_back(own, monkeypatch):
    def fail(images, ids):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(own._backend, "run", fail)
    with pytest.raises(RuntimeError, match="gone"):
        own.run(images(2), "alpha")
    own.adapters.remove("alpha")
    assert not own.adapters.rows[1].any()


# --- holds, for a server ------------------------------------------------------------------------


def test_a_held_row_keeps_its_values_until_it_is_released(own, workshop):
    bank = own.adapters
    old = bank.rows[1].copy()
    holds = [bank.hold("alpha"), bank.hold("alpha")]
    assert [(hold.row, hold.entry.name) for hold in holds] == [(1, "alpha")] * 2
    assert bank.held("alpha")
    assert not bank.held("gamma")
    bank.remove("alpha")
    bank.add("alpha", workshop.directory("rival"))
    assert bank.free_rows == 0
    assert bank.hold("alpha").row == 3
    for hold in holds:
        assert np.array_equal(bank.rows[1], old)
        bank.release(hold)
    assert not bank.rows[1].any()
    assert bank.free_rows == 1


def test_a_hold_is_released_once(own):
    """The second one's row was cleared while another request held it."""
    bank = own.adapters
    old = bank.rows[1].copy()
    hold = bank.hold("alpha")
    bank.release(hold)
    other = bank.hold("alpha")
    for wrong in (hold, Hold(other.row, other.entry)):
        with pytest.raises(SessionError, match=r"found one of row 1 \('alpha'\) that is, or is an"):
            bank.release(wrong)
    bank.remove("alpha")
    assert np.array_equal(bank.rows[1], old)
    bank.release(other)
    assert not bank.rows[1].any()
    assert bank.free_rows == bank.slots - 2


def test_the_backbone_is_held_like_an_adapter(session, own):
    hold = session.adapters.hold(None)
    assert (hold.row, hold.entry) == (0, None)
    session.adapters.release(hold)
    with pytest.raises(SessionError, match=r"row 0 \('backbone'\)"):
        session.adapters.release(hold)
    with pytest.raises(SessionError, match="no classifier of the bare backbone"):
        own.adapters.hold(None)


def test_rows_that_are_held_can_be_run(session):
    x, bank = images(3), session.adapters
    holds = [bank.hold(name) for name in ("beta", None, "gamma")]
    found = session.unchecked()(x, np.asarray([hold.row for hold in holds], np.int64))
    assert np.array_equal(found, session.run(x, ["beta", None, "gamma"]))
    for hold in holds:
        bank.release(hold)


def test_opened_with_fewer_rows_than_adapters(branches, workshop):
    with open_session(branches, device="cpu", threads=1, slots=3, partial=True) as opened:
        assert list(opened.adapters) == ["alpha", "rival"]
        assert opened.adapters.free_rows == 0
        x = images(2)
        truth = workshop.mixed_truth(["alpha", "rival"], x, 7)
        assert_parity(truth, opened.run(x, ["alpha", "rival"])[:, :7], "branches", "float32")
        opened.adapters.remove("alpha")
        packed = opened.adapters.pack("gamma", workshop.directory("gamma"), verified=True)
        assert packed.entry.row is None
        assert list(opened.adapters) == ["rival"]
        assert opened.adapters.put(packed).verified
    with pytest.raises(SessionError, match="too small"):
        open_session(branches, device="cpu", slots=1, partial=True)
    bundle = Bundle.open(branches)
    _, *others = bundle.manifest.adapters
    rest = replace(bundle, manifest=replace(bundle.manifest, adapters=tuple(others)))
    bank = AdapterBank(rest, 2, partial=True)  # of one in row 2
    assert (list(bank), bank["rival"].row) == (["rival"], 1)
    assert np.array_equal(bank.rows[1], bundle.bank()[2])


# --- backends with a copy of the bank -----------------------------------------------------------


@pytest.fixture
def told(own):
    """(row, its values) as a backend is told; the row must be free of leases by then."""
    calls, bank = [], own.adapters

    def row_changed(row):
        assert row not in leased(bank), "a row changed under a request"
        calls.append((row, bank.rows[row].copy()))

    bank.row_changed = row_changed
    return calls


def leased(bank):
    """Rows that names point to or requests hold; a row that is being written is neither."""
    named = {entry.row for entry in bank._entries.values()}
    return {row for row in bank._holds if row in named or row in bank._retired}


def test_a_backend_is_told_of_a_row_when_it_is_complete(own, told, workshop):
    bank = own.adapters
    entry = bank.add("rival", workshop.directory("rival"))
    packed = own.bundle.manifest.layout.pack("rival", workshop.adapters["rival"])
    assert [row for row, _ in told] == [entry.row]
    assert np.array_equal(told[0][1], packed)
    bank.remove("alpha")
    assert [row for row, _ in told] == [3, 1]
    assert not told[1][1].any()
    bank.add("gamma", workshop.directory("rival"), replace_existing=True)
    assert [row for row, _ in told] == [3, 1, 1, 2]
    assert np.array_equal(told[2][1], packed)
    assert not told[3][1].any()


def test_a_backend_is_told_of_a_freed_row_after_the_last_lease(own, told):
    bank = own.adapters
    with bank.lease(["alpha"]), bank.lease(["alpha", "gamma"]):
        bank.remove("alpha")
        assert not told
    assert [(row, values.any()) for row, values in told] == [(1, False)]


def test_nothing_is_told_where_nothing_changes(own, told, workshop):
    with own.adapters.lease(["alpha", "gamma"]):
        pass
    with pytest.raises(CapacityError):
        own.adapters.add("omega", workshop.adapters[TOO_WIDE])
    assert not told


def test_a_row_that_the_backend_does_not_take_stays_free(own, workshop):
    def refuse(row):
        raise DeviceError("the GPU is gone")

    own.adapters.row_changed = refuse
    with pytest.raises(DeviceError, match="gone"):
        own.adapters.add("rival", workshop.directory("rival"))
    assert list(own.adapters) == ["alpha", "gamma"]
    own.adapters.row_changed = lambda row: None
    assert own.adapters.add("rival", workshop.directory("rival")).row == 3


def test_a_backend_that_is_gone_fails_no_request_that_gives_its_row_back(own, workshop):
    """Nor does it leave a name that points to a row which is not its own."""

    def refuse(row):
        raise DeviceError("the GPU is gone")

    bank = own.adapters
    hold = bank.hold("alpha")
    bank.row_changed = refuse
    bank.remove("alpha")
    bank.release(hold)
    bank.remove("gamma")
    assert list(bank) == []
    assert bank.free_rows == 3
    with pytest.raises(SessionError, match="unknown adapter 'gamma'"):
        bank.hold("gamma")
    bank.row_changed = lambda row: None
    assert bank.add("rival", workshop.directory("rival")).row == 1


def test_of_two_threads_that_add_one_name_one_is_refused(own, workshop):
    """Both found the name free; the first to be complete has it."""
    bank, adapter, refused = own.adapters, workshop.adapters["rival"], []
    bank.remove("alpha")
    both = threading.Barrier(2)
    write = bank._write

    def written(row, values):
        both.wait(PATIENCE)
        write(row, values)

    def add():
        try:
            bank.add("one", adapter)
        except SessionError as error:
            refused.append(str(error))

    bank._write = written
    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del bank._write
    assert len(refused) == 1
    assert "'one' is loaded already" in refused[0]
    assert set(bank) == {"gamma", "one"}
    assert bank.free_rows == 1


def test_a_backend_is_told_of_one_row_at_a_time(own, workshop):
    """Two threads add; the first is held in the callback, the second must wait for it."""
    bank, inside, go = own.adapters, threading.Event(), threading.Event()
    running, most = [], []
    bank.remove("alpha")

    def row_changed(row):
        running.append(row)
        most.append(len(running))
        inside.set()
        go.wait(PATIENCE)
        running.remove(row)

    bank.row_changed = row_changed
    adapter = workshop.adapters["rival"]
    threads = [threading.Thread(target=bank.add, args=(name, adapter)) for name in ("a", "b")]
    threads[0].start()
    assert inside.wait(PATIENCE)
    threads[1].start()
    threads[1].join(0.2)
    assert most == [1]
    with bank.lease(["gamma"]):  # requests do not wait for a row to be copied
        pass
    go.set()
    for thread in threads:
        thread.join()
    assert most == [1, 1]
    assert set(bank) == {"gamma", "a", "b"}


@pytest.mark.parametrize("how", ["remove", "replace", "release", "lease"])
def test_requests_do_not_wait_for_a_row_that_is_zeroed(own, workshop, how):
    """The thread that clears alpha's row is held in the backend's callback."""
    bank, inside, go, timely = own.adapters, threading.Event(), threading.Event(), []
    hold = bank.hold("alpha")
    lease = bank.lease(["alpha", "gamma", "alpha"])
    lease.__enter__()

    def row_changed(row):
        if row == 1:
            inside.set()
            timely.append(go.wait(PATIENCE))

    def end():
        if how == "replace":
            bank.add("alpha", workshop.directory("rival"), replace_existing=True)
        else:
            bank.remove("alpha")

    last = {
        "release": lambda: bank.release(hold),
        "lease": lambda: lease.__exit__(None, None, None),
    }
    for other in last.keys() - {how}:
        last[other]()
    if how in last:
        end()
    bank.row_changed = row_changed
    clearing = threading.Thread(target=last.get(how, end))
    clearing.start()
    try:
        assert inside.wait(PATIENCE)
        used = bank.hold("gamma")
        with bank.lease(["gamma"]):
            assert bank.held("gamma")
            assert bank["gamma"].row == used.row == 2
        bank.release(used)
        # The row is nobody's yet: only those that were free before can be had.
        assert bank.free_rows == (0 if how == "replace" else 1)
    finally:
        go.set()
        clearing.join()
    assert timely == [True], "a request waited for the row until the backend gave up"
    assert not bank.rows[1].any()
    assert bank.free_rows == (1 if how == "replace" else 2)
    assert bank.add("one", workshop.directory("alpha")).row == 1


def test_a_row_that_cannot_be_zeroed_is_free_all_the_same(own, workshop):
    """The bug of a backend is the caller's to see; it takes no row with it."""

    def fail(row):
        raise RuntimeError("a bug")

    bank = own.adapters
    bank.row_changed = fail
    with pytest.raises(RuntimeError, match="a bug"):
        bank.remove("alpha")
    bank.row_changed = lambda row: None
    assert bank.add("rival", workshop.directory("rival")).row == 1


# --- threads ------------------------------------------------------------------------------------


def hammer(session, change, expected, rounds=60):
    """Change the bank while four threads ask; every answer must be in ``expected``, to the bit.

    Returns how often each of ``expected`` was seen.
    """
    x, seen, strange = images(3), [0] * len(expected), []
    done, lock = threading.Event(), threading.Lock()
    failures: list[BaseException] = []

    def ask():
        try:
            while not done.is_set():
                answer = session.run(x, "alpha")
                hits = [i for i, e in enumerate(expected) if np.array_equal(answer, e)]
                with lock:
                    if hits:
                        seen[hits[0]] += 1
                    else:
                        strange.append(answer)
        except BaseException as error:  # noqa: BLE001  (whatever it is, the test reports it)
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(rounds):
            change(turn)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures
    return seen, strange


def replace_alpha(session, workshop):
    """Turn by turn, another adapter under alpha's name; waits while all rows are leased."""
    adapters = [workshop.adapters["rival"], workshop.adapters["alpha"]]

    def change(turn):
        while True:
            try:
                session.adapters.add("alpha", adapters[turn % 2], replace_existing=True)
            except CapacityError:
                continue
            return

    return change


def test_while_threads_ask_every_answer_is_the_old_or_the_new_adapter_s(own, workshop):
    x = images(3)
    own.adapters.add("rival", workshop.directory("rival"))
    expected = [own.run(x, "alpha"), own.run(x, "rival")]
    own.adapters.remove("rival")
    seen, strange = hammer(own, replace_alpha(own, workshop), expected)
    assert not strange
    assert min(seen) > 0, "the threads never saw both adapters: the test proves nothing"


def test_the_threads_would_notice_a_row_that_is_changed_in_place(own, workshop):
    """The deliberate mistake: half of a row in use is overwritten."""
    x, rows = images(3), own.adapters.rows
    rival = Bundle.open(own.bundle.path).manifest.layout.pack("rival", workshop.adapters["rival"])
    alpha, half = rows[1].copy(), rows.shape[1] // 2
    own.adapters.add("rival", workshop.directory("rival"))
    expected = [own.run(x, "alpha"), own.run(x, "rival")]

    def change(turn):
        new = (rival, alpha)[turn % 2]
        rows[1, :half] = new[:half]
        threading.Event().wait(0.005)
        rows[1, half:] = new[half:]

    _, strange = hammer(own, change, expected)
    assert strange


# --- without torch ------------------------------------------------------------------------------


def test_adapters_are_added_with_numpy_and_safetensors_alone(small, workshop, tmp_path):
    x, names = images(3), ["rival", "gamma", "rival"]
    np.save(tmp_path / "x.npy", x)
    done = run_python(
        """
        import sys
        import numpy as np
        from hhdeploy.runtime import open_session

        bundle, rival, x, out = sys.argv[1:]
        with open_session(bundle, device="cpu", threads=1) as session:
            session.adapters.add("rival", rival)
            session.adapters.remove("alpha")
            np.save(out, session.run(np.load(x), ["rival", "gamma", "rival"]))
        """,
        small,
        workshop.directory("rival"),
        tmp_path / "x.npy",
        tmp_path / "logits.npy",
        blocked=HEAVY,
    )
    assert done.returncode == 0, done.stderr
    truth = workshop.mixed_truth(names, x, 7)
    assert_parity(truth, np.load(tmp_path / "logits.npy"), "branches", "float32")


def test_a_bundle_whose_rows_have_gaps_opens(small, tmp_path, workshop):
    from hhdeploy.bundle import remove_adapter
    from tests.workshop import copy_bundle

    copy = copy_bundle(small, tmp_path / "gap")
    remove_adapter(copy, "alpha")
    x = images(2)
    with open_session(copy, device="cpu", threads=1, slots=3) as opened:
        assert list(opened.adapters) == ["gamma"]
        truth = workshop.mixed_truth(["gamma"] * 2, x, 7)
        assert_parity(truth, opened.run(x, "gamma"), "branches", "float32")
        assert opened.adapters.add("rival", workshop.directory("rival")).row == 1


def test_a_bank_of_another_width_is_refused(small, tmp_path):
    from hhdeploy.errors import BundleError
    from hhdeploy.files.writing import sha256_of
    from tests.workshop import copy_bundle

    copy = copy_bundle(small, tmp_path / "narrow")
    bank = load_file(copy / "bank.safetensors")["adapter_bank"]
    save_file({"adapter_bank": bank[:, 1:].copy()}, copy / "bank.safetensors")
    manifest = (copy / "hhdeploy.json").read_text()
    old = Bundle.open(copy).manifest.files["bank.safetensors"]
    new = sha256_of(copy / "bank.safetensors")
    (copy / "hhdeploy.json").write_text(manifest.replace(old, new))
    with pytest.raises(
        BundleError, match=r"adapter_bank: expected float32 \[rows, \d+\], found float32 \["
    ):
        open_session(copy, device="cpu")
