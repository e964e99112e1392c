"""A process that submits jobs to one engine, as a user's program does; it loads Beam once.

Run as a program, it reads one request a line, in JSON (the step, the branches, the options), and answers each with the
error that the job ended with, or null.
"""

import json
import os
import subprocess
import sys
import traceback

from tests.engines.server import clean_environment, kill_session, tail


class Driver:
    """The test's side."""

    def __init__(self, folder, environment):
        self.log = folder / "driver.log"
        environment = clean_environment(folder, environment)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engines.driver"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
            )

    def run(self, step, branches, place, options):
        """Run a job; return the text of its error, or None."""
        request = {"step": step, "branches": list(branches), "place": str(place), "options": list(options)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the driver ended; {self.log} ends with:\n{tail(self.log)}")
        return json.loads(answer)["error"]

    def close(self):
        """End the process, and what a runner started in it."""
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            kill_session(self._process.pid)
            self._process.wait()
            self._process.stdout.close()


def _run(request):
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineState

    from beam_envelope import jobs, register_filesystem
    from beam_envelope.keys.cache import clear_caches
    from tests.engines import branches

    clear_caches()  # with LOOPBACK this process is the worker too
    options = register_filesystem(PipelineOptions(request["options"]))
    pipeline = jobs.make_pipeline(options)
    branches.build(pipeline, request["step"], request["branches"], request["place"])
    result = pipeline.run()
    state = result.wait_until_finish() or result.state
    if state != PipelineState.DONE:
        raise RuntimeError(f"the job ended as {state}")


def main():
    """Answer requests until the input ends."""
    import logging

    logging.basicConfig(level=logging.INFO)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        print("=== ", line.strip(), file=sys.stderr, flush=True)
        try:
            _run(request)
            error = None
        except BaseException:  # noqa: BLE001  # the test looks at it
            error = traceback.format_exc()
            print(error, file=sys.stderr, flush=True)
        answers.write(json.dumps({"error": error}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
