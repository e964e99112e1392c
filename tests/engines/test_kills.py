"""Parts of a job are killed at random moments in its middle: nothing is lost, doubled, or left to be taken for data.

What a user would do follows: nothing where the engine restarts the job, else the same job again. BEAM_ENVELOPE_KILLS is
how many moments are tried for each kind of kill (1; with more, raise --timeout too), BEAM_ENVELOPE_KILLS_SEED chooses
them (each run its own; printed), BEAM_ENVELOPE_KMS_AWAY_S is for how many seconds the KMS is away.
"""

import os
import random
import signal
import sys
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.engines import build
from tests.engines.flink import FlinkCluster
from tests.engines.kill_jobs import JOBS, prepare, start_trial
from tests.engines.launcher import Launchers
from tests.engines.server import wait_for

MOMENTS = int(os.environ.get("BEAM_ENVELOPE_KILLS", "1"))
SEED = int(os.environ.get("BEAM_ENVELOPE_KILLS_SEED", str(random.SystemRandom().randrange(10**6))))
KMS_AWAY_S = float(os.environ.get("BEAM_ENVELOPE_KMS_AWAY_S", "10"))
IN_MEMORY = ["--direct_running_mode=in_memory"]
TWO_WORKERS = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
WORKER_DIED = "a worker process of this machine died"


def _say(text):
    """Tell of a trial: pytest shows it where a test fails, and with -s."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Trials:
    """Trials of one kind of kill, at random moments.

    Args:
        launchers: start the jobs.
        prepared: what `prepare` made.
        place: of the trials.
        seed: of the moments, with `SEED`.
    """

    def __init__(self, launchers, prepared, place, *seed):
        self.launchers, self.prepared, self.place = launchers, prepared, Path(place)
        self.random, self._what = random.Random(f"{SEED} {seed}"), " ".join(seed)
        self.outcomes, self.problems = Counter(), []
        self._lasts_s = 2.0  # from the first thing that a job writes to its end, as far as is known

    def kill_in_the_middle(self, names, options, kill, if_exists="error"):
        """Start jobs, wait for the first that they write and then until a random moment, and kill a part.

        Returns:
            The launcher; None if the jobs had ended, whose outcome is noted then.
        """
        start_trial(self.prepared, self.place)
        before = self._written(names)
        launcher = self.launchers.start("write", names, self.place, options, if_exists)
        wait_for(lambda: self._written(names) != before or not launcher.is_alive(), "the first write", seconds=300)
        start, moment = time.monotonic(), self.random.uniform(0, self._lasts_s)
        with suppress(TimeoutError):
            wait_for(lambda: not launcher.is_alive(), "the end", seconds=moment)
        if launcher.is_alive():
            self._lasts_s = max(self._lasts_s, moment * 1.2)
            kill(launcher)
            _say(f"{launcher.pid}: killed after {moment:.2f} s")
            return launcher
        self._lasts_s = time.monotonic() - start
        self.outcomes["ended before"] += 1
        assert launcher.result() == []
        return None

    def note_end(self, too_late):
        """Look at shorter times from now on, if the last moment was too late to hurt a job."""
        if too_late:
            self._lasts_s *= 0.7

    def _written(self, names):
        found = {}
        for name in names:
            for path in Path(self.place, name).rglob("*"):
                with suppress(OSError):
                    found[path] = path.stat().st_ino
        return found

    def run_again(self, names, options):
        """Run the same jobs again, as a user would."""
        if_exists = self.random.choice(["skip", "overwrite"])
        self.outcomes[f"again, {if_exists}"] += 1
        self._note(self.launchers.run("write", names, self.place, options, if_exists), f"again, {if_exists}")

    def check(self, names, after):
        """Note what is wrong in the end."""
        self._note(self.launchers.run("check", names, self.place), after)

    def _note(self, found, after):
        if found != []:
            self.outcomes["failed"] += 1
            self.problems.append(f"after {after}: {found}")
            _say(self.problems[-1])

    def end(self):
        """Fail if anything was wrong; say what was tried."""
        _say(f"seed {SEED}, {self._what}: {dict(self.outcomes)}")
        assert self.problems == []


@pytest.fixture(scope="module")
def prepared(kms, tmp_path_factory):
    """The data of all trials."""
    from beam_envelope.keys.cache import clear_caches

    with pytest.MonkeyPatch.context() as patch:
        for name, value in kms.environment().items():
            patch.setenv(name, value)
        clear_caches()
        prepare(folder := tmp_path_factory.mktemp("prepared"))
        clear_caches()
    return folder


@pytest.fixture(scope="module")
def launchers(kms, tmp_path_factory):
    """What starts the jobs."""
    launchers = Launchers(tmp_path_factory.mktemp("launchers"), kms.environment())
    yield launchers
    launchers.close()


# ------------------------------------------------------------------------------------- worker processes of Beam's own


def a_worker(launcher):
    """Kill one of the worker processes; Beam's runner would wait for it for ever."""
    for pid in launcher.workers()[:1]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def the_launcher(launcher):
    """Kill the launcher; its workers go on until they notice."""
    launcher.kill()


def the_whole_job(launcher):
    """Kill the launcher and all workers."""
    launcher.kill_all()


