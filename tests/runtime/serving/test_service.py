"""A message in, a message out: over real sessions on tiny bundles."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES
from hhdeploy.bundle import Bundle, remove_adapter
from hhdeploy.errors import HhdeployError, PlanError
from hhdeploy.parity import bound, compare
from hhdeploy.runtime import open_session
from hhdeploy.runtime.serving.endpoint import LocalEndpoint
from hhdeploy.runtime.serving.errors import (
    BusyError,
    FailedError,
    NotFoundError,
    RequestError,
    StoppingError,
    TimedOutError,
    TooLargeError,
)
from hhdeploy.runtime.serving.messages import (
    BYTES,
    FP32,
    Deadline,
    InferRequest,
    Tensor,
    Wanted,
    bytes_array,
)
from hhdeploy.runtime.serving.service import Service
from hhdeploy.runtime.serving.settings import ServeSettings
from tests.runtime.serving.fleets import (
    PATIENCE,
    check_at_rest,
    files_of,
    make_adapter,
    put_adapter,
    settle,
    until,
)
from tests.support import assert_parity, images
from tests.workshop import AGE, ROOT, TAGS, copy_bundle, transform_of


def request_of(x, *names, model="tiny", outputs=("logits",), encoded=False, **parameters):
    """FP32 images, or a list of encoded ones; ``names``: the input adapters."""
    array = bytes_array(x) if encoded else x
    inputs = {"images": Tensor("images", BYTES if encoded else FP32, array)}
    if names:
        named = bytes_array([name.encode() for name in names])
        inputs["adapters"] = Tensor("adapters", BYTES, named)
    wanted = tuple(o if isinstance(o, Wanted) else Wanted(o) for o in outputs)
    return InferRequest(model, "", "id", inputs, wanted, parameters)


def picture(seed=0, size=(41, 37)):
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def truth_of(small):
    """Logits of an adapter by a session of its own, which nothing else touches."""
    with open_session(small, device="cpu", threads=1) as session:

        def truth(adapter, x):
            session.adapters.add("it", adapter, replace_existing=True)
            return session.run(x, "it")

        yield truth


class Gated:
    """A session's runs that wait while the gate is closed."""

    def __init__(self, session):
        self._run = session.unchecked()
        session.unchecked = lambda: self.run
        self.open = threading.Event()
        self.open.set()
        self.begun = 0
        self.failure = None

    def run(self, x, rows):
        self.begun += 1
        assert self.open.wait(PATIENCE)
        if self.failure is not None:
            raise self.failure
        return self._run(x, rows)


@pytest.fixture
def play(small, workshop, tmp_path):
    """Run a scene with a started service; at its end it drains, and no row may be held."""

    def run(scene, *, bundle=small, slots=4, names=(), **settings):
        fleet = tmp_path / "fleet"
        fleet.mkdir(exist_ok=True)
        for seed, name in enumerate(names):
            put_adapter(make_adapter(workshop, seed), fleet, name)

        async def body():
            session = open_session(bundle, device="cpu", threads=1, slots=slots, partial=True)
            gate = Gated(session)
            options = {"bundle": Path("tiny"), "max_batch": 8, "adapters_dir": fleet, **settings}
            service = Service(session, ServeSettings(**options))
            service.gate, service.bank = gate, session._adapters
            try:
                await service.start()
                assert service.ready
                await asyncio.wait_for(scene(service), PATIENCE)
            finally:
                gate.open.set()
                await asyncio.wait_for(service.stop(), PATIENCE)
            assert not service.ready
            assert (service.now().queued, service.now().pending) == (0, 0)
            if service.bank is not None:
                check_at_rest(service.bank)

        asyncio.run(body())

    return run


@pytest.fixture
def closed():
    """Close the gate and wait until a batch is at it."""

    async def close(service, x):
        service.gate.open.clear()
        begun = service.gate.begun
        first = asyncio.create_task(service.infer(request_of(x, adapter="alpha")))
        await until(lambda: service.gate.begun > begun)
        return first

    return close


# --- answers ------------------------------------------------------------------------------------


