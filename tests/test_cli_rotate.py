"""`beam-envelope rotate`: what it prints, with which exit status, and that a killed rotation is finished by another."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineState

from beam_envelope import LocalKms, WrongKeyError, cli, console, open_shard
from beam_envelope.console import JobProgress
from beam_envelope.formats.keyfile import KeyFile, WrappedDataKey, key_file_name
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import generate_local_key
from beam_envelope.progress import append_progress
from tests.running import decrypt, encrypt, listing, read_files, write_files

CONTEXT = {"dataset": "flights"}
CONTENTS = {"a.csv": b"alpha", "b.csv": b"beta", "sub/c.csv": b""}
OLD, NEW = "local-kms://keyring.json?name=old", "local-kms://keyring.json?name=new"


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Run `rotate` in this process, in a folder with shards in `sealed`: exit status, stdout, stderr."""
    monkeypatch.setattr(FileSystems, "_pipeline_options", FileSystems._pipeline_options)
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new", "other"):
        generate_local_key(LocalKms("keyring.json", name))
    encrypt(write_files("data", CONTENTS), "sealed", OLD, context=CONTEXT)

    def run_words(*words):
        clear_caches()
        try:
            status = cli.main(["rotate", *(str(word) for word in words)])
        except SystemExit as ended:
            status = ended.code
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return run_words


def opens(key, folder="sealed", contents=CONTENTS):
    """Return the shards that a key alone opens."""
    clear_caches()
    opened = []
    for name, content in contents.items():
        try:
            with open_shard(Path(folder, name), key=key, context=CONTEXT) as shard:
                assert shard.read() == content
            opened.append(name)
        except WrongKeyError:
            pass
    return opened


def test_it_rotates_and_says_so(run):
    status, out, err = run("sealed", "--from", OLD, "--to", NEW)
    assert (status, err) == (0, "Rotating 4 key files ...\n")  # of three shards, and the manifest
    lines = out.splitlines()
    assert re.split(" {2,}", lines[0]) == ["opened by", "now opened by", "key files"]
    assert re.fullmatch(r"local-kms:old/[0-9a-f]{32}  local-kms:new/[0-9a-f]{32} +4", lines[1])
    assert re.fullmatch(
        r"Changed 4 of 4 key files in \d+\.\d s; 0 need no change, 0 failed\. KMS calls: 2 Decrypt, 2 Encrypt\.",
        lines[2],
    )
    assert (opens(OLD), opens(NEW)) == ([], list(CONTENTS))
    status, out, _ = run("sealed/**", "--from", OLD, "--to", NEW)
    assert (status, out.startswith("Changed 0 of 4 key files in ")) == (0, True)
    assert out.endswith("; 4 need no change, 0 failed. KMS calls: none.\n")


def test_a_dry_run_changes_nothing_and_says_what_would_be(run):
    before = read_files("sealed")
    status, out, err = run("sealed", "--from", OLD, "--to", NEW, "--dry-run", "--log", "log")
    assert (status, err) == (0, "Looking at 4 key files ...\n")
    assert "would be opened by" in out
    assert "Would change 4 of 4 key files in " in out
    assert read_files("sealed") == before
    rows = [json.loads(line) for line in Path("log").read_text().splitlines()]
    assert [(row["changed"], row["dry_run"]) for row in rows] == [(True, True)] * 4


def test_json_tells_the_same_in_numbers(run):
    status, out, _ = run("sealed", "--from", OLD, "--to", NEW, "--json")
    figures = json.loads(out)
    (change,) = figures.pop("changes")
    assert (len(change["before"]), len(change["after"]), change["key_files"]) == (1, 1, 4)
    assert figures.pop("seconds") > 0
    assert (status, figures) == (
        0,
        {
            "key_files": 4,
            "changed": 4,
            "unchanged": 0,
            "failed": 0,
            "dry_run": False,
            "kms_calls": {"Decrypt": 2, "Encrypt": 2},
            "failures": [],
        },
    )