@pytest.mark.parametrize("kill", [a_worker, the_launcher, the_whole_job])
@pytest.mark.parametrize("name", JOBS)
def test_worker_processes(launchers, prepared, tmp_path, name, kill):
    trials = Trials(launchers, prepared, tmp_path / "place", name, kill.__name__)
    for _ in range(MOMENTS):
        launcher = trials.kill_in_the_middle([name], TWO_WORKERS, kill)
        if launcher is None:
            trials.check([name], "an end before the kill")
            continue
        if kill is a_worker:
            said = launcher.result(60)
            trials.note_end(said == [])
            trials.outcomes["went on" if said == [] else "died"] += 1  # its last worker had nothing to do any more
            assert said == [] or WORKER_DIED in said
        else:
            trials.outcomes["died"] += 1
        trials.run_again([name], IN_MEMORY)
        launcher.kill_all()
        trials.check([name], f"{kill.__name__} was killed")
    trials.end()


# -------------------------------------------------------------------------------------------------------------- Flink


class Flink:
    """A cluster; all jobs are steps of one, since submitting one takes long.

    Args:
        cluster: a FlinkCluster.
    """

    def __init__(self, cluster):
        self.cluster = cluster
        self.old_workers = set()  # those of jobs before end a while after them

    def workers(self):
        """Return the process ids of all workers."""
        return {pid for number in self.cluster.task_managers for pid in self.cluster.workers(number)}

    def cancel(self):
        """Cancel all jobs, so that others have their slots."""
        for job, state in self.cluster.jobs().items():
            if state in {"RUNNING", "RESTARTING"}:
                url = f"http://localhost:{self.cluster.rest_port}/jobs/{job}?mode=cancel"
                urllib.request.urlopen(urllib.request.Request(url, method="PATCH"), timeout=10).close()

    def restarts(self):
        """Return how often Flink has restarted a job up to now."""
        return self.cluster.job_manager.log.read_text().count("switched from state RUNNING to RESTARTING")

    def a_task_manager(self, launcher):
        """Kill a TaskManager, and start another in its place."""
        self.cluster.kill_task_manager(1)
        self.cluster.start_task_manager(1)

    def an_sdk_worker(self, launcher):
        """Kill a worker process, in whose place its TaskManager starts another."""
        with suppress(ProcessLookupError):
            os.kill(random.Random(SEED).choice(sorted(self.workers() - self.old_workers)), signal.SIGKILL)

    def the_job_manager(self, launcher):
        """Kill the JobManager, with it the job, and start another."""
        self.cluster.kill_job_manager()
        self.cluster.restart_job_manager()


@pytest.fixture(scope="module")
def flink(kms, tmp_path_factory):
    """One cluster for all kills."""
    if missing := {"flink", "container"}.intersection(build.missing()):
        pytest.skip(f"{' and '.join(sorted(missing))} not built: run `make engines`")
    folder = tmp_path_factory.mktemp("flink")
    # Of a TaskManager that is lost, each task that notices counts as an attempt.
    attempts = {"restart-strategy.fixed-delay.attempts": 100}
    cluster = FlinkCluster(folder / "cluster", settings=attempts, environment=kms.environment(), sends_jars=True)
    yield Flink(cluster)
    cluster.stop()


@pytest.mark.parametrize("part", ["a_task_manager", "an_sdk_worker", "the_job_manager"])
def test_flink(flink, launchers, prepared, tmp_path, part):
    trials = Trials(launchers, prepared, tmp_path / "place", part)
    for _ in range(MOMENTS):
        flink.cluster.wait_for_task_managers(2)
        flink.old_workers, restarts = flink.workers(), flink.restarts()
        launcher = trials.kill_in_the_middle(JOBS, flink.cluster.options, getattr(flink, part), "skip")
        if launcher is None:
            trials.check(JOBS, "an end before the kill")
            continue
        try:
            said = launcher.result(150)
        except TimeoutError:
            said = "the launcher waits for ever"
            flink.cancel()
        trials.outcomes["went on" if said == [] else "died"] += 1
        trials.outcomes["restarts by Flink"] += flink.restarts() - restarts
        if said != []:
            _say(f"{part}: {said}"[-2000:])
            flink.cluster.wait_for_task_managers(2)
            trials.run_again(JOBS, flink.cluster.options)
        trials.check(JOBS, f"{part} was killed")
    trials.end()


def test_a_kms_that_is_away_for_a_while(flink, kms, launchers, prepared, tmp_path):
    """The KMS's client tries again for about half a minute; after that Flink starts the job again."""
    place = tmp_path / "place"
    start_trial(prepared, place)
    before, restarts = kms.calls.total(), flink.restarts()
    launcher = launchers.start("write", JOBS, place, flink.cluster.options, "skip")
    wait_for(lambda: kms.calls.total() > before or not launcher.is_alive(), "the first call", seconds=300)
    kms.__exit__(None)
    try:
        time.sleep(1)  # calls that were under way are counted
        calls = kms.calls.total()
        time.sleep(KMS_AWAY_S - 1)
        assert kms.calls.total() == calls, "somebody reached the KMS that is away"
    finally:
        kms.__enter__()
    said = launcher.result(240)
    assert kms.calls.total() > calls, "the job had made all its calls before"
    _say(f"KMS away for {KMS_AWAY_S} s: restarts {flink.restarts() - restarts}, {said}"[:3000])
    if said != []:
        assert "KmsUnavailableError" in said
        assert launchers.run("write", JOBS, place, flink.cluster.options, "skip") == []
    assert launchers.run("check", JOBS, place) == []
