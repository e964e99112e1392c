"""`beam-envelope verify`: what it prints, and that its exit status is 0 only if all is well."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineState
from rich.filesize import decimal

from beam_envelope import LocalKms, cli, jobs, verify_command
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import generate_local_key
from tests.running import encrypt, listing, read_files, write_files

CONTEXT = {"dataset": "flights"}
CONTENTS = {"a.csv": b"alpha" * 10_000, "b.csv": b"beta", "sub/c.csv": b""}
KEY, OTHER = "local-kms://keyring.json?name=ours", "local-kms://keyring.json?name=theirs"
OURS = ("--key", KEY, "--context", "dataset=flights")


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Run `verify` in this process, in a folder with shards in `sealed`: exit status, stdout, stderr."""
    monkeypatch.setattr(FileSystems, "_pipeline_options", FileSystems._pipeline_options)
    monkeypatch.chdir(tmp_path)
    for name in ("ours", "theirs"):
        generate_local_key(LocalKms("keyring.json", name))
    encrypt(write_files("data", CONTENTS), "sealed", KEY, context=CONTEXT)

    def run_words(*words):
        clear_caches()
        try:
            status = cli.main(["verify", *(str(word) for word in words)])
        except SystemExit as ended:
            status = ended.code
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return run_words


def damage(name="sealed/a.csv", position=100):
    data = bytearray(Path(name).read_bytes())
    data[position] ^= 1
    Path(name).write_bytes(data)


def stored():
    """Return how much is stored, without key files, as the command prints it."""
    return decimal(sum(len(raw) for name, raw in read_files("sealed").items() if "_KEY_FOR_" not in name))


def test_all_is_well_and_the_status_is_0(run):
    before = read_files("sealed")
    status, out, err = run("sealed", *OURS)
    assert (status, err) == (0, f"Verifying 4 files, {stored()} ...\n")  # three shards, and the manifest
    assert re.fullmatch(
        r"Verified 4 files in \d+\.\d s, 50\.0 kB authenticated \(\S+ \S+/s\): no problems\. KMS calls: 2 Decrypt\.\n",
        out,
    )
    assert read_files("sealed") == before


def test_problems_are_a_table_and_the_status_is_1(run):
    damage()
    write_files("sealed", {"[red]plain\x1b.csv": b"1,2\n", "_TMP_1": b"x"})
    Path("sealed/sub/c.csv").unlink()
    status, out, err = run("sealed", *OURS)
    assert (status, err.splitlines()[-1]) == (1, "beam-envelope verify: 3 of 6 files have problems")
    lines = [re.split(" {2,}", line.rstrip()) for line in out.splitlines()]
    assert lines[0] == ["file", "kind", "problem"]
    assert [line[:2] for line in lines[1:4]] == [
        ["sealed/[red]plain\\x1b.csv", "file"],
        ["sealed/a.csv", "shard"],
        ["sealed/sub/c.csv", "shard"],
    ]
    assert lines[1][2].startswith("is not listed by the manifest")
    assert lines[3][2].startswith("is listed by the manifest, and not there")
    assert lines[2][2].startswith("was changed after it was written: one of the chunks 0 to 2 does not authenticate")
    assert lines[4] == ["sealed/_TMP_1: unfinished; delete it if no job is running"]
    assert "3 problems. KMS calls: 2 Decrypt." in out
    status, out, err = run("sealed", *OURS, "--manifest=ignore")
    assert (status, err.splitlines()[-1]) == (1, "beam-envelope verify: 3 of 6 files have problems")
    lines = [re.split(" {2,}", line.rstrip()) for line in out.splitlines()]
    assert [line[:2] for line in lines[1:4]] == [
        ["sealed/[red]plain\\x1b.csv", "file"],
        ["sealed/a.csv", "shard"],
        ["sealed/sub/_KEY_FOR_c.csv.json", "key file"],
    ]
    assert "3 problems. KMS calls: 1 Decrypt." in out


def test_an_unfinished_file_alone_is_no_problem(run):
    write_files("sealed", {"_TMP_1": b"x"})
    status, out, _ = run("sealed", *OURS)
    assert status == 0
    assert "sealed/_TMP_1: unfinished; delete it if no job is running\n" in out
    assert "Verified 5 files" in out


def test_a_quick_look_does_not_see_damage_inside_and_says_what_it_checked(run):
    damage()
    status, out, err = run("sealed", *OURS, "--quick")
    assert (status, err) == (0, f"Looking at 4 files, {stored()} ...\n")
    assert re.fullmatch(
        r"Looked at 4 files in \d+\.\d s, key files, commitments and lengths checked: no problems\. "
        r"KMS calls: 2 Decrypt\.\n",
        out,
    )
    damage(position=5)
    status, out, err = run("sealed", *OURS, "--quick")
    assert (status, err.splitlines()[-1]) == (1, "beam-envelope verify: 1 of 4 files has a problem")
    assert "and its key file do not belong together" in out


def test_json_tells_the_same_in_numbers(run):
    damage()
    write_files("sealed", {"_TMP_1": b"x"})
    status, out, _ = run("sealed", *OURS, "--json")
    figures = json.loads(out)
    assert figures.pop("seconds") > 0
    (problem,) = figures.pop("problem_files")
    assert (problem["path"], problem["kind"]) == ("sealed/a.csv", "shard")
    assert problem["problem"].startswith("sealed/a.csv was changed after it was written")
    assert (status, figures) == (
        1,
        {
            "files": 5,
            "problems": 1,
            "quick": False,
            "bytes_authenticated": 4,
            "kms_calls": {"Decrypt": 2},
            "not_checked": [
                {
                    "path": "sealed/_TMP_1",
                    "kind": "unfinished",
                    "problem": "unfinished; delete it if no job is running",
                }
            ],
        },
    )


