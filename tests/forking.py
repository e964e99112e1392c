"""A process that has loaded Beam and forks a child for each command: a child starts at once, and may die alone.

Run as a program it reads one request a line, in JSON: the words of the command, where its output goes, perhaps a
`uid` to become, and perhaps `step`, K: the child then sends itself the signal `signal` just before the K-th time that
it opens, renames, links or removes a file below the folder `below`. It answers each with the child's exit status.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

_SYSTEM_CALLS = frozenset({"open", "os.rename", "os.link", "os.remove"})


class Forker:
    """The test's side."""

    def __init__(self, folder):
        self._log = Path(folder) / "forked.log"
        program = [sys.executable, "-m", "tests.forking"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *words, stdout=None, stderr=None, uid=None, step=None, signal=signal.SIGKILL, below=""):
        """Run a command; return its exit status (-9 if it was killed) and what it wrote and went nowhere else."""
        request = {"words": [str(word) for word in words], "uid": uid, "step": step, "signal": signal}
        request |= {"below": str(below), "stdout": str(stdout or self._log), "stderr": str(stderr or self._log)}
        self._log.write_bytes(b"")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())
        return status, self._log.read_text()

    def close(self):
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _child(request):
    from beam_envelope import cli

    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND), descriptor)
    if request["uid"] is not None:
        os.setgroups([])
        os.setgid(request["uid"])
        os.setuid(request["uid"])
    if request["step"] is not None:
        steps = itertools.count(1)  # `next` is one step, also of several threads

        def count(event, arguments):
            watched = event in _SYSTEM_CALLS and str(arguments[0]).startswith(request["below"] + "/")
            if watched and next(steps) == request["step"]:
                os.kill(os.getpid(), request["signal"])

        sys.addaudithook(count)
    sys.exit(cli.main(request["words"]))


def _serve():
    import beam_envelope.commands  # noqa: F401  # what takes seconds

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _child(json.loads(line))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
