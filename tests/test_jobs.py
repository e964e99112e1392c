"""What the command and the pipelines share: options, checks before and after, and which workers a job gets."""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, SetupOptions
from apache_beam.runners.direct.direct_runner import DirectRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from beam_envelope import (
    ANY_CONTEXT,
    DecryptFiles,
    EnvelopeError,
    KeyFileMissingError,
    arguments,
    create_shard,
    jobs,
)
from beam_envelope.transforms.plan import DecryptPlan, EncryptPlan, Task
from tests.running import listing, write_files


def parse(*words, decrypting=False):
    """Parse the words of an encrypting or decrypting job."""
    parser = argparse.ArgumentParser(prog="job", allow_abbrev=False)
    (arguments.add_decrypt_arguments if decrypting else arguments.add_encrypt_arguments)(parser)
    return jobs.parse(parser, [*words, "--output", "out", "--key", "local-kms://k.json"])


# -------------------------------------------------------------------------------------------------- options


def test_our_options_and_beams_are_told_apart():
    ours, beams = parse(
        "a", "b", "--context", "x=1", "--runner=FlinkRunner", "--flink_master", "host:1", "--save_main_session"
    )
    assert (ours.patterns, ours.context, ours.key) == (["a", "b"], ["x=1"], ["local-kms://k.json"])
    assert beams.get_all_options(drop_default=True) == {
        "runner": "FlinkRunner",
        "flink_master": "host:1",
        "save_main_session": True,
    }
    assert beams.view_as(SetupOptions).save_main_session


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a", "--contxt", "x=1"), "unknown option --contxt: did you mean --context?"),
        (("a", "--if_exists=skip"), "unknown option --if_exists=skip: did you mean --if-exists?"),
        (("a", "--splitlines=1MiB"), "unknown option --splitlines=1MiB: did you mean --split-lines?"),
        (("a", "--zzz"), "unknown option --zzz: neither beam-envelope nor Beam has it"),
        (("a", "--runer=FlinkRunner"), "unknown option --runer=FlinkRunner: neither beam-envelope nor Beam has it"),
        (("a", "--if-exists", "replace"), "argument --if-exists: invalid choice: 'replace'"),
        # Left alone, these files would be left out without a word.
        (("a", "--context", "x=1", "b"), "'b' is left over: give all files and patterns together, before the options"),
        (("a", "--runner=FlinkRunner", "b"), "'b' is left over: give all files and patterns together"),
    ],
)
def test_what_neither_knows_is_an_error_with_a_hint(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_abbreviated_option_is_not_guessed(capsys):
    with pytest.raises(SystemExit):
        parse("a", "--cont", "x=1")
    assert "unknown option --cont: did you mean --context?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "x"), "the context 'x': write NAME=VALUE, each name once"),
        (("--context", "x=1", "--context", "x=2"), "the context 'x=2': write NAME=VALUE, each name once"),
        (("--context", "x="), "the encryption context has an empty key or value at 'x'; KMS refuses those"),
        (("--context", "x=1", "--any-context"), "give --context or --any-context, not both"),
    ],
)
def test_a_context_that_is_none_is_refused(words, message):
    ours, _ = parse("a", *words, decrypting=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments.context_of(ours)


def test_values_of_a_context_may_hold_equals_signs():
    ours, _ = parse("a", "--context", "q=a=b")
    assert arguments.context_of(ours) == {"q": "a=b"}


def test_the_settings_reach_the_transforms():
    words = ("--split-lines=1MiB", "--header-lines=2", "--compression=zstd", "--if-exists=skip", "--relative-to=data")
    ours, _ = parse("a", "--context", "x=1", *words)
    transform = jobs.encrypt_transform(ours)
    assert transform.plan == EncryptPlan("out/", "skip", 1 << 20, "data/")
    assert transform.display_data() == {
        "output": "out/",
        "if_exists": "skip",
        "key": f"local-kms://{os.getcwd()}/k.json",
        "context": "x",
        "compression": "zstd",
    }
    assert transform.work._header_lines == 2
    ours, _ = parse("a", "--any-context", "--if-exists=overwrite", "--relative-to=sealed", decrypting=True)
    reader = jobs.decrypt_transform(ours)
    assert reader.plan == DecryptPlan("out/", "overwrite", "sealed/", reader.plan.manifest)
    assert (reader.plan.manifest.mode, reader.plan.manifest.context, transform.lists) == ("use", ANY_CONTEXT, True)
    ours, _ = parse("a", "--manifest=require", decrypting=True)
    assert jobs.decrypt_transform(ours).plan.manifest.mode == "require"
    assert not jobs.encrypt_transform(parse("a", "--no-manifest")[0]).lists
    assert reader.display_data()["context"] == "any"


# ------------------------------------------------------------------------------------------------- the plan


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of sources, which is the working directory's `data`."""
    monkeypatch.chdir(tmp_path)
    return write_files(tmp_path / "data", {"a/x": b"1", "b/x": b"22", "b/y": b"333"})


def test_the_tasks_of_all_patterns_are_planned_each_once(data):
    tasks = jobs.plan_tasks(EncryptPlan("out/"), ["data/a/x", "data/b/y", "data/b/y*"])
    assert [(task.source, task.target) for task in tasks] == [("data/a/x", "out/x"), ("data/b/y", "out/y")]


def test_two_sources_of_one_target_stop_the_job_before_it_starts(data):
    with pytest.raises(ValueError, match="data/a/x and data/b/x would both become out/x"):
        jobs.plan_tasks(EncryptPlan("out/"), ["data/a", "data/b"])


@pytest.mark.parametrize("if_exists", ["skip", "overwrite"])
@pytest.mark.parametrize("output", ["two/", "./two/"])
def test_an_output_that_is_another_patterns_input_stops_the_job_before_it_starts(data, if_exists, output):
    write_files(".", {"one/c/x": b"1", "two/c/x": b"2"})
    with pytest.raises(ValueError, match=rf"{output}c/x is an input of this job and would be replaced by an output"):
        jobs.plan_tasks(EncryptPlan(output, if_exists), ["one/**", "two/c/*"])


def test_the_first_shard_is_opened_before_the_job_starts(tmp_path, local_key):
    with create_shard(tmp_path / "a", key=local_key, context={"x": "1"}) as shard:
        shard.write(b"a")
    reader = DecryptFiles("out", key=local_key, context={"x": "1"})
    task = Task(f"{tmp_path}/a", 73, "out/a", 0, 73)
    reader.work.check(task)
    os.unlink(tmp_path / "_KEY_FOR_a.json")
    with pytest.raises(KeyFileMissingError):
        reader.work.check(task)


# ---------------------------------------------------------------------------------------------- the workers

BIG = jobs.SMALL_JOB_BYTES


@pytest.mark.parametrize(
    ("words", "n_tasks", "n_bytes", "mode", "workers"),
    [
        ([], 100, BIG, "multi_processing", 6),
        ([], 100, BIG - 1, "in_memory", 1),
        ([], 2, BIG, "multi_processing", 2),
        ([], 1, BIG, "in_memory", 1),
        ([], None, None, "multi_processing", 6),
        (["--direct_num_workers=3", "--direct_running_mode=multi_processing"], 1, 1, "multi_processing", 3),
        (["--direct_running_mode=in_memory"], 100, BIG, "in_memory", 1),
    ],
)
def test_with_no_runner_named_a_big_job_has_all_cores(monkeypatch, words, n_tasks, n_bytes, mode, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    pipeline = jobs.make_pipeline(PipelineOptions(words), n_tasks, n_bytes)
    direct = pipeline.options.view_as(DirectOptions)
    assert isinstance(pipeline.runner, FnApiRunner)
    assert (direct.direct_running_mode, direct.direct_num_workers) == (mode, workers)


def test_where_affinity_is_unknown_the_machines_cores_are_counted(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    pipeline = jobs.make_pipeline(PipelineOptions([]), 100, BIG)
    assert pipeline.options.view_as(DirectOptions).direct_num_workers == 7


def test_a_runner_that_is_named_is_used():
    pipeline = jobs.make_pipeline(PipelineOptions(["--runner=DirectRunner"]), 100, BIG)
    assert isinstance(pipeline.runner, DirectRunner)
    assert pipeline.options.view_as(DirectOptions).direct_num_workers == 1


# ------------------------------------------------------------------------------------------------- afterwards


class Result:
    """A job's result on a runner without metrics."""

    def metrics(self):
        raise NotImplementedError


def test_a_runner_without_metrics_gives_a_summary_of_nothing():
    assert jobs.counters(Result()) == {}
    assert jobs.summary(Result()) == {
        "files": 0,
        "files_skipped": 0,
        "plaintext_bytes": 0,
        "ciphertext_bytes": 0,
        "kms_calls": {},
    }


@pytest.mark.parametrize("output", ["out", "./out/", "out[1]", "{cwd}/out"])
def test_every_file_that_was_planned_must_have_landed(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    output = output.replace("{cwd}", str(tmp_path))
    folder = output if output.endswith("/") else f"{output}/"
    tasks = [Task(f"data/{number}", 1, f"{folder}sub/{number}", 0, 1) for number in range(12)]
    with pytest.raises(EnvelopeError) as caught:
        jobs.check_landed(tasks, output)
    assert str(caught.value) == (
        f"the runner reports success, but 12 of 12 files are missing, first {folder}sub/0. "
        "Run the job again with --if-exists=skip"
    )
    write_files(folder, {f"sub/{number}": b"" for number in range(12)})
    jobs.check_landed(tasks, output)
    os.unlink(f"{folder}sub/7")
    with pytest.raises(EnvelopeError, match=r"1 of 12 files are missing, first .*sub/7"):
        jobs.check_landed(tasks, output)


def a_worker_that_died():
    raise RuntimeError("Worker subprocess exited with return code 137")


def test_a_dead_worker_is_told_of_also_where_the_runner_swallows_the_first_word_and_fails_by_itself():
    """Beam closes its workers after an error of its own, and only logs what is raised meanwhile."""
    with (  # noqa: PT012  # what a runner does
        pytest.raises(EnvelopeError, match=r"of this machine died \(Worker subprocess"),
        jobs.fail_when_a_worker_dies(),
    ):
        with contextlib.suppress(EnvelopeError):
            threading.Thread(target=a_worker_that_died).start()
            time.sleep(30)
        raise RuntimeError("Channel closed prematurely.")
    with pytest.raises(RuntimeError, match="Channel closed"), jobs.fail_when_a_worker_dies():
        raise RuntimeError("Channel closed prematurely.")


def test_a_worker_that_starts_after_another_died_is_ended_too():
    """Beam waits for all of its workers after an error, also for one that was started meanwhile."""
    with (  # noqa: PT012  # what a runner does
        pytest.raises(EnvelopeError, match="of this machine died"),
        jobs.fail_when_a_worker_dies(),
    ):
        threading.Thread(target=a_worker_that_died).start()
        try:
            time.sleep(30)
        finally:
            late = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "sdk_worker_main"])
            status = late.wait(20)
    assert status == -signal.SIGKILL


WORKER_KILLED = """
import contextlib, os, signal, subprocess, sys, threading, time
from pathlib import Path
from beam_envelope import cli


def kill_the_first():
    found = []
    while not found:
        time.sleep(0.05)
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # a thread or a shell that has ended meanwhile
                for shell in Path(f"/proc/self/task/{task}/children").read_text().split():
                    found += Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
    os.kill(int(found[0]), signal.SIGKILL)

threading.Thread(target=kill_the_first, daemon=True).start()
status = cli.main(sys.argv[1:])
left = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True).stdout
print(status, sum(line.split()[0] == str(os.getpid()) and "sdk_worker_main" in line for line in left.splitlines()[1:]))
"""


@pytest.mark.skipif(not os.path.exists(f"/proc/self/task/{os.getpid()}/children"), reason="Linux lists children there")
def test_a_job_whose_worker_is_killed_ends_with_an_error_and_leaves_no_worker(tmp_path, local_key):
    """Beam's runner would wait for the dead worker for ever."""
    source = write_files(tmp_path / "in", {f"{number}.txt": b"x" * 1000 for number in range(4)})
    words = ["encrypt", str(source), "--output", str(tmp_path / "out"), "--key", str(local_key)]
    workers = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    program = [sys.executable, "-c", WORKER_KILLED, *words, *workers]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "1 0\n", done.stderr
    assert "a worker process of this machine died (Worker subprocess exited with return code" in done.stderr
    assert "Finish the job with --if-exists=skip" in done.stderr
    assert listing(tmp_path / "out") == []
