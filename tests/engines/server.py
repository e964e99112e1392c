"""Servers of engines as child processes: started, waited for until they answer, ended with all that they started."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

TAIL_BYTES = 6_000
LEAN = Path(__file__).parent / "lean"
# JVMs live for a minute here, in which no thorough compiler pays off, nor a collector of garbage in threads of its own.
SHORT_LIVED_JAVA = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]


def free_port():
    """Return a port that nobody listens on now, and that the system gives to no connection meanwhile."""
    while True:
        port = random.randrange(10_000, 32_000)  # Linux gives connections those from 32768 on
        with contextlib.suppress(OSError), socket.socket() as server:
            server.bind(("127.0.0.1", port))
            return port


def answers(port):
    """Whether something listens on a port of this machine."""
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
        return True
    return False


def wait_for(condition, what, *, seconds=60, alive=lambda: True):
    """Wait until a condition holds, and return what it gave; fail if it takes too long or `alive` no longer holds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if not alive():
            raise RuntimeError(f"{what} ended")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: nothing in {seconds} s")
        time.sleep(0.05)
    return found


def tail(path):
    """Return the end of a log."""
    with Path(path).open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
        return stream.read().decode(errors="replace")


class Server:
    """A process in a session of its own, so that it can be ended with all of its children.

    Beam's boot program puts each worker into a process group of its own: the session is what they have in common.

    Args:
        name: of the log, `NAME.log` in `folder`, to which a restarted server adds.
        command: the words of the command.
        folder: where it works, and where all temporary files of it and its children go, below `tmp`.
        environment: more than this process's own environment without its AWS and BEAM_ENVELOPE settings.
    """

    running: ClassVar[list] = []  # of this process; the last one started is the first to be ended

    def __init__(self, name, command, folder, environment=None):
        self.name, self.folder = name, Path(folder)
        self.command = [str(word) for word in command]
        self.log = self.folder / f"{name}.log"
        self.environment = clean_environment(self.folder, environment)
        self._process = None
        self.start()

    def start(self):
        """Start the process."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        Server.running.append(self)

    @property
    def pid(self):
        return self._process.pid

    def is_alive(self):
        """Whether the process runs."""
        return self._process.poll() is None

    def wait_for(self, condition, seconds=60):
        """Wait until a condition holds; where it does not, end the process and fail with the end of its log."""
        try:
            return wait_for(condition, self.name, seconds=seconds, alive=self.is_alive)
        except (RuntimeError, TimeoutError) as error:
            self.stop()
            raise type(error)(f"{error}; {self.log} ends with:\n{tail(self.log)}") from None
        except BaseException:
            self.stop()
            raise

    def wait_for_port(self, port, seconds=60):
        """Wait until it listens on a port."""
        self.wait_for(lambda: answers(port), seconds)
        return self

    def kill(self):
        """Kill the process and its children at once, as a machine that fails."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        Server.running.remove(self)

    def stop(self):
        """End the process and its children, unless that was done: politely, then for certain."""
        if self not in Server.running:
            return
        self._signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: self._process.poll() is not None and not members(self.pid), self.name, seconds=5)
        self.kill()

    def _signal(self, number):
        for pid in {self.pid, *members(self.pid)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def stop_all():
    """End every server that still runs."""
    for server in reversed(Server.running[:]):
        server.stop()


def clean_environment(folder, more=None):
    """Return the environment of a child: our modules, no settings of the user's, temporary files below a folder."""
    temporary = Path(folder) / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "BEAM_ENVELOPE_"))}
    java = " ".join([f"-Djava.io.tmpdir={temporary}", *SHORT_LIVED_JAVA])
    return {**kept, "TMPDIR": str(temporary), "_JAVA_OPTIONS": java, "PYTHONPATH": python_path(), **(more or {})}


def python_path(*first):
    """Return the PYTHONPATH of a child: some folders, and those of this process, with `lean/` before them."""
    return os.pathsep.join(map(str, [*first, LEAN, *filter(None, sys.path)]))


def members(session):
    """Return the living processes of a session."""
    return [pid for pid, its_session, _ in _processes() if its_session == session]


def kill_session(session):
    """Kill all processes of a session."""
    for pid in members(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children(pid):
    """Return the living children of a process."""
    return [child for child, _, parent in _processes() if parent == pid]


def descendants(pid):
    """Return the living descendants of a process with their command lines, by process id."""
    parents = {child: parent for child, _, parent in _processes()}
    found = {}
    for child in parents:
        ancestor = child
        while ancestor in parents:
            ancestor = parents[ancestor]
            if ancestor == pid:
                with contextlib.suppress(OSError):
                    found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                break
    return found


def _processes():
    """Return (pid, session, parent) of all processes that are no zombies."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                state, parent, _, session = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z":
                    found.append((int(name), int(session), int(parent)))
    return found
