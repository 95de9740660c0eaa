"""What the server does when there is too much, when clients leave, when its engine dies."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.load import DEMO_FOLDER
from llamac.runtime.request import Request
from llamac.runtime.serve.admission import Limits, Pool
from llamac.runtime.serve.engine_client import EngineClient
from llamac.runtime.serve.errors import ApiError
from llamac.runtime.serve.messages import EngineSetup
from llamac.runtime.serve.metrics import Metrics
from serving import Served, events_of, serving

PROMPT = "Once upon a time"
LONG = {"prompt": PROMPT, "max_tokens": 500, "ignore_eos": True}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults") / "demo"
    return export_bundle(open_checkpoint(DEMO_FOLDER), out, batch_size=2).folder


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    with serving(bundle, "--max-queue", "4", "--max-queued-tokens", "900") as server:
        yield server


def until_idle(served: Served) -> None:
    deadline_s = time.monotonic() + 20
    while served.gauge("num_requests_running") + served.gauge("num_requests_waiting"):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def num_aborted(served: Served) -> float:
    found = re.search(r'finished_reason="abort"} (\S+)', served.ask("/metrics")[1])
    return float(found[1]) if found else 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(served: Served, stream: bool):
    before = num_aborted(served)
    with served.opened("/v1/completions", {**LONG, "n": 2, "stream": True}) as response:
        next(events_of(response))  # both slots are taken
        with served.sent("/v1/completions", {**LONG, "n": 2, "stream": stream}):
            while served.gauge("num_requests_waiting") < 2:
                time.sleep(0.01)
    until_idle(served)
    with served.sent("/v1/completions", {**LONG, "n": 2, "stream": stream}):
        while served.gauge("num_requests_running") < 2:
            time.sleep(0.01)
    until_idle(served)
    assert num_aborted(served) == before + 6


def test_what_is_too_much_is_refused(served: Served):
    until_idle(served)
    with served.opened("/v1/completions", {**LONG, "n": 2, "stream": True}) as response:
        next(events_of(response))
        assert served.ask("/v1/completions", {**LONG, "n": 7})[0] == 400  # never fits
        status, answer, headers = served.ask("/v1/completions", {**LONG, "n": 5})
        assert (status, headers["Retry-After"]) == (429, "1")
        assert answer["error"]["type"] == "rate_limit_error"
        long = {"prompt": "dog " * 200, "n": 4, "max_tokens": 1}
        assert served.ask("/v1/completions", long)[0] == 429
        rejected = served.ask("/metrics")[1]
        assert 'admission_rejections_total{reason="queue_full"} 1.0' in rejected
        assert 'admission_rejections_total{reason="queued_tokens"} 1.0' in rejected
    until_idle(served)


def test_a_hundred_clients_are_served_or_told_to_come_back(bundle: Path):
    body = {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True}
    with serving(bundle, "--max-queue", "64") as served:
        with ThreadPoolExecutor(100) as pool:
            jobs = [pool.submit(served.ask, "/v1/completions", body) for _ in range(200)]
            answers = [job.result() for job in jobs]
        statuses = Counter(status for status, _, _ in answers)
        assert statuses.keys() <= {200, 429}
        assert statuses[200] >= 66
        assert all(a["usage"]["completion_tokens"] == 20 for s, a, _ in answers if s == 200)
        until_idle(served)


def test_a_request_out_of_time_is_told(bundle: Path):
    with serving(bundle, "--request-timeout", "0.05") as served:
        status, answer, _ = served.ask("/v1/completions", {**LONG, "n": 4})
        assert (status, answer["error"]["code"]) == (504, "timeout")
        *_, last = served.stream("/v1/completions", {**LONG, "n": 4})
        assert last["error"]["code"] == "timeout"  # and no [DONE]
        until_idle(served)


def test_a_killed_engine_is_told_and_comes_back(bundle: Path):
    with serving(bundle) as served:
        with served.opened("/v1/completions", {**LONG, "n": 2, "stream": True}) as response:
            events = events_of(response)
            next(events)
            first = served.engine_id
            os.kill(first, signal.SIGKILL)
            *_, last = events
            assert last["error"]["code"] == "engine_died"
        status, answer, headers = served.ask("/health")
        assert (status, answer["status"]) in [(503, "dead"), (503, "loading")]
        assert served.ask("/v1/completions", LONG)[0] == 503
        served.until_status(200)
        assert served.engine_id != first
        assert served.ask("/v1/completions", {**LONG, "max_tokens": 3})[0] == 200


def test_what_runs_ends_whole_after_sigterm(bundle: Path):
    with serving(bundle) as served:
        with served.opened("/v1/completions", {**LONG, "stream": True}) as response:
            events = events_of(response)
            next(events)
            served.process.send_signal(signal.SIGTERM)
            *_, closing, last = events
        assert (closing["choices"][0]["finish_reason"], last) == ("length", "[DONE]")
        assert served.process.wait(30) == 0


def test_what_takes_too_long_after_sigterm_is_told(bundle: Path):
    with serving(bundle, "--shutdown-timeout", "0.3") as served:
        with served.opened("/v1/completions", {**LONG, "n": 40, "stream": True}) as response:
            events = events_of(response)
            next(events)
            served.process.send_signal(signal.SIGTERM)
            *_, last = events
        assert "shutting down" in last["error"]["message"]
        assert served.process.wait(30) == 0


def test_two_replicas_share_the_work_and_survive_one(bundle: Path):
    body = {"prompt": PROMPT, "max_tokens": 40, "seed": 3, "ignore_eos": True}
    with serving(bundle, "--replicas", "2") as served:
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(served.ask, "/v1/completions", body) for _ in range(16)]
            texts = {job.result()[1]["choices"][0]["text"] for job in jobs}
            assert len(texts) == 1
            jobs = [pool.submit(served.ask, "/v1/completions", body) for _ in range(16)]
            os.kill(served.engine_id, signal.SIGKILL)
            answers = [job.result() for job in jobs]
        assert {status for status, _, _ in answers} <= {200, 503}
        assert {a["choices"][0]["text"] for s, a, _ in answers if s == 200} == texts
        served.until_status(200)


def engine_setup(bundle: Path) -> EngineSetup:
    return EngineSetup(
        source=str(bundle),
        options={"threads": 1},
        generation_config=False,
        exact=False,
        default_batch=1,
        environment={},
    )


@pytest.mark.parametrize(
    ("stable_s", "waits"), [(0.0, ["0.01"] * 3), (60.0, ["0.01", "0.02", "0.04"])]
)
def test_an_engine_that_served_a_while_is_started_again_at_once(
    bundle: Path, stable_s: float, waits: list[str], caplog: pytest.LogCaptureFixture
):
    """A death a minute used to double the wait each time, up to half a minute."""

    async def kill_often() -> None:
        engine = EngineClient(engine_setup(bundle), first_wait_s=0.01, stable_s=stable_s)
        await engine.start()
        try:
            for _ in waits:
                while engine.state != "ready":
                    await asyncio.sleep(0.01)
                assert engine.process_id is not None
                os.kill(engine.process_id, signal.SIGKILL)
                while engine.state == "ready":
                    await asyncio.sleep(0.01)
        finally:
            await engine.stop()

    asyncio.run(kill_often())
    assert re.findall(r"another starts in (\S+) s", caplog.text) == waits


def test_a_stream_that_nobody_reads_is_ended(bundle: Path):
    setup = engine_setup(bundle)

    async def read_late() -> None:
        engine = EngineClient(setup)
        await engine.start()
        pool = Pool([engine], Limits(max_unread=8), Metrics())
        try:
            with pool.open([Request(prompt_ids=(1,), max_new_tokens=400, eos_ids=())]) as job:
                while engine.load:
                    await asyncio.sleep(0.01)
                with pytest.raises(ApiError, match="the stream was not read"):
                    async for _ in job.events():
                        pass
        finally:
            await engine.stop()

    asyncio.run(read_late())
