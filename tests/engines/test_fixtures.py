"""The fixtures themselves: engines that do not start are told of, and nothing outlives the tests."""

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from tests.engines import build
from tests.engines.leaks import LeakWatch
from tests.engines.server import Server, answers, descendants, free_port, members, wait_for

# It starts a child in a process group of its own, as Beam's boot program does.
WITH_CHILD = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=os.setpgrp)
print("started", flush=True)
time.sleep(600)
"""


@pytest.fixture
def server(tmp_path):
    """A server with a child, both of which are up."""
    server = Server("parent", [sys.executable, "-c", WITH_CHILD], tmp_path / "server")
    server.wait_for(lambda: len(members(server.pid)) == 2)
    yield server
    server.stop()


@pytest.mark.parametrize("end", [Server.stop, Server.kill])
def test_a_servers_end_is_that_of_its_children(server, end):
    session = server.pid
    end(server)
    assert members(session) == []
    assert server not in Server.running


def test_a_server_that_was_killed_starts_again(server):
    before = server.pid
    server.kill()
    server.start()
    server.wait_for(lambda: len(members(server.pid)) == 2)
    assert server.pid != before
    assert len(descendants(server.pid)) == 1


def test_a_server_that_ends_at_once_is_told_of_with_its_log(tmp_path):
    server = Server("broken", [sys.executable, "-c", "print('no port for me')"], tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)broken ended; .*broken\.log ends with:\nno port for me"):
        server.wait_for_port(free_port())
    assert server not in Server.running


def test_a_server_that_does_not_answer_is_told_of_and_ended(tmp_path):
    server = Server("deaf", [sys.executable, "-c", WITH_CHILD], tmp_path)
    with pytest.raises(TimeoutError, match=r"deaf: nothing in 0.1 s"):
        server.wait_for_port(free_port(), seconds=0.1)
    assert members(server.pid) == []


def test_its_temporary_files_are_below_its_folder_and_no_settings_of_the_user_reach_it(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "mine")
    program = "import os, tempfile; print(tempfile.gettempdir(), os.environ.get('AWS_PROFILE'), os.environ['WHO'])"
    server = Server("teller", [sys.executable, "-c", program], tmp_path, {"WHO": "me"})
    wait_for(lambda: not server.is_alive(), "teller")
    assert server.log.read_text() == f"{tmp_path}/tmp None me\n"
    server.stop()


WITH_SERVER = """
import sys, time
from pathlib import Path
from tests.engines.server import Server

def test_it(tmp_path):
    server = Server("sleeper", [sys.executable, "-c", "import time; time.sleep(600)"], tmp_path)
    Path("pid").write_text(str(server.pid))
    Path("pid").rename("started")
    time.sleep(60)
"""


@pytest.mark.parametrize("processes", [0, 1])
def test_a_polite_end_of_the_tests_ends_the_servers(tmp_path, processes):
    """Also in the background, where shells have SIGINT ignored."""
    (tmp_path / "test_it.py").write_text(WITH_SERVER)
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", "pytest"]
    command += ["-p", "tests.engines.conftest", "-p", "no:cacheprovider"]
    command += ["--numprocesses", str(processes), "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    tests = subprocess.Popen(command, cwd=tmp_path, env=environment, **quiet)
    started = tmp_path / "started"
    wait_for(started.exists, "the server", alive=lambda: tests.poll() is None)
    tests.terminate()
    assert tests.wait(60) == pytest.ExitCode.INTERRUPTED
    wait_for(lambda: members(int(started.read_text())) == [], "the end of the server", seconds=5)


def test_a_worker_pool_listens_and_goes(worker_pool):
    assert answers(worker_pool.port)
    assert worker_pool.workers() == []
    worker_pool.stop()
    assert not answers(worker_pool.port)


def test_the_watch_sees_a_file_that_goes_again(tmp_path):
    with LeakWatch([tmp_path], b"CANARY-7f3a") as watch:
        (tmp_path / "spill").write_bytes(b"x CANARY-7f3a x")
        (tmp_path / "other").write_bytes(b"nothing")
        wait_for(lambda: watch.looked_into == 2, "watch")
        (tmp_path / "spill").unlink()
    assert watch.found == {f"{tmp_path}/spill"}


def test_the_watch_bears_folders_that_go_meanwhile(tmp_path):
    done = threading.Event()

    def make_and_remove():
        while not done.is_set():
            (tmp_path / "a" / "b").mkdir(parents=True)
            shutil.rmtree(tmp_path / "a")

    thread = threading.Thread(target=make_and_remove)
    thread.start()
    try:
        with LeakWatch([tmp_path], b"CANARY-7f3a") as watch:
            for _ in range(500):
                watch._look()
            (tmp_path / "spill").write_bytes(b"x CANARY-7f3a x")
    finally:
        done.set()
        thread.join()
    assert watch.found == {f"{tmp_path}/spill"}


def test_a_watch_that_could_not_look_fails_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.engines.leaks.find_plaintext", lambda *_: 1 / 0)
    (tmp_path / "spill").write_bytes(b"x")
    with pytest.raises(ZeroDivisionError), LeakWatch([tmp_path], b"CANARY-7f3a") as watch:
        wait_for(lambda: watch._error is not None, "watch")


def test_the_engines_are_not_built_again():
    if build.missing():
        pytest.skip("run `make engines`")
    start = time.monotonic()
    done = subprocess.run([sys.executable, build.__file__], capture_output=True, text=True, check=True)
    assert "Building" not in done.stdout
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ((), "install Go 1.26 and Maven 3.6 or newer and Java 17 (a JDK) first"),
        (("go",), "install Maven 3.6 or newer and Java 17 (a JDK) first"),
        (("go", "mvn"), "install Java 17 (a JDK) first"),
    ],
)
def test_a_missing_tool_is_named(tmp_path, tools, message):
    for tool in tools:
        (tmp_path / tool).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / tool).chmod(0o755)
    environment = {**os.environ, "PATH": str(tmp_path), "BEAM_ENVELOPE_ENGINES": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, build.__file__], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_build_that_fails_leaves_nothing_that_looks_built(tmp_path):
    for tool in ("go", "mvn", "java"):
        (tmp_path / tool).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / tool).chmod(0o755)
    environment = {**os.environ, "PATH": str(tmp_path), "BEAM_ENVELOPE_ENGINES": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, build.__file__], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert "prism@v2.77.0 failed with status 9" in done.stderr
    assert list((tmp_path / "cache").iterdir()) == []