def test_of_many_problems_some_are_shown_and_all_are_in_the_log(run):
    write_files("bad", {f"{number:03}": b"plain" for number in range(30)})
    status, out, _ = run("bad", *OURS, "--log", "audit/log.jsonl")
    assert (status, out.count("is plain data")) == (1, 20)
    assert "10 more with problems; audit/log.jsonl tells of each." in out
    rows = [json.loads(line) for line in Path("audit/log.jsonl").read_text().splitlines()]
    assert sorted(row["path"] for row in rows) == [f"bad/{number:03}" for number in range(30)]
    assert not any(row["ok"] for row in rows)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["time"]) for row in rows)
    assert listing("audit") == ["log.jsonl"]
    status, out, _ = run("bad", *OURS, "--json")
    assert (status, len(json.loads(out)["problem_files"])) == (1, 30)
    write_files("left", {f"_TMP_{number:03}": b"plain" for number in range(30)})
    status, out, _ = run("left", *OURS)
    assert (status, out.count("unfinished; delete it"), "10 more like these." in out) == (0, 20, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none/", *OURS), "none/: No such file or directory"),
        (
            ("none*", *OURS),
            "none*: no file matches; quote a pattern so that the shell leaves it alone, and use ** to look into",
        ),
        (("sealed", *OURS, "--log", "data/a.csv"), "data/a.csv: the log exists, and is kept; name another"),
        (("sealed", *OURS, "--any-context"), "give --context or --any-context, not both"),
    ],
)
def test_a_mistake_is_one_clear_line_and_status_1(run, tmp_path, words, message):
    before = read_files(tmp_path)
    status, out, err = run(*words)
    assert (status, out) == (1, "")
    (last,) = err.splitlines()
    assert last.startswith(f"beam-envelope verify: {message}")
    assert read_files(tmp_path) == before


def test_a_wrong_command_line_is_status_2(run):
    status, _, err = run("sealed")
    assert (status, "no key is set: pass key=" in err) == (2, True)
    status, _, err = run("sealed", *OURS, "--quik")
    assert (status, "did you mean --quick?" in err) == (2, True)


def test_another_key_or_context_is_not_well(run):
    status, out, _ = run("sealed", "--key", OTHER, "--context", "dataset=flights")
    assert (status, out.count("the keys allowed here are")) == (1, 4)  # of three shards, and of the manifest
    status, out, _ = run("sealed", "--key", KEY)
    assert (status, out.count("was written with another encryption context")) == (1, 4)
    status, out, _ = run("sealed", "--key", KEY, "--key", OTHER, "--any-context")
    assert status == 0


def test_files_that_a_runner_did_not_look_at_are_missed(run, monkeypatch):
    find = verify_command.find_files
    monkeypatch.setattr(verify_command, "find_files", lambda pattern: {**find(pattern), "sealed/lost": 3})
    status, _, err = run("sealed", *OURS)
    assert status == 1
    assert err.endswith("the runner reports success, but 1 of 5 files were passed over. Run the verification again\n")


def test_a_job_that_did_not_end_well_is_status_1(run, monkeypatch):
    class Result:
        state = PipelineState.CANCELLED

        def wait_until_finish(self):
            return self.state

    monkeypatch.setattr(FnApiRunner, "run_pipeline", lambda *_: Result())
    status, out, err = run("sealed", *OURS)
    assert (status, out, err.splitlines()[-1]) == (1, "", "The job ended as CANCELLED. Run it again.")


def test_a_runner_without_metrics_is_believed_by_its_log_only(run, monkeypatch):
    damage()
    monkeypatch.setattr(jobs, "counters", lambda _: {})
    status, _, err = run("sealed", *OURS)
    assert (status, err.splitlines()[-1]) == (1, "beam-envelope verify: 1 of 4 files has a problem")
    damage()
    assert run("sealed", *OURS)[0] == 0
    status, _, err = run("sealed", *OURS, "--runner=FnApiRunner")
    assert (status, "the runner reports no metrics, so nobody knows how it went" in err) == (1, True)


def test_with_a_runner_of_the_users_the_log_or_the_workers_tell(run):
    damage()
    status, out, err = run("sealed", *OURS, "--runner=FnApiRunner")
    assert (status, out.startswith("Verified 4 files")) == (1, True)
    assert "1 of 4 files has a problem; --log FILE, or the log of the workers, tells of each" in err
    status, out, err = run("sealed", *OURS, "--runner=FnApiRunner", "--log", "log")
    assert (status, out.startswith("file ")) == (1, True)


def test_worker_processes_do_the_same(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    damage()
    workers = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
    status, out, err = run("sealed", *OURS, *workers)
    assert (status, "Verified 4 files in " in out, "1 problem." in out) == (1, True, True), err
    assert re.search(r"KMS calls: [23] Decrypt\.", out)
    damage()
    assert run("sealed", *OURS, *workers)[0] == 0


def test_help_teaches_by_examples_and_says_what_is_not_noticed(run):
    status, out, _ = run("--help")
    assert status == 0
    examples = [line for line in out.splitlines() if line.startswith("  beam-envelope verify ")]
    assert len(examples) == 3
    assert all("--key" in line for line in examples)
    assert "Without a manifest, a shard that is gone together with its key file" in out
    assert "Exit status: 0 if all is well" in out