def test_keys_are_added_and_removed(run):
    assert run("sealed", "--from", OLD, "--add", NEW, "--add", "local-kms://keyring.json?name=other")[0] == 0
    assert opens(OLD) == opens(NEW) == opens("local-kms://keyring.json?name=other") == list(CONTENTS)
    assert run("sealed", "--from", NEW, "--remove", OLD, "--remove", "local-kms://keyring.json?name=other")[0] == 0
    assert (opens(OLD), opens("local-kms://keyring.json?name=other"), opens(NEW)) == ([], [], list(CONTENTS))


def test_files_that_fail_are_listed_and_the_others_rotated(run):
    write_files("sealed", {"_KEY_FOR_[red]bad\x1b.json": b"{}"})
    status, out, err = run("sealed", "--from", OLD, "--to", NEW, "--log", "audit/log.jsonl")
    assert status == 1
    assert "Changed 4 of 5 key files in " in out
    lines = err.splitlines()
    assert lines[1].startswith("sealed/_KEY_FOR_[red]bad\\x1b.json is not a readable key file: ")
    assert lines[2] == (
        "beam-envelope rotate: 1 key file could not be rotated, and is as it was. Mend what is wrong, and run it again"
    )
    assert opens(NEW) == list(CONTENTS)
    rows = [json.loads(line) for line in Path("audit/log.jsonl").read_text().splitlines()]
    assert sorted((row["key_file"], row.get("changed"), row.get("error")) for row in rows) == [
        ("sealed/_KEY_FOR_[red]bad\x1b.json", None, "FormatError"),
        ("sealed/_KEY_FOR_a.csv.json", True, None),
        ("sealed/_KEY_FOR_b.csv.json", True, None),
        ("sealed/_MANIFEST.json", True, None),
        ("sealed/sub/_KEY_FOR_c.csv.json", True, None),
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["time"]) for row in rows)
    assert listing("audit") == ["log.jsonl"]


def test_of_many_files_that_fail_some_are_listed(run):
    write_files("bad", {key_file_name(f"{number:03}"): b"{}" for number in range(30)})
    status, _, err = run("bad", "--from", OLD, "--to", NEW)
    assert (status, err.count("is not a readable key file")) == (1, 20)
    assert (
        "30 key files could not be rotated, and are as they were. 10 key files more; --log FILE tells of each." in err
    )
    status, out, err = run("bad", "--from", OLD, "--to", NEW, "--json")
    assert (status, len(json.loads(out)["failures"])) == (1, 30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none/", "--from", OLD, "--to", NEW), "none/: No such file or directory"),
        (
            ("data", "--from", OLD, "--to", NEW),
            (
                "data/: no key file is there; quote a pattern so that the shell leaves it alone, and use ** for "
                "sub-folders"
            ),
        ),
        (
            ("sealed", "--from", OLD),
            "nothing to do: give a key to rotate to (--to), to add (--add) or to remove (--remove)",
        ),
        (
            ("sealed", "--from", OLD, "--to", NEW, "--log", "data/a.csv"),
            "data/a.csv: the log exists, and is kept; name another",
        ),
        (("sealed", "--from", OLD, "--to", NEW, "--max-requests-per-s=0"), "max_requests_per_s is above 0, not 0.0"),
        (
            ("sealed", "--from", OLD, "--to", "local-kms://none.json"),
            "there is no keyring at {cwd}/none.json. Make one: beam-envelope keygen --key 'local-kms://{cwd}/none.json'",
        ),
    ],
)
def test_a_mistake_is_one_clear_line_status_1_and_no_change(run, tmp_path, words, message):
    before = read_files(tmp_path)
    status, out, err = run(*words)
    assert (status, out) == (1, "")
    assert err.removeprefix("Rotating 4 key files ...\n") == (
        f"beam-envelope rotate: {message.replace('{cwd}', str(tmp_path))}\n"
    )
    assert read_files(tmp_path) == before


def test_a_wrong_command_line_is_status_2(run):
    status, _, err = run("sealed", "--to", NEW)
    assert (status, "the following arguments are required: --from" in err) == (2, True)
    status, _, err = run("sealed", "--form", OLD)
    assert status == 2


def test_key_files_that_a_runner_did_not_look_at_are_missed(run, monkeypatch):
    from beam_envelope import rotate_command

    def find(pattern):
        paths, others = find_to_rotate(pattern)
        return [*paths, "sealed/lost"], others

    find_to_rotate = rotate_command.find_to_rotate
    monkeypatch.setattr(rotate_command, "find_to_rotate", find)
    status, _, err = run("sealed", "--from", OLD, "--to", NEW)
    assert status == 1
    assert err.endswith("the runner reports success, but 1 of 5 key files were passed over. Run the rotation again\n")