def test_each_image_is_answered_by_its_adapter(play, branches, workshop):
    x = images(5)
    names = ["beta", "backbone", "alpha", "gamma", "headless"]

    async def scene(s):
        response = await s.infer(request_of(x, *names))
        assert (response.model, response.id) == ("tiny", "id")
        (logits,) = response.outputs
        assert (logits.name, logits.datatype) == ("logits", FP32)
        truth = workshop.mixed_truth([None if n == "backbone" else n for n in names], x)
        assert_parity(truth, logits.array, "branches", "float32")
        for index, name in enumerate(names):  # by parameter, and by the model's name
            one = x[index : index + 1]
            asked = [request_of(one, adapter=name)]
            asked += [request_of(one, model=name)] if name != "backbone" else [request_of(one)]
            width = np.isfinite(truth[index]).sum()
            for each in asked:
                found = (await s.infer(each)).outputs[0].array
                assert_parity(truth[index, :width], found[0], "branches", "float32")

    play(scene, bundle=branches, slots=None)


def test_a_folder_called_as_the_bare_model_is_not_it(play, branches):
    """By the model's name its adapter is asked for; the bare model's answer was given."""

    async def scene(s):
        with pytest.raises(HhdeployError, match="the adapter name 'backbone' is reserved"):
            await s.infer(request_of(images(1), model="backbone"))
        await s.infer(request_of(images(1), adapter="backbone"))

    play(scene, bundle=branches, slots=None, names=["backbone"])


def test_requests_of_many_tasks_go_in_one_batch(play, branches, workshop, closed):
    x = images(4)
    names = ["alpha", "beta", "gamma", "headless"]

    async def scene(s):
        first = await closed(s, x[:1])
        runs = s.now().runs
        tasks = [
            asyncio.create_task(s.infer(request_of(x[i : i + 1], adapter=name)))
            for i, name in enumerate(names)
        ]
        await until(lambda: s.now().pending == 4)
        s.gate.open.set()
        for i, (name, task) in enumerate(zip(names, tasks, strict=True)):
            found = (await task).outputs[0].array
            assert_parity(workshop.truth(name, x[i : i + 1]), found, "branches", "float32")
        await first
        assert s.now().runs == runs + 2

    play(scene, bundle=branches, slots=None)


def test_the_run_at_the_start_is_not_counted(play):
    async def scene(s):
        assert s.now().runs == 0
        await s.infer(request_of(images(1), adapter="alpha"))
        assert (s.now().runs, s.metrics.images) == (1, 1)

    play(scene)


def test_one_image_and_several_adapters(play, branches, workshop):
    x = images(1)

    async def scene(s):
        (logits,) = (await s.infer(request_of(x, "alpha", "gamma", "rival"))).outputs
        truth = workshop.mixed_truth(["alpha", "gamma", "rival"], np.repeat(x, 3, 0), 7)
        assert_parity(truth, logits.array, "branches", "float32")

    play(scene, bundle=branches, slots=None)


def test_probabilities_labels_and_classification(play, branches, workshop):
    x = images(2)

    async def scene(s):
        request = request_of(x, "alpha", "gamma", outputs=("labels", "probabilities"))
        labels, shares = (await s.infer(request)).outputs
        tops = (Wanted("probabilities", top=2), Wanted("logits", top=5))
        top, best = (await s.infer(request_of(x, "alpha", "gamma", outputs=tops))).outputs
        truth = workshop.mixed_truth(["alpha", "gamma"], x, 7)
        assert np.array_equal(shares.array[1, 3:], np.zeros(4))
        expected = np.exp(truth) / np.exp(truth).sum(1, keepdims=True)
        assert_parity(expected[:, :3], shares.array[:, :3], "branches", "float32")
        order = np.argsort(-truth, axis=1)
        assert [b.decode() for b in labels.array] == [f"class {row[0]}" for row in order]
        assert top.array.shape == (2, 2)
        assert best.array.shape == (2, 5)
        for found, counts in ((top, (2, 2)), (best, (5, 3))):  # gamma has three classes
            for row, ranks, count in zip(found.array, order, counts, strict=True):
                indices = [int(text.split(b":")[1]) for text in row if text]
                assert indices == ranks[:count].tolist()
                assert row[0].split(b":")[2] == f"class {ranks[0]}".encode()

    play(scene, bundle=branches, slots=None)


