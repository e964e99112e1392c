"""Streams: sources without an end on engines that have them, and how often the KMS is asked over many small bundles.

Each stream lasts STREAM_S seconds. BEAM_ENVELOPE_STREAM_S=300 makes them last longer; the report then shows how calls
and bundles grew.
"""

import base64
import contextlib
import json
import os
import threading
import time
from collections import Counter
from typing import NamedTuple

import pytest

from beam_envelope import open_records, open_shard
from beam_envelope.testing import find_plaintext
from tests.engines.branches import CANARY, CONTEXT, KEY
from tests.engines.leaks import LeakWatch
from tests.engines.streams import SOURCES, WINDOW_S, text_of

STREAM_S = float(os.environ.get("BEAM_ENVELOPE_STREAM_S", "15"))
INTERVAL_S, CHECKPOINT_MS = (0.05, 2000) if STREAM_S <= 60 else (0.2, 10_000)
ELEMENTS = int(STREAM_S / INTERVAL_S)
DATA_KEY_S = 300  # the shortest life that DataKeyPolicy gives a data key
ENGINES = ["Prism", "Flink cluster"]


class Sample(NamedTuple):
    """How far a stream was after some seconds."""

    seconds: int
    calls: int
    bundles: int


class Stream:
    """A stream that ran to its end, and how it went."""

    def __init__(self, engine, kms, out, target, options, watched):
        self.out, self.samples, self.checkpoints, self.restarts = out, [], [], 0
        # Flink asks Beam's PeriodicImpulse a hundred times a second, each of which is a state; 32767 are too many.
        self.sources = ["replay"] if engine.cluster is not None and STREAM_S > 60 else list(SOURCES)
        self._engine = engine
        self._kms, self._before, self._done = kms, kms.calls, threading.Event()
        watch = threading.Thread(target=self._watch)
        watch.start()
        words = [out, target, "--elements", ELEMENTS, "--interval", INTERVAL_S, "--streaming", *options]
        words += ["--sources", *self.sources]
        words += [f"--job_server_timeout={int(STREAM_S) + 600}"]  # Beam waits 300 s for the end of a job, then gives up
        try:
            with LeakWatch([engine.folder, *watched], CANARY.encode()) as leaks:
                self.status, self.said = engine.command("tests.engines.streams", *words, seconds=STREAM_S + 300)
        finally:
            self._done.set()
            watch.join()
        self.leaks = leaks.found

    def _watch(self):
        start = time.monotonic()
        while True:
            last = self._done.wait(1)
            calls = self._kms.calls - self._before
            self.samples.append(Sample(int(time.monotonic() - start), calls["GenerateDataKey"], len(self.bundles())))
            self._ask(self._engine.cluster)
            if last:
                return

    def _ask(self, cluster):
        with contextlib.suppress(OSError):
            for job in [] if cluster is None else list(cluster.jobs())[:1]:
                self.checkpoints, self.restarts = cluster.checkpoints(job), cluster.restarts(job)

    def bundles(self):
        """Return the envelopes of all bundles so far."""
        lines = (line for path in self.out.glob("*/sealed/*") for line in path.read_text().splitlines(keepends=True))
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def records(self, source):
        """Return how often each record of a source opens."""
        opener = open_records(key=KEY, keys=self.out / source / "keys", context=CONTEXT)
        lines = [line for path in (self.out / source / "sealed").iterdir() for line in path.read_text().splitlines()]
        envelopes = [base64.b64decode(text) for line in lines for text in json.loads(line)]
        return Counter(opener.decrypt(envelope).decode() for envelope in envelopes)

    def shards(self, source):
        """Return the shards of a source."""
        return sorted((self.out / source).glob("text*"))

    def lines(self, source):
        """Return how often each line of a source is there."""
        found = Counter()
        for path in self.shards(source):
            with open_shard(path, key=KEY, context=CONTEXT) as shard:
                found.update(shard.read().decode().splitlines())
        return found

    def report(self):
        """Return every tenth sample, and how checkpoints grew, as text."""
        some = [*self.samples[:: len(self.samples) // 10 or 1], self.samples[-1]]
        said = "; ".join(f"{sample.seconds} s: {sample.calls} calls, {sample.bundles} bundles" for sample in some)
        return f"{said}; {self.restarts} restarts; checkpoints of {self.checkpoints} bytes"


@pytest.fixture
def is_flink(request):
    """Whether the engine is Flink."""
    return "Flink" in request.node.callspec.params["engine"]


@pytest.fixture
def checkpoints(tmp_path):
    """The folder of Flink's checkpoints."""
    return tmp_path / "checkpoints"


@pytest.fixture
def stream(engine, is_flink, checkpoints, kms, tmp_path, monkeypatch, record_property):
    """Runs a stream on an engine; this process reaches the same KMS."""
    for name, value in kms.environment().items():
        monkeypatch.setenv(name, value)

    def run(target):
        options = [f"--checkpointing_interval={CHECKPOINT_MS}", "--shutdown_sources_after_idle_ms=1000"]
        options += ["--state_backend=filesystem", f"--state_backend_storage_path=file://{checkpoints}"]
        stream = Stream(engine, kms, tmp_path / "out", target, options if is_flink else (), [checkpoints])
        record_property("stream", stream.report())
        print(stream.report())  # noqa: T201  # for `pytest -s`
        assert stream.status == 0, stream.said
        assert find_plaintext(tmp_path.glob("out/*/[!r]*"), CANARY.encode()) == []  # all but what is replayed
        return stream

    return run


def check_all_are_there(found, *, restarts):
    """Check that each element is there: once, or where Flink had to start the job again, at least once."""
    assert found.keys() == set(map(text_of, range(ELEMENTS)))
    twice = {text: times for text, times in found.items() if times > 1}
    print(f"{len(twice)} of {ELEMENTS} came more than once: {twice}")  # noqa: T201  # for `pytest -s`
    assert restarts or not twice


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
class TestStream:
    def test_the_kms_is_asked_once_for_many_bundles(self, stream, engine):
        ran = stream("records")
        steps = engine.workers * len(ran.sources) * (1 + ran.restarts)  # a busy machine may miss Flink's heartbeats
        last = ran.samples[-1]
        assert last.bundles > ELEMENTS / 5, ran.report()
        assert 1 <= last.calls <= steps * (1 + last.seconds // DATA_KEY_S), ran.report()
        if STREAM_S < DATA_KEY_S and not ran.restarts:
            early = next(sample for sample in ran.samples if sample.bundles > ELEMENTS / 10)
            assert early.calls == last.calls, ran.report()
        assert ran.leaks == set()
        for source in ran.sources:
            check_all_are_there(ran.records(source), restarts=ran.restarts)

    def test_each_window_of_text_is_a_shard_with_a_key_of_its_own(self, stream, is_flink):
        """Lines wait in Flink's state for the end of their window, and so are in its checkpoints."""
        ran = stream("text")
        windows = [len(ran.shards(source)) for source in ran.sources]
        assert all(number >= STREAM_S / WINDOW_S for number in windows), windows
        assert is_flink or ran.leaks == set()
        if not ran.restarts:  # which write shards again
            assert max(windows) <= STREAM_S / WINDOW_S + 1, windows
            assert ran.samples[-1].calls == sum(windows), ran.report()
        for source in ran.sources:
            check_all_are_there(ran.lines(source), restarts=ran.restarts)