def test_a_job_that_did_not_end_well_is_status_1(run, monkeypatch):
    class Result:
        state = PipelineState.CANCELLED

        def wait_until_finish(self):
            return self.state

    monkeypatch.setattr(FnApiRunner, "run_pipeline", lambda *_: Result())
    status, out, err = run("sealed", "--from", OLD, "--to", NEW)
    assert (status, out, err.splitlines()[-1]) == (1, "", "The job ended as CANCELLED. Run it again to finish it.")


def test_worker_processes_do_the_same(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    write_files("sealed", {"_KEY_FOR_bad.json": b"{}"})
    workers = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
    status, out, err = run("sealed", "--from", OLD, "--to", NEW, *workers)
    assert (status, "Changed 4 of 5 key files in " in out, "2 Decrypt, 2 Encrypt." in out) == (1, True, True), err
    assert "sealed/_KEY_FOR_bad.json is not a readable key file" in err
    assert opens(NEW) == list(CONTENTS)


def test_help_teaches_by_examples(run):
    status, out, _ = run("--help")
    assert status == 0
    examples = [line for line in out.splitlines() if line.startswith("  beam-envelope rotate ")]
    assert len(examples) == 5
    assert all("--from" in line for line in examples)


def test_progress_is_told_in_key_files(capsys, monkeypatch):
    monkeypatch.setattr(console, "_LINE_S", 0.05)
    with JobProgress("Rotating", 3, None) as progress:
        append_progress({"key_files": 1, "kms_ReEncrypt": 1})
        append_progress({"key_files_failed": 1})
        progress._stop.wait(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[-1]) == ("Rotating 3 key files ...", "2/3 key files, 1 KMS call")


# ------------------------------------------------------------------------------------------ killed, interrupted


@pytest.fixture
def many(tmp_path):
    """Return a folder of 200 key files of 20 data keys, the keyring's URIs, and each file's data key id."""
    keys = [LocalKms(tmp_path / "keyring.json", name) for name in ("old", "new")]
    for key in keys:
        generate_local_key(key)
    ids = {}
    for number in range(20):
        with keys[0].generate_data_key(CONTEXT) as data_key:
            wrapped = WrappedDataKey.of(data_key)
        for copy in range(10):
            name = f"{number % 3}/{key_file_name(f'part-{number:02}-{copy}')}"
            write_files(tmp_path / "sealed", {name: KeyFile((wrapped,), CONTEXT).to_bytes()})
            ids[name] = wrapped.key_id
    return tmp_path / "sealed", keys, ids


def check_all_open(folder, keys, ids):
    """Open every key file with any of some keys; return how many the last key opens."""
    found = {name: raw for name, raw in read_files(folder).items() if not Path(name).name.startswith("_TMP_")}
    assert found.keys() == ids.keys()
    by_last = 0
    for name, raw in found.items():
        (data_key,) = KeyFile.from_bytes(raw, name).data_keys
        (form,) = data_key.wrapped_keys
        (key,) = [key for key in keys if key.may_open(form)]
        with key.unwrap(form, CONTEXT) as opened:
            assert opened.key_id == ids[name]
        by_last += key == keys[-1]
    return by_last


def test_a_rotation_killed_at_any_step_loses_nothing_and_is_finished_by_another(many, forker):
    folder, keys, ids = many
    words = ("rotate", folder, "--from", keys[0], "--to", keys[1])
    chosen = random.Random(5)
    done, kills = 0, 0
    while done < 200:
        status, log = forker.run(*words, step=chosen.randrange(1, 700), below=folder)
        assert status in {0, -signal.SIGKILL}, log
        kills += status != 0
        now = check_all_open(folder, keys, ids)
        assert now >= done
        done = now
        assert status != 0 or done == 200
    assert kills > 1
    status, log = forker.run(*words)
    assert (status, "Changed 0 of 200 key files" in log) == (0, True)
    left = [name for name in listing(folder) if name not in ids]
    assert all(Path(name).name.startswith("_TMP_") for name in left)


def test_the_command_killed_in_the_middle_is_finished_by_another(many):
    folder, keys, ids = many
    command = [sys.executable, "-m", "beam_envelope.cli", "rotate", str(folder)]
    options = ["--from", str(keys[0]), "--to", str(keys[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def changed():
        return sum(b"new/" in raw for raw in read_files(folder).values())

    with subprocess.Popen(
        [*command, *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        while process.poll() is None and not changed():
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert check_all_open(folder, keys, ids) > 0
    assert cli.main(["rotate", str(folder), *options]) == 0
    assert check_all_open(folder, keys, ids) == 200


def test_ctrl_c_says_how_to_go_on_and_is_status_130(many, forker):
    folder, keys, ids = many
    words = ("rotate", folder, "--from", keys[0], "--to", keys[1])
    status, log = forker.run(*words, step=400, signal=signal.SIGINT, below=folder)
    assert (status, log.splitlines()[-1]) == (130, "Interrupted. Run it again to finish it.")
    assert "Traceback" not in log
    check_all_open(folder, keys, ids)
    assert forker.run(*words)[0] == 0
    assert check_all_open(folder, keys, ids) == 200


def test_a_manifest_goes_along_with_all_of_its_shards(run):
    status, out, err = run("sealed/**.csv", "--from", OLD, "--to", NEW)
    assert (status, "Changed 4 of 4 key files" in out, "stays as it is" in err) == (0, True, False)
    decrypt("sealed/", "opened", NEW, context=CONTEXT, manifest="require")
    assert read_files("opened") == CONTENTS


def test_a_manifest_that_lists_more_stays_and_is_named_with_what_to_do(run):
    before = Path("sealed/_MANIFEST.json").read_bytes()
    status, out, err = run("sealed/*.csv", "--from", OLD, "--to", NEW)
    assert (status, "Changed 2 of 2 key files" in out) == (0, True)
    assert err.splitlines()[-1] == (
        "sealed/_MANIFEST.json lists more shards than these, and stays as it is: who reads them needs a key that opens "
        "it. Rotate its folder, or add the new key to it (--add)"
    )
    assert Path("sealed/_MANIFEST.json").read_bytes() == before
    assert run("sealed/_MANIFEST.json", "--from", OLD, "--add", NEW)[0] == 0
    decrypt("sealed/*.csv", "opened", NEW, context=CONTEXT, manifest="require")
    assert read_files("opened") == {name: CONTENTS[name] for name in ("a.csv", "b.csv")}


def test_manifests_of_folders_below_go_along_too_and_a_broken_one_is_told(run):
    encrypt(write_files("more", {"x.csv": b"x"}), "days/1", OLD, context=CONTEXT)
    encrypt(write_files("even more", {"y.csv": b"y"}), "days/2", OLD, context=CONTEXT)
    Path("days/2/_MANIFEST.json").write_bytes(b"{")
    status, out, err = run("days/*/*.csv", "--from", OLD, "--to", NEW)
    assert (status, "Changed 3 of 4 key files" in out) == (1, True)
    assert "days/2/_MANIFEST.json is not a readable manifest" in err
    decrypt("days/1/*.csv", "opened", NEW, context=CONTEXT, manifest="require")
    assert read_files("opened") == {"x.csv": b"x"}


def test_a_rotation_of_columns_keys_leaves_the_manifest_which_is_under_the_footers_key(run):
    other = OLD.replace("old", "other")
    words = ("--key", OLD, "--columns", f"b={other}", "--context", "dataset=flights")
    write_files("rows", {"t.csv": b"a,b\n1,2\n"})
    assert cli.main(["encrypt", "rows/*.csv", "--format=parquet", "--output", "tables", *words]) == 0
    before = Path("tables/_MANIFEST.json").read_bytes()
    status, out, _ = run("tables", "--from", other, "--to", NEW)
    assert (status, "Changed 1 of 2 key files" in out) == (0, True)
    assert Path("tables/_MANIFEST.json").read_bytes() == before
    readers = ("--key", OLD, "--key", NEW, "--context", "dataset=flights", "--manifest=require")
    assert cli.main(["verify", "tables", *readers]) == 0
