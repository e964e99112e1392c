"""Beam's external worker pool: the machines where workers run, for engines that only send them work."""

import contextlib
import os
import signal
import sys
from pathlib import Path

from tests.engines import build
from tests.engines.server import LEAN, Server, clean_environment, descendants, free_port, python_path


class WorkerPool(Server):
    """A pool that starts a worker process for each that an engine asks for.

    With Beam's boot program, the one in its images, workers are as on Dataflow: pipeline options, plug-ins and staged
    files reach them. Without it nothing does: they have the pool's environment, and what Python imports by itself.

    Args:
        folder: where it works.
        boot: whether it has the boot program.
        environment: of the workers.
    """

    def __init__(self, folder, *, boot, environment):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        module = "apache_beam.runners.worker.worker_pool_main"
        command = [sys.executable, "-m", module, f"--service_port={self.port}"]
        environment = {**worker_environment(), **environment}
        if boot:
            command += ["--container_executable", str(boot_program(folder))]
        else:
            environment["PYTHONPATH"] = python_path(_imports(folder))
        super().__init__("pool", command, folder, environment)
        self.wait_for_port(self.port)

    @property
    def options(self):
        """The options of a job whose workers are here."""
        return ["--environment_type=EXTERNAL", f"--environment_config=localhost:{self.port}"]

    def workers(self):
        """Return the process ids of the workers that run now."""
        return workers_of(self)

    def kill_worker(self, pid=None):
        """Kill a worker at once; without a process id, the newest. Returns its id."""
        pid = pid if pid is not None else max(self.workers())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return pid


def workers_of(server):
    """Return the process ids of the Python workers that a server started."""
    found = descendants(server.pid)
    return [pid for pid, words in found.items() if "sdk_worker_main" in words or "SdkHarness" in words]


def worker_environment():
    """Return the environment in which the boot program and Beam's pool find this process's Python."""
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # they start `python`
        "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT": "1",  # no virtual environment for each worker
    }


def boot_program(folder):
    """Write the command that starts the boot program, with a folder of each worker's own for what was staged."""
    folder.mkdir(parents=True, exist_ok=True)
    path, staged = folder / "boot", clean_environment(folder)["TMPDIR"]
    program = build.program("container")
    path.write_text(f'#!/bin/sh\nmkdir -p "{staged}/$$"\nexec "{program}" --semi_persist_dir="{staged}/$$" "$@"\n')
    path.chmod(0o755)
    return path


def _imports(folder):
    """Return a folder whose `sitecustomize` imports our filesystems into each Python that has it on its path."""
    path = folder / "imports"
    path.mkdir(exist_ok=True)
    lean = (LEAN / "sitecustomize.py").read_text()  # of two, only the first is imported
    (path / "sitecustomize.py").write_text(f"{lean}\nimport beam_envelope.io.filesystem\n")
    return path
