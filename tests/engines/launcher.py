"""A process that has loaded Beam and forks a launcher for each job: it starts at once, and can be killed alone.

Run as a program, it reads one request a line, in JSON, and answers each with the process id of the launcher, which
leads a session of its own and at its end writes what became of the job into the file that the request names.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from tests.engines.server import clean_environment, descendants, kill_session, members, wait_for


class Launchers:
    """The test's side.

    Args:
        folder: where the launchers work, and all temporary files go.
        environment: what leads jobs to the KMS.
    """

    def __init__(self, folder, environment):
        self.folder = Path(folder)
        environment = clean_environment(self.folder, environment)
        self.log = self.folder / "launchers.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engines.launcher"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
            )
        self._started = []

    def start(self, step, names, place, options=(), if_exists="error"):
        """Start a launcher: `write` runs jobs, `check` reads what they wrote."""
        answer = self.folder / f"answer-{len(self._started)}.json"
        request = {"step": step, "names": list(names), "place": str(place), "options": list(options)}
        request |= {"if_exists": if_exists, "answer": str(answer)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        launcher = Launcher(int(self._process.stdout.readline()), answer)
        self._started.append(launcher)
        return launcher

    def run(self, step, names, place, options=(), if_exists="error", seconds=300):
        """Run to the end; return the problems, or the error of the job."""
        return self.start(step, names, place, options, if_exists).result(seconds)

    def close(self):
        """End the process, and all launchers with what they started."""
        for launcher in self._started:
            launcher.kill_all()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Launcher:
    """A launcher that runs, or has ended."""

    def __init__(self, pid, answer):
        self.pid, self._answer = pid, answer
        self.started = time.monotonic()

    def is_alive(self):
        """Whether the launcher itself runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            return True
        return False

    def workers(self):
        """Return the worker processes that it started."""
        return [
            pid
            for pid, words in descendants(self.pid).items()
            if "sdk_worker_main" in words and not words.startswith("/bin/sh")
        ]

    def kill(self):
        """Kill the launcher alone, at once; its workers find out themselves."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def kill_all(self):
        """Kill the launcher and its workers at once."""
        while members(self.pid):
            kill_session(self.pid)

    def wait(self, seconds=300):
        """Wait until the launcher and all that it started are gone."""
        wait_for(lambda: not members(self.pid), "launcher", seconds=seconds)

    def result(self, seconds=300):
        """Wait until it has ended; return what it said: None if it was killed."""
        try:
            wait_for(lambda: not self.is_alive(), "launcher", seconds=seconds)
        finally:
            self.kill_all()
        return json.loads(self._answer.read_text()) if self._answer.exists() else None


# ------------------------------------------------------------------------------------------------- in the launcher


def _write(request):
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineState

    from beam_envelope import jobs
    from tests.engines import kill_jobs

    pipeline = jobs.make_pipeline(PipelineOptions(request["options"]))
    kill_jobs.build(pipeline, request["names"], request["place"], request["if_exists"])
    with jobs.fail_when_a_worker_dies():
        result = pipeline.run()
    state = result.wait_until_finish() or result.state
    if state != PipelineState.DONE:
        raise RuntimeError(f"the job ended as {state}")
    return []


def _check(request):
    from tests.engines.kill_checks import problems_of

    return problems_of(request["names"], request["place"])


def _child(request):
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(2, 1)
    sys.stderr.write(f"=== {os.getpid()} {json.dumps(request)}\n")
    status = 1
    try:
        found, status = {"write": _write, "check": _check}[request["step"]](request), 0
    except BaseException:  # noqa: BLE001  # the test looks at it
        found = traceback.format_exc()
        sys.stderr.write(found)
    answer = Path(request["answer"])
    answer.with_suffix(".part").write_text(json.dumps(found))
    answer.with_suffix(".part").rename(answer)
    os._exit(status)


def main():
    """Fork a launcher for each line of the input."""
    import tests.engines.kill_checks  # noqa: F401  # what takes seconds

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _child(json.loads(line))
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