def test_labels_and_values_are_answered_as_what_they_are(play, heads, workshop):
    x = images(3)

    async def scene(s):
        named = ("alpha", TAGS, AGE)
        truth = workshop.mixed_truth(named, x, 7)
        shares, labels = (
            await s.infer(request_of(x[:2], *named[:2], outputs=("probabilities", "labels")))
        ).outputs
        expected = 1 / (1 + np.exp(-truth[1, :3]))
        assert_parity(expected, shares.array[1, :3].astype(float), "branches", "float32")
        assert np.array_equal(shares.array[1, 3:], np.zeros(4))
        order = np.argsort(-truth[1, :3])
        said = [f"class {i}" for i in order if truth[1, i] >= 0]
        assert labels.array[1].decode() == ";".join(said)
        wanted = (Wanted("answers"), Wanted("logits", top=1))
        answers, best = (await s.infer(request_of(x, *named, outputs=wanted))).outputs
        found = [json.loads(text) for text in answers.array]
        kinds = [CLASSES, LABELS, VALUES]
        assert [one["problem_type"] for one in found] == kinds
        assert [len(one["answers"]) for one in found] == [7, 3, 1]
        (age,) = found[2]["answers"]
        assert age["score"] == pytest.approx(truth[2, 0], rel=1e-3)
        assert (age["label"], age["positive"]) == ("class 0", False)
        assert [a["positive"] for a in found[1]["answers"]] == [
            i in said for i in (a["label"] for a in found[1]["answers"])
        ]
        assert float(best.array[2, 0].split(b":")[0]) == pytest.approx(truth[2, 0], rel=1e-3)
        (few,) = (await s.infer(request_of(x, *named, outputs=(Wanted("answers", top=2),)))).outputs
        counts = [len(json.loads(text)["answers"]) for text in few.array]
        assert counts == [2, max(2, len(said)), 1]
        for output in ("probabilities", "labels"):
            with pytest.raises(RequestError, match=f"output {output}: adapter 'age' answers with"):
                await s.infer(request_of(x[:1], AGE, outputs=(output,)))

    play(scene, bundle=heads, slots=None)


@pytest.mark.parametrize("names", [("alpha", TAGS, AGE), (AGE,)])
def test_metadata_list_what_is_given(play, heads, workshop, tmp_path, names):
    """Of adapters without a row as well, which are known since they were read last."""
    bundle = copy_bundle(heads, tmp_path / "copy")
    for name in {a.name for a in Bundle.open(bundle).manifest.adapters} - {*names}:
        remove_adapter(bundle, name)
    (tmp_path / "fleet").mkdir()
    put_adapter(workshop.adapters[AGE], tmp_path / "fleet", "size")
    every = ["logits", "probabilities", "labels", "answers"]
    values = ["logits", "answers"]

    async def scene(s):
        endpoint, x = LocalEndpoint(s), images(1)
        rows = {status.name: status.entry for status in s.fleet.statuses()}
        assert list(rows.values()).count(None) == len(names), "one row, for the first"
        for model, classes in {"alpha": 7, TAGS: 3, AGE: 1, "size": 1, "tiny": -1}.items():
            if model not in (*names, "size", "tiny"):
                continue
            told = (await endpoint.model_metadata(model))["outputs"]
            outputs = [each["name"] for each in told]
            one = model in (AGE, "size") or (model == "tiny" and names == (AGE,))
            assert outputs == (values if one else every)
            assert told[0]["shape"] == [-1, classes]
            asked = request_of(x, model=model, outputs=outputs)
            if model != "tiny":
                assert len((await s.infer(asked)).outputs) == len(outputs)
        sizes = {a["name"]: a["classes"] for a in (await endpoint.status())["adapters"]}
        assert sizes["size"] == 1

    play(scene, bundle=bundle, slots=2)


