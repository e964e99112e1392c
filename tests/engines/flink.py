"""Flink: a cluster of a JobManager and TaskManagers, each a JVM of its own, with Beam's job server before it."""

import json
import os
import urllib.request
from pathlib import Path

from tests.engines import build
from tests.engines.server import Server, free_port, wait_for
from tests.engines.worker_pool import boot_program, worker_environment, workers_of

OPENS = [
    "java.io", "java.lang", "java.lang.reflect", "java.net", "java.nio", "java.time", "java.util",
    "java.util.concurrent", "sun.nio.ch",
]  # fmt: skip
JAVA = [  # with the time in logs
    "java", "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
    *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENS),
]  # fmt: skip
HEAP_MIB = int(os.environ.get("BEAM_ENVELOPE_HEAP_MIB", "1024"))  # of a TaskManager; long streams want more
MEMORY = {  # of a TaskManager: its start scripts would compute these
    "task.heap.size": f"{HEAP_MIB - 128}m", "task.off-heap.size": "64m", "framework.heap.size": "128m",
    "framework.off-heap.size": "128m", "network.min": "256m", "network.max": "256m", "managed.size": "64m",
    "jvm-metaspace.size": "256m", "jvm-overhead.min": "192m", "jvm-overhead.max": "192m",
}  # fmt: skip


def job_server_jar():
    """Return the path of the job server that also holds a whole Flink."""
    return build.folder("flink") / "job-server.jar"


def process_options(folder):
    """Return the options of a job whose workers a Java engine starts itself, by Beam's boot program.

    They are kept for some seconds, since Java engines would start a new worker for each stage of a job.
    """
    command = json.dumps({"command": str(boot_program(folder))})
    return ["--environment_type=PROCESS", f"--environment_config={command}", "--environment_cache_millis=20000"]


