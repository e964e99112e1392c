"""The engines that jobs run on, each started when a test first wants it."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.engines import build
from tests.engines.driver import Driver
from tests.engines.flink import FlinkCluster, job_server_jar, process_options
from tests.engines.server import Server, clean_environment, free_port, kill_session
from tests.engines.worker_pool import WorkerPool, worker_environment

SETTINGS = {"BEAM_ENVELOPE_KEY": "aws-kms://alias/etl", "BEAM_ENVELOPE_CONTEXT": "dataset=people"}


class Engine:
    """An engine that is up.

    Attributes:
        options: what a job is given to run here.
        folder: where it and its servers work, and all temporary files go.
        environment: what leads a job and its workers to the KMS.
        workers: how many worker processes a job has at most.
        slow: whether submitting a job takes long, so that several transforms share one.
        options_reach_workers: whether pipeline options do.
    """

    def __init__(self, folder, environment, *, workers=1, slow=False):
        self.folder, self.environment = Path(folder), environment
        self.folder.mkdir(parents=True, exist_ok=True)
        self.workers, self.slow = workers, slow
        self.options = []
        self.options_reach_workers = True
        self.pool = self.cluster = None
        self._driver = None
        self._stack = ExitStack()

    def server(self, name, *command):
        """Start a server that ends with the engine."""
        server = Server(name, command, self.folder / name, self.environment)
        self._stack.callback(server.stop)
        return server

    def start_pool(self, *, boot):
        """Start an external worker pool, and have jobs use it."""
        self.options_reach_workers = boot
        environment = self.environment if boot else {**self.environment, **SETTINGS}
        self.pool = WorkerPool(self.folder / "pool", boot=boot, environment=environment)
        self._stack.callback(self.pool.stop)
        self.options += self.pool.options

    def start_cluster(self):
        """Start a Flink cluster."""
        settings = {"heartbeat.timeout": 50000}  # Flink's own; nothing is killed here, and a busy machine is slow
        self.cluster = FlinkCluster(self.folder / "flink", settings=settings, environment=self.environment)
        self._stack.callback(self.cluster.stop)
        self.options += self.cluster.options

    def run(self, step, branches, place, *more):
        """Run a step of some branches; return the text of the job's error, or None."""
        if self._driver is None:
            self._driver = Driver(self.folder, self.environment)
        try:
            return self._driver.run(step, branches, place, [*self.options, *more])
        except BaseException:
            self._driver.close()
            self._driver = None
            raise

    def command(self, module, *words, seconds=500):
        """Run a module as a program, with the engine's options after the words; return its status and what it said."""
        environment = clean_environment(self.folder, self.environment)
        command = [sys.executable, "-m", module, *map(str, words), *self.options]
        with (self.folder / "commands.log").open("a+") as log:
            start = log.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            try:
                status = process.wait(seconds)
            finally:
                kill_session(process.pid)  # what the runner started too
                process.wait()
            log.seek(start)
            return status, log.read()

    def close(self):
        """End everything that was started."""
        if self._driver is not None:
            self._driver.close()
        self._stack.close()


def _fn_api(engine):
    engine.options = ["--direct_running_mode=in_memory"]


def _multi_processing(engine):
    engine.options = ["--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def _prism(engine):
    engine.options = ["--runner=PrismRunner", f"--prism_location={build.program('prism')}"]


def _start_prism(engine):
    port = free_port()
    engine.server("prism", build.program("prism"), f"-job_port={port}", "-serve_http=false").wait_for_port(port)
    engine.options = ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}"]


def _prism_server(engine):
    _start_prism(engine)
    engine.options += ["--environment_type=LOOPBACK"]


def _prism_pool(engine):
    _start_prism(engine)
    engine.start_pool(boot=True)


def _start_job_service(engine):
    port = free_port()
    module = "apache_beam.runners.portability.local_job_service_main"
    engine.server("job-service", sys.executable, "-m", module, f"--port={port}").wait_for_port(port)
    engine.options = ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}"]


def _portable_pool(engine):
    _start_job_service(engine)
    engine.start_pool(boot=True)


def _portable_bare(engine):
    _start_job_service(engine)
    engine.start_pool(boot=False)


def _flink(engine):
    jar = f"--flink_job_server_jar={job_server_jar()}"
    engine.options = ["--runner=FlinkRunner", jar, "--environment_type=LOOPBACK", "--parallelism=2"]


def _flink_cluster(engine):
    engine.start_cluster()


def _spark(engine):
    port = free_port()
    ports = ["--job-host", "localhost", "--job-port", port, "--artifact-port", 0, "--expansion-port", 0]
    command = ["java", "-Xmx1g", "-jar", build.folder("spark") / "job-server.jar", *ports]
    engine.environment = {**worker_environment(), **engine.environment}
    engine.server("spark", *command, "--spark-master-url", "local[2]").wait_for_port(port)
    engine.options = ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}"]
    engine.options += process_options(engine.folder / "boot")


ENGINES = {
    "FnApiRunner": (_fn_api, {}),
    "DirectRunner, 2 processes": (_multi_processing, {"workers": 2, "slow": True}),
    "Prism": (_prism, {}),
    "Prism job server": (_prism_server, {}),
    "Prism, worker pool": (_prism_pool, {"slow": True}),
    "portable, worker pool": (_portable_pool, {"slow": True}),
    "portable, bare worker pool": (_portable_bare, {"slow": True}),
    "Flink embedded": (_flink, {"slow": True}),
    "Flink cluster": (_flink_cluster, {"workers": 2, "slow": True}),
    "Spark local[2]": (_spark, {"workers": 2, "slow": True}),
}


def start_engine(name, folder, environment):
    """Start an engine."""
    start, traits = ENGINES[name]
    engine = Engine(folder, environment, **traits)
    try:
        start(engine)
    except BaseException:
        engine.close()
        raise
    return engine