def test_pictures_are_prepared_as_each_adapter_wants_them(play, branches, workshop):
    """Alpha and gamma differ in mean, deviation and crop."""
    content = picture()
    decoded = Image.open(io.BytesIO(content)).convert("RGB")

    async def scene(s):
        request = request_of([content], "alpha", "gamma", encoded=True)
        (logits,) = (await s.infer(request)).outputs
        for row, name in zip(logits.array, ("alpha", "gamma"), strict=True):
            way = transform_of(workshop.backbone.facts, workshop.adapters[name])
            truth = workshop.truth(name, way(decoded)[None])[0]
            assert_parity(truth, row[: truth.size], "branches", "float32")

    play(scene, bundle=branches, slots=None)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("`adapters_dir`", {"adapters_dir": ROOT}),
        ("`pinned`", {"pinned": frozenset({"alpha"})}),
        ("`allow_adapter_loading`", {"allow_adapter_loading": True, "token_file": ROOT / "token"}),
    ],
)
def test_what_a_folded_bundle_cannot_do_is_refused(folded, name, chosen):
    with (
        open_session(folded, device="cpu", threads=1) as session,
        pytest.raises(PlanError, match=f"{name}: a folded bundle holds one adapter"),
    ):
        Service(session, ServeSettings(Path("tiny"), **chosen))


def test_a_folded_bundle(play, folded, workshop):
    x = images(2)

    async def scene(s):
        for request in (
            request_of(x),
            request_of(x, adapter="alpha"),
            request_of(x, model="alpha"),
            request_of(x, "alpha", "alpha"),
        ):
            (logits,) = (await s.infer(request)).outputs
            assert_parity(workshop.truth("alpha", x), logits.array, "folded", "float32")
        for request in (request_of(x, adapter="gamma"), request_of(x, model="gamma")):
            with pytest.raises(NotFoundError, match="gamma"):
                await s.infer(request)
        assert s.now().rows == 0
        assert "gamma" not in s.metrics.tallies  # a name that was refused is not kept
        assert sum(s.metrics.failures.values()) == 2

    play(scene, bundle=folded, slots=None, adapters_dir=None)


def test_an_adapter_on_disk_answers_by_its_model_name(play, truth_of, workshop):
    x = images(2)

    async def scene(s):
        assert s.alias("a") == "a"
        assert s.fleet.status("a").state == "on disk"
        (logits,) = (await s.infer(request_of(x, model="a"))).outputs
        assert_parity(truth_of(make_adapter(workshop, 0), x), logits.array, "branches", "float32")
        assert s.fleet.status("a").state == "ready"
        await s.fleet.unload("a")
        with pytest.raises(NotFoundError, match="unloaded"):
            await s.infer(request_of(x, model="a"))

    play(scene, names=("a",))


# --- refusals -----------------------------------------------------------------------------------


def test_requests_that_are_wrong(play):
    x = images(2)
    bad = InferRequest("tiny", "", "", {}, (), {})
    wrong = [
        (bad, RequestError, "expected 'images'"),
        (request_of(x[:, :1], adapter="alpha"), RequestError, r"expected FP32 \[n, 3, 32, 32\]"),
        (request_of(x[:0], adapter="alpha"), RequestError, "at least one image"),
        (request_of(images(9), adapter="alpha"), RequestError, "9 images .* at most 8"),
        (request_of(x[:1], *["alpha"] * 9), RequestError, "9 images .* at most 8"),
        (request_of(x), RequestError, "no classifier of the bare backbone"),
        (request_of(x, "alpha", "gamma", "alpha"), RequestError, "found 3 for 2 images"),
        (request_of(x, "alpha", "gamma", adapter="alpha"), RequestError, "named twice"),
        (request_of(x, adapter="alpha", model="gamma"), RequestError, "named twice"),
        (request_of(x, adapter=7), RequestError, "parameter adapter"),
        (request_of(x, adapter="omega"), NotFoundError, "omega"),
        (request_of(x, model="omega"), NotFoundError, "omega"),
        (request_of(x, adapter="alpha", priority=-1), RequestError, "priority"),
        (request_of(x, adapter="alpha", timeout=-1), RequestError, "timeout"),
        (request_of(x, adapter="alpha", outputs=("scores",)), RequestError, "unknown output"),
        (request_of([b"no picture"], adapter="alpha", encoded=True), RequestError, "image 0"),
        (request_of([picture()] * 2, "a", "omega", encoded=True), NotFoundError, "omega"),
    ]

    async def scene(s):
        for request, kind, message in wrong:
            with pytest.raises(kind, match=message):
                await s.infer(request)
        with pytest.raises(NotFoundError, match="unknown version"):
            s.alias("tiny", "2")
        assert s.metrics.failures["OTHER"] == len(wrong)
        await s.infer(request_of(x, adapter="alpha"))
        assert (s.metrics.success, s.metrics.images) == (1, 2)

    play(scene, names=("a",))