class FlinkCluster:
    """A Flink cluster on this machine, one slot for each TaskManager.

    Args:
        folder: where it works: logs, and all temporary files, below.
        task_managers: how many to start.
        settings: more settings of Flink, such as those of checkpoints.
        environment: of the JVMs, and so of the workers that they start.
        sends_jars: whether Beam's job server sends its jars along with each job, as it does in front of a cluster that
            has only Flink: that takes 12 s. Without, a dead worker stays in a TaskManager's cache for some seconds,
            also of a job that is started again.
    """

    def __init__(self, folder, task_managers=2, settings=None, environment=None, *, sends_jars=False):
        self.folder = Path(folder)
        self._environment = {**worker_environment(), **(environment or {})}
        self._job_server_main = "org.apache.beam.runners.flink.FlinkJobServerDriver" if sends_jars else "FlinkJobServer"
        self._configure(settings or {})
        self.task_managers = {}
        self.job_manager = self.job_server = None
        try:
            self.job_manager = self._jvm("jobmanager", "runtime.entrypoint.StandaloneSessionClusterEntrypoint", "512m")
            for number in range(1, task_managers + 1):
                self.start_task_manager(number)
            self.job_manager.wait_for(self._rest_answers)
            self.job_server_port = free_port()
            self.start_job_server()
            self.wait_for_task_managers(task_managers)
        except BaseException:
            self.stop()
            raise

    def _configure(self, settings):
        self.rest_port = free_port()
        config = {
            "jobmanager.rpc.address": "localhost",
            "jobmanager.rpc.port": free_port(),
            "jobmanager.memory.process.size": "1g",
            "rest.address": "localhost",
            "rest.port": self.rest_port,
            "taskmanager.host": "localhost",
            "taskmanager.numberOfTaskSlots": 1,
            "taskmanager.network.sort-shuffle.min-buffers": 32,  # of each shuffle; 512 would want much memory for many
            "restart-strategy.type": "fixed-delay",
            "restart-strategy.fixed-delay.attempts": 2,
            "restart-strategy.fixed-delay.delay": "1 s",
            "state.checkpoints.dir": f"file://{self.folder}/checkpoints",  # in memory they may have 5 MiB each
            "heartbeat.interval": 2000,
            "heartbeat.timeout": 10000,
            "cluster.registration.error-delay": 500,  # ms until a TaskManager asks again for a JobManager that starts
            **settings,
        }
        (self.folder / "conf").mkdir(parents=True)
        (self.folder / "conf" / "config.yaml").write_text(
            "".join(f"{name}: {value}\n" for name, value in config.items())
        )

    def _jvm(self, name, main, heap, *arguments):
        jars = f"{build.folder('flink')}/lib/*"
        command = [*JAVA, f"-Xmx{heap}", "-cp", jars, f"org.apache.flink.{main}"]
        command += ["--configDir", self.folder / "conf", *arguments]
        return Server(name, command, self.folder / name, self._environment)

    # -------------------------------------------------------------------------------------- parts to kill and start

    def start_task_manager(self, number):
        """Start a TaskManager, or start it again; it is not waited for."""
        sizes = {f"taskmanager.memory.{name}": size for name, size in MEMORY.items()}
        sizes |= {"taskmanager.resource-id": f"tm{number}", "taskmanager.cpu.cores": "1"}
        words = [word for name, value in sizes.items() for word in ("-D", f"{name}={value}")]
        main = "runtime.taskexecutor.TaskManagerRunner"
        self.task_managers[number] = self._jvm(f"taskmanager-{number}", main, f"{HEAP_MIB}m", *words)

    def kill_task_manager(self, number):
        """Kill a TaskManager at once."""
        self.task_managers.pop(number).kill()

    def workers(self, number):
        """Return the process ids of the workers that a TaskManager started."""
        return workers_of(self.task_managers[number])

    def kill_job_manager(self):
        """Kill the JobManager at once. Without high availability its jobs are lost."""
        self.job_manager.kill()

    def restart_job_manager(self):
        """Start the JobManager again after it was killed, and wait until it answers."""
        self.job_manager.start()
        self.job_manager.wait_for(self._rest_answers)

    def start_job_server(self):
        """Start Beam's job server, to which jobs are submitted."""
        ports = ["--job-host", "localhost", "--job-port", self.job_server_port, "--artifact-port", 0]
        command = [*JAVA, "-Xmx768m", "-cp", job_server_jar(), self._job_server_main, *ports]
        command += ["--expansion-port", 0, "--flink-master", f"localhost:{self.rest_port}"]
        self.job_server = Server("job-server", command, self.folder / "job-server")
        self.job_server.wait_for_port(self.job_server_port)

    def stop(self):
        """End all parts."""
        for server in [self.job_server, *self.task_managers.values(), self.job_manager]:
            if server is not None:
                server.stop()

    # ----------------------------------------------------------------------------------------------- what it says

    @property
    def options(self):
        """The options of a job that runs here, with workers that each TaskManager starts by Beam's boot program.

        One external pool would not do for both TaskManagers: it knows workers by their ids, which both count from 1-1,
        so one would stop the other's.
        """
        endpoint = f"--job_endpoint=localhost:{self.job_server_port}"
        return ["--runner=PortableRunner", endpoint, "--parallelism=2", *process_options(self.folder / "boot")]

    def rest(self, path):
        """Return what Flink's REST API answers, such as to `/jobs/overview`."""
        with urllib.request.urlopen(f"http://localhost:{self.rest_port}{path}", timeout=10) as answer:
            return json.load(answer)

    def _rest_answers(self):
        try:
            return "flink-version" in self.rest("/overview")
        except OSError:
            return False

    def jobs(self):
        """Return the states of all jobs, by their ids, the newest first."""
        found = sorted(self.rest("/jobs/overview")["jobs"], key=lambda job: -job["start-time"])
        return {job["jid"]: job["state"] for job in found}

    def checkpoints(self, job):
        """Return the sizes of a job's completed checkpoints that Flink still tells of, in bytes, the oldest first."""
        history = self.rest(f"/jobs/{job}/checkpoints")["history"]
        return [checkpoint["state_size"] for checkpoint in reversed(history) if checkpoint["status"] == "COMPLETED"]

    def restarts(self, job):
        """Return how often a job was started again."""
        found = self.rest(f"/jobs/{job}/metrics?get=numRestarts")
        return int(found[0]["value"]) if found else 0

    def wait_for_task_managers(self, number, seconds=60):
        """Wait until so many TaskManagers are alive, and registered: they and the JobManager know of it.

        A TaskManager tells of its slots when it has got the JobManager's word. If the JobManager is killed before that,
        the TaskManager goes on asking the dead one for five minutes.
        """

        def registered():
            found = self.rest("/overview")
            return found["taskmanagers"] == found["slots-total"] == number

        wait_for(
            registered,
            f"{number} TaskManagers",
            seconds=seconds,
            alive=lambda: all(server.is_alive() for server in self.task_managers.values()),
        )

    def wait_for_job(self, *states, seconds=60):
        """Wait until the newest job is in one of these states; return its id."""
        return wait_for(
            lambda: next((job for job, state in self.jobs().items() if state in states), None), "job", seconds=seconds
        )