def test_a_picture_beyond_the_limit(play):
    async def scene(s):
        with pytest.raises(TooLargeError):
            await s.infer(request_of([picture(size=(40, 30))], adapter="alpha", encoded=True))

    play(scene, image_pixels=1199)


def test_millions_of_adapter_names_are_refused_before_they_are_looked_at(play):
    async def scene(s):
        names = np.full(5_000_000, b"", object)
        inputs = {
            "images": Tensor("images", FP32, images(1)),
            "adapters": Tensor("adapters", BYTES, names),
        }
        s.fleet.status = None  # looking one up would fail
        with pytest.raises(RequestError, match="5000000 images in one request"):
            await s.infer(InferRequest("tiny", "", "", inputs))
        del s.fleet.status

    play(scene)


def test_an_adapter_may_not_have_the_bundle_s_name(play):
    with pytest.raises(PlanError, match="Choose another `model_name`"):
        play(None, model_name="alpha")


def test_a_full_queue_counts_pictures_that_are_still_decoded(play, closed):
    async def scene(s):
        first = await closed(s, images(1))
        waiting = [
            asyncio.create_task(s.infer(request_of(images(2), adapter="alpha"))),
            asyncio.create_task(
                s.infer(request_of([picture()] * 2, adapter="alpha", encoded=True))
            ),
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (s.now().queued, s.now().pending) == (4, 2)
        with pytest.raises(BusyError, match="4 images are waiting, at most 4 may"):
            await s.infer(request_of(images(1), adapter="alpha"))
        assert s.metrics.failures["REJECTED"] == 1
        s.gate.open.set()
        await asyncio.gather(first, *waiting)

    play(scene, max_queue=4)


def test_a_session_that_fails(play):
    async def scene(s):
        s.gate.failure = RuntimeError("out of memory")
        with pytest.raises(FailedError, match="out of memory"):
            await s.infer(request_of(images(1), adapter="alpha"))
        s.gate.failure = None
        await s.infer(request_of(images(1), adapter="alpha"))
        assert s.metrics.failures["BACKEND"] == 1

    play(scene)


# --- deadlines, clients that leave --------------------------------------------------------------


def test_a_request_s_own_deadline_and_the_server_s(play, closed):
    async def scene(s):
        await closed(s, images(1))
        with pytest.raises(TimedOutError, match=r"not answered within 0\.02 s"):
            await s.infer(request_of(images(1), adapter="alpha", timeout=20_000))
        assert s.now().queued == 0
        with pytest.raises(TimedOutError, match=r"within 0\.5 s"), Deadline(0.5):
            await s.infer(request_of(images(1), adapter="alpha", timeout=60_000_000))
        assert s.now().queued == 0
        assert s.metrics.failures["CANCELED"] == 2
        s.gate.open.set()

    play(scene)


def test_the_row_of_a_request_that_left_is_not_written_while_its_batch_runs(play, closed, workshop):
    """The bank has one row: what comes next must wait for it."""

    async def scene(s):
        first = await closed(s, images(1))
        first.cancel()
        await asyncio.wait([first])
        before = s.bank.rows.copy()
        later = asyncio.create_task(s.infer(request_of(images(1), adapter="a")))
        await until(lambda: "alpha" not in s.bank)
        await asyncio.sleep(0.05)
        assert np.array_equal(s.bank.rows, before)
        s.gate.open.set()
        await later
        assert np.array_equal(s.bank.rows[1], s.bank.pack("a", make_adapter(workshop, 0)).row)

    play(scene, slots=2, names=("a",))


@pytest.mark.parametrize("kind", ["in a row", "on disk", "picture", "several"])
def test_clients_that_leave_at_any_moment_leave_nothing_behind(play, kind):
    def make():
        if kind == "picture":
            return request_of([picture()] * 3, "alpha", "a", "alpha", encoded=True)
        if kind == "several":
            return request_of(images(2), "a", "b")
        return request_of(images(1), adapter="a" if kind == "on disk" else "alpha")

    async def scene(s):
        left = answered = 0
        for turns in range(160):
            if kind == "on disk":  # again: others take both rows
                for hold in (await s.fleet.rows.hold(["alpha", "b"])).values():
                    s.fleet.rows.release(hold)
            task = asyncio.create_task(s.infer(make()))
            await settle(turns % 40)
            if turns >= 40:  # also while a thread works
                await asyncio.sleep(0.0001 * (turns % 23))
            task.cancel()
            await asyncio.wait([task])
            if task.cancelled():
                left += 1
            else:
                assert len(task.result().outputs) == 1
                answered += 1
        assert left > 0
        assert s.now().queued == 0
        # One that left before its first turn was never seen.
        assert s.metrics.failures["CANCELED"] <= left
        assert answered <= s.metrics.success <= answered + left

    play(scene, names=("a", "b"), slots=3)


# --- the end ------------------------------------------------------------------------------------


def test_stopping_answers_what_was_taken_and_takes_nothing_new(play, closed, truth_of, workshop):
    """In its batch, in the queue, being decoded, waiting for its adapter."""
    x = images(1)

    async def scene(s):
        first = await closed(s, x)
        begun = [
            asyncio.create_task(s.infer(request))
            for request in (
                request_of(x, adapter="gamma"),
                request_of([picture()], adapter="gamma", encoded=True),
                request_of(x, adapter="a"),
            )
        ]
        await settle(3)
        stopping = asyncio.create_task(s.stop())
        await settle(3)
        assert not s.ready
        with pytest.raises(StoppingError):
            await s.infer(request_of(x, adapter="alpha"))
        assert s.metrics.failures["REJECTED"] == 1
        s.gate.open.set()
        await asyncio.gather(first, *begun)
        await stopping
        found = begun[2].result().outputs[0].array
        assert_parity(truth_of(make_adapter(workshop, 0), x), found, "branches", "float32")

    play(scene, names=("a",))


# --- everything at once -------------------------------------------------------------------------


POPULAR = np.asarray([0.3, 0.2, 0.15, 0.1, 0.1, 0.1, 0.05])


class Versions:
    """What each adapter may answer now, and what each request under way may be answered with."""

    def __init__(self):
        self.now = {}
        self.open = []

    def may_be(self, name, version):
        self.now.setdefault(name, set()).add(version)
        for asked, allowed in self.open:
            if asked == name:
                allowed.add(version)

    def is_only(self, name, version):
        self.now[name] = {version}


def check_excuse(error):
    """Unloaded meanwhile, or between the two moves that replace a folder."""
    assert isinstance(error, NotFoundError) or "is not a directory" in str(error), error


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_chaos(play, truth_of, workshop, tmp_path, seed):
    """Few rows, many adapters; requests, departures, uploads, unloading, files that change.

    Every answer is that of exactly one version that its adapter had meanwhile, and at the end no
    row is held or lost.
    """
    random = np.random.default_rng(seed)
    pool, x = 12, images(4)
    adapters = [make_adapter(workshop, number) for number in range(pool)]
    truths = np.stack([truth_of(adapter, x) for adapter in adapters])
    uploads = [files_of(adapter, tmp_path) for adapter in adapters]
    names = [f"n{i}" for i in range(7)]
    outcomes = {"answered": 0, "left": 0, "unloaded": 0, "late": 0, "busy": 0}
    versions = Versions()

    def check(name, index, row, allowed):
        fits = [
            version
            for version in range(pool)
            if not compare(truths[version, index][None], row[None]).failures(
                bound("branches", "float32")
            )
        ]
        assert len(fits) == 1, f"{name}: a mixture, or nobody's answer"
        assert fits[0] in allowed, f"{name}: version {fits[0]}, allowed were {allowed}"

    async def ask(s):
        count = int(random.integers(1, 4))
        asked = [names[int(n)] for n in random.choice(len(names), count, p=POPULAR)]
        allowed = [set(versions.now[name]) for name in asked]
        mine = list(zip(asked, allowed, strict=True))
        versions.open += mine
        options = {"priority": int(random.integers(3))}
        if random.random() < 0.1:
            options["timeout"] = int(random.integers(1, 20_000))
        task = asyncio.create_task(s.infer(request_of(x[:count], *asked, **options)))
        if random.random() < 0.15:
            await asyncio.sleep(random.random() * 0.01)
            task.cancel()
        try:
            (logits,) = (await task).outputs
            for index, (name, may) in enumerate(mine):
                check(name, index, logits.array[index], may)
            outcomes["answered"] += 1
        except asyncio.CancelledError:
            outcomes["left"] += 1
        except NotFoundError:
            outcomes["unloaded"] += 1
        except TimedOutError:
            outcomes["late"] += 1
        except BusyError:
            outcomes["busy"] += 1
        except RequestError as error:
            check_excuse(error)
        finally:
            versions.open = [pair for pair in versions.open if all(pair is not m for m in mine)]

    async def client(s):
        for _ in range(60):
            await ask(s)

    async def change(s, mine):
        """Of its own names: two that change one adapter at the same time know nothing."""
        for _ in range(40):
            name = mine[int(random.integers(len(mine)))]
            version = int(random.integers(pool))
            versions.may_be(name, version)
            try:
                if random.random() < 0.5:
                    await s.fleet.upload(name, *uploads[version])
                else:
                    put_adapter(adapters[version], tmp_path / "fleet", name)
                    await s.fleet.load(name)
            except HhdeployError as error:  # on disk it is the new one
                check_excuse(error)
            versions.is_only(name, version)
            await asyncio.sleep(random.random() * 0.01)

    async def operator(s):
        for _ in range(40):
            name = names[int(random.integers(len(names)))]
            for step in (s.fleet.unload, s.fleet.load):
                try:
                    await step(name)
                except HhdeployError as error:
                    check_excuse(error)
                await asyncio.sleep(random.random() * 0.005)

    async def scene(s):
        for number, name in enumerate(names):
            versions.is_only(name, number)
        watching = asyncio.create_task(s.fleet.watch(0.02))
        clients = [client(s) for _ in range(8)]
        changes = [change(s, names[:3]), change(s, names[3:])]
        await asyncio.gather(*clients, *changes, operator(s))
        watching.cancel()
        await asyncio.wait([watching])
        assert outcomes["answered"] > 50, outcomes
        assert outcomes["left"] > 0, outcomes
        assert s.now().evictions > 0

    for number, name in enumerate(names):
        (tmp_path / "fleet").mkdir(exist_ok=True)
        put_adapter(adapters[number], tmp_path / "fleet", name)
    play(scene, slots=5, pinned=frozenset({"n0"}), max_queue=16)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_get_no_label(play, value):
    x = images(3)
    x[1, 2, 5, 7] = value

    async def scene(s):
        for name, top in (("labels", 0), ("probabilities", 0), ("logits", 2)):
            asked = request_of(x, adapter="alpha", outputs=[Wanted(name, top)])
            with pytest.raises(RequestError, match="image 1 holds NaN or infinities"):
                await s.infer(asked)
        found = await s.infer(request_of(x, adapter="alpha", outputs=()))
        assert [output.name for output in found.outputs] == ["logits"]
        assert np.isfinite(found.outputs[0].array[[0, 2]]).all()
        await s.infer(request_of(x[[0, 2]], adapter="alpha", outputs=[Wanted("labels")]))

    play(scene)
