"""The command: what it prints, with which exit status, and that what it says is so."""

import hashlib
import json
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import threading

import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineState

import beam_envelope
from beam_envelope import cli, console, jobs
from beam_envelope.formats.keyfile import TEMPORARY_PREFIX
from beam_envelope.formats.shard_layout import shard_size
from beam_envelope.keys.provider import kms_calls
from tests.running import listing, read_files, with_manifest, write_files

CONTENTS = {"a.csv": b"alpha\n" * 10_000, "sub/b.csv": b"beta\n", "sub/empty": b""}
CONTEXT = ("--context", "dataset=flights")
NO_FILE_MATCHES = (
    "{}: no file matches; quote a pattern so that the shell leaves it alone, and use ** to look into sub-folders"
)


@pytest.fixture(autouse=True)
def settings_of_this_process(monkeypatch):
    """Put back what the command sets for its whole process; and count KMS calls from here on."""
    levels = {name: logging.getLogger(name).level for name in ("apache_beam", "root")}
    monkeypatch.setattr(FileSystems, "_pipeline_options", FileSystems._pipeline_options)
    kms_calls.counts.clear()
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Run the command in this process, in a folder that holds `data`: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    write_files("data", CONTENTS)

    def run_words(*words):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as ended:
            status = ended.code
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return run_words


@pytest.fixture
def key(run):
    """A key, in the keyring that the examples name."""
    run("keygen", "--key", "local-kms://keyring.json")
    return "local-kms://keyring.json"


@pytest.fixture
def sealed(run, key):
    """The data, encrypted into `sealed`."""
    status, _, err = run("encrypt", "data", "--output", "sealed", "--key", key, *CONTEXT)
    assert status == 0, err
    return "sealed"


# --------------------------------------------------------------------------------------------------- keygen


def test_keygen_makes_a_keyring_that_only_its_owner_reads(run, tmp_path):
    status, out, err = run("keygen", "--key", "local-kms://keyring.json")
    assert (status, err) == (0, "")
    assert re.fullmatch(
        rf"Made key default/[0-9a-f]{{32}} in {tmp_path}/keyring\.json\. "
        r"Keep a copy in a safe place: without it, what it encrypts is lost\.\n",
        out,
    )
    assert stat.S_IMODE(os.stat("keyring.json").st_mode) == 0o600


def test_keygen_replaces_no_key_but_adds_one_of_another_name(run, key, tmp_path):
    before = (tmp_path / "keyring.json").read_bytes()
    status, out, err = run("keygen", "--key", key)
    assert (status, out) == (1, "")
    assert err == (
        f"beam-envelope keygen: the keyring {tmp_path}/keyring.json already has a key named 'default'; replacing it "
        "would make all that it wrapped unreadable. Name another: "
        f"beam-envelope keygen --key 'local-kms://{tmp_path}/keyring.json?name=NEW'\n"
    )
    assert (tmp_path / "keyring.json").read_bytes() == before
    status, out, _ = run("keygen", "--key", f"{key}?name=pii")
    assert (status, out[:13]) == (0, "Made key pii/")


def test_keygen_for_aws_says_how_to_ask_aws(run):
    status, out, err = run("keygen", "--key", "aws-kms://alias/etl")
    assert (status, out) == (1, "")
    assert err == (
        "beam-envelope keygen: keygen makes local keys only. For aws-kms://alias/etl, ask AWS: aws kms create-key, "
        "then aws kms create-alias --alias-name alias/NAME --target-key-id ID\n"
    )


def test_names_that_look_like_markup_are_printed_as_they_are(run):
    status, out, _ = run("keygen", "--key", "local-kms://[red]/[/]keyring.json")
    assert (status, "/[red]/[/]keyring.json. Keep" in out) == (0, True)
    status, _, err = run("keygen", "--key", "local-kms://[red]/[/]keyring.json")
    assert (status, "/[red]/[/]keyring.json already" in err) == (1, True)
    run("keygen", "--key", "local-kms://k.json")
    status, out, err = run("encrypt", "data", "--output", "[/b]out", "--key", "local-kms://k.json")
    assert (status, "into [/b]out." in out) == (0, True), err
    status, out, _ = run("inspect", "[/b]out/")
    assert "[/b]out/a.csv" in out


# ------------------------------------------------------------------------------------------ encrypt and decrypt


def test_what_is_encrypted_is_decrypted(run, key):
    status, out, err = run("encrypt", "data", "--output", "sealed/", "--key", key, *CONTEXT)
    assert (status, err) == (0, "Encrypting 3 files, 60.0 kB ...\n")
    assert re.fullmatch(
        r"Encrypted 3 files, 60\.0 kB in \d+\.\d s \([\d.]+ [kMG]?B?(bytes)?/s\) into sealed/\. "
        r"KMS calls: 2 GenerateDataKey, and 1 to check the key first\.\n",
        out,
    )
    assert listing("sealed") == with_manifest(*CONTENTS)
    status, out, _ = run("decrypt", "sealed/**", "--output", "opened/", "--key", key, *CONTEXT)
    assert status == 0
    assert out.startswith("Decrypted 3 files, 60.0 kB in ")
    assert read_files("opened") == CONTENTS


def test_json_tells_the_same_in_numbers(run, key):
    words = ("--key", key, *CONTEXT, "--json")
    status, out, _ = run("encrypt", "data", "--output", "sealed", *words)
    figures = json.loads(out)
    assert 0 < figures.pop("seconds") < 60
    assert (status, figures) == (
        0,
        {
            "output": "sealed",
            "files": 3,
            "files_skipped": 0,
            "plaintext_bytes": 60_005,
            "ciphertext_bytes": sum(shard_size(len(content)) for content in CONTENTS.values()),
            "kms_calls": {"GenerateDataKey": 2},  # one for the manifest
            "kms_calls_to_check": {"GenerateDataKey": 1},
        },
    )
    os.unlink("sealed/a.csv")
    status, out, _ = run("encrypt", "data", "--output", "sealed", "--if-exists", "skip", *words)
    figures = json.loads(out)
    assert (status, figures["files"], figures["files_skipped"]) == (0, 1, 2)
    status, out, _ = run("decrypt", "sealed", "--output", "opened", *words)
    assert (status, json.loads(out)["plaintext_bytes"]) == (0, 60_005)
    assert read_files("opened") == CONTENTS


def test_skipped_files_are_counted_in_the_summary(run, sealed, key):
    os.unlink("sealed/a.csv")
    status, out, _ = run("encrypt", "data", "--output", sealed, "--key", key, *CONTEXT, "--if-exists=skip")
    assert status == 0
    assert out.startswith("Encrypted 1 file, 2 skipped, 60.0 kB in ")


def test_all_options_of_a_job_are_taken(run, key):
    options = ("--split-lines=20kB", "--header-lines=1", "--compression=zstd", "--relative-to=data", "--key", key)
    run("keygen", "--key", f"{key}?name=second")
    status, _, err = run("encrypt", "data/a.csv", "--output", "sealed", *options, "--key", f"{key}?name=second")
    assert status == 0, err
    assert listing("sealed") == with_manifest("a-00000-of-00003.csv", "a-00001-of-00003.csv", "a-00002-of-00003.csv")
    run("decrypt", "sealed", "--output", "opened", "--key", f"{key}?name=second")
    parts = list(read_files("opened").values())
    assert parts[0] + b"".join(part.removeprefix(b"alpha\n") for part in parts[1:]) == CONTENTS["a.csv"]


def test_options_of_beam_reach_the_pipeline(run, key, monkeypatch):
    seen = []
    run_pipeline = FnApiRunner.run_pipeline

    def look(self, pipeline, options):
        seen.append(options.get_all_options(drop_default=True))
        return run_pipeline(self, pipeline, options)

    monkeypatch.setattr(FnApiRunner, "run_pipeline", look)
    words = ("--output", "sealed", "--key", key, "--job_name=nightly", "--runner=FnApiRunner")
    status, _, err = run("encrypt", "data", *words)
    assert status == 0, err
    assert (seen[0]["job_name"], seen[0]["runner"]) == ("nightly", "FnApiRunner")


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("encrypt", "none/*", "--output", "out", "--key", "{key}"), "none/: No such file or directory"),
        (
            ("encrypt", "data/*.none", "--output", "out", "--key", "{key}"),
            NO_FILE_MATCHES.format("data/*.none"),
        ),
        (
            ("encrypt", "data", "--output", "out", "--key", "local-kms://none.json"),
            "there is no keyring at {cwd}/none.json. Make one: beam-envelope keygen --key 'local-kms://{cwd}/none.json'",
        ),
        (
            ("encrypt", "data", "--output", "out", "--key", "nothing"),
            (
                "the key 'nothing' does not start with a scheme that is known: aws-kms://, local-kms://, "
                "hcvault:// (for example aws-kms://alias/etl)"
            ),
        ),
        (
            ("encrypt", "data", "--output", "out", "--key", "{key}", "--context", "x"),
            "the context 'x': write NAME=VALUE, each name once",
        ),
        (
            ("encrypt", "data", "--output", "out", "--key", "{key}", "--header-lines=1"),
            "header_lines is a number of lines that split_lines repeats in each part; give split_lines as well",
        ),
        (
            ("encrypt", "data", "--output", "./data/out", "--key", "{key}"),
            (
                "data/a.csv would become ./data/out/a.csv, which the input pattern data/** finds as well: a second run "
                "would encrypt shards. Choose an output folder outside the pattern"
            ),
        ),
        (
            ("encrypt", "sealed/a*", "--output", "out", "--key", "{key}"),
            (
                "sealed/a.csv is encrypted already (a key file lies beside it). "
                "Leave it out of the input pattern, or decrypt it first"
            ),
        ),
        (
            ("decrypt", "sealed", "--output", "out", "--key", "{key}"),
            (
                "section 1 of {cwd}/sealed/_MANIFEST.json was written with another encryption context: 'dataset' is "
                "missing here. Give the context that it was written with (key files show it), or ANY_CONTEXT "
                "(--any-context) to accept any"
            ),
        ),
        (
            ("decrypt", "sealed", "--output", "out", "--key", "{key}", "--manifest=ignore"),
            (
                "sealed/a.csv was written with another encryption context: 'dataset' is missing here. Give the context "
                "that it was written with (key files show it), or ANY_CONTEXT (--any-context) to accept any"
            ),
        ),
        (
            ("decrypt", "data", "--output", "out", "--key", "{key}"),
            "data/a.csv is plain data: it has no key file (_KEY_FOR_a.csv.json) and does not look like a shard",
        ),
        (
            ("decrypt", "data/a.csv", "data/a.csv/x", "--output", "out", "--key", "{key}"),
            NO_FILE_MATCHES.format("data/a.csv/x"),
        ),
        (
            ("inspect", "none"),
            NO_FILE_MATCHES.format("none"),
        ),
        (
            ("cat", "data/a.csv", "--key", "{key}"),
            "data/a.csv is plain data: it has no key file (_KEY_FOR_a.csv.json) and does not look like a shard",
        ),
    ],
)
def test_a_mistake_is_one_clear_line_status_1_and_no_output(run, sealed, key, tmp_path, words, message):
    status, out, err = run(*(word.replace("{key}", key) for word in words))
    assert (status, out) == (1, "")
    assert err == f"beam-envelope {words[0]}: {message.replace('{cwd}', str(tmp_path))}\n"
    assert listing("out") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("encrypt", "data", "--key", "k"), "the following arguments are required: --output"),
        (("encrypt", "--output", "out", "--key", "k"), "the following arguments are required: INPUT"),
        (
            ("encrypt", "data", "--output", "out", "--key", "k", "--contxt", "a=b"),
            "unknown option --contxt: did you mean --context?",
        ),
        (("inspect", "data", "--jsn"), "unknown option --jsn: did you mean --json?"),
        (
            ("cat", "data", "--key", "k", "--output", "x"),
            "unknown option --output: neither beam-envelope nor Beam has it",
        ),
        (("keygen",), "the following arguments are required: --key"),
        (("keygen", "--key", "k", "--bits=128"), "unrecognized arguments: --bits=128"),
        (("seal", "data"), "invalid choice: 'seal'"),
        (("--verbose", "encrypt"), "--verbose"),
    ],
)
def test_a_wrong_command_line_is_status_2(run, words, message):
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert message in err
    assert "usage: beam-envelope" in err


def test_a_job_that_fails_in_a_worker_is_one_clear_line(run, sealed, key):
    raw = read_files("sealed")["sub/b.csv"]
    write_files("sealed", {"sub/b.csv": raw[:-1] + bytes([raw[-1] ^ 1])})
    status, out, err = run("decrypt", sealed, "--output", "out", "--key", key, *CONTEXT)
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        f"Decrypting 3 files, {sum(shard_size(len(content)) for content in CONTENTS.values()) / 1000:.1f} kB ...",
        (
            "beam-envelope decrypt: sealed/sub/b.csv was changed after it was written: chunk 0 does not authenticate "
            "or the file was cut. Restore it from a copy"
        ),
    ]


def test_verbose_shows_the_traceback_as_well(run, key):
    status, _, err = run("encrypt", "none", "--output", "out", "--key", key, "--verbose")
    assert status == 1
    assert "Traceback" in err
    assert "FileNotFoundError" in err


def test_files_that_a_runner_did_not_write_are_missed(run, key, monkeypatch):
    run_pipeline = FnApiRunner.run_pipeline

    def lose_one(self, pipeline, options):
        result = run_pipeline(self, pipeline, options)
        os.unlink("sealed/sub/b.csv")
        return result

    monkeypatch.setattr(FnApiRunner, "run_pipeline", lose_one)
    status, out, err = run("encrypt", "data", "--output", "sealed", "--key", key, "--json")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == (
        "beam-envelope encrypt: the runner reports success, but 1 of 3 files are missing, first sealed/sub/b.csv. "
        "Run the job again with --if-exists=skip"
    )


def test_a_job_that_did_not_end_well_is_status_1(run, key, monkeypatch):
    class Result:
        state = PipelineState.CANCELLED

        def wait_until_finish(self):
            return self.state

    monkeypatch.setattr(FnApiRunner, "run_pipeline", lambda *_: Result())
    status, out, err = run("encrypt", "data", "--output", "sealed", "--key", key)
    assert (status, out) == (1, "")
    assert err.endswith("The job ended as CANCELLED. Run it again with --if-exists=skip to finish it.\n")


def test_a_mistake_in_worker_processes_is_one_clear_line_too(run, sealed, key, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    os.truncate("sealed/a.csv", 5000)
    workers = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
    inputs = ("sealed/sub/b.csv", "sealed/a.csv")  # the launcher opens the first
    status, out, err = run("decrypt", *inputs, "--output", "out", "--key", key, *CONTEXT, *workers)
    assert (status, out) == (1, "")
    assert [line for line in err.splitlines() if " kB" not in line] == [
        (
            "beam-envelope decrypt: sealed/a.csv was changed after it was written: chunk 0 does not authenticate or "
            "the file was cut. Restore it from a copy"
        )
    ]
    # The worker that was about to write the other file may have been stopped in the middle.
    assert not [name for name in listing("out") if name != "b.csv" and not name.startswith(TEMPORARY_PREFIX)]


# ------------------------------------------------------------------------------------------------- inspect


def test_inspect_lists_shards_in_a_table_that_a_pipe_does_not_cut(run, sealed, key):
    run("encrypt", "data/a.csv", "--output", "z" * 200, "--key", key, *CONTEXT, "--compression=zstd")
    status, out, err = run("inspect", sealed, "z" * 200)
    assert (status, err) == (0, "")
    lines = [re.split(r" {2,}", line.strip()) for line in out.splitlines()]
    assert lines[0] == ["shard", "KMS key", "context", "plaintext", "stored", "age"]
    assert [line[0] for line in lines[1:5]] == [f"sealed/{name}" for name in CONTENTS] + ["z" * 200 + "/a.csv"]
    assert re.fullmatch(r"local-kms:default/[0-9a-f]{32}", lines[1][1])
    assert lines[1][2:5] == ["dataset=flights", "60.0 kB", "60.1 kB"]
    assert lines[3][3] == "0 bytes"
    assert lines[4][3] == "zstd"
    assert re.fullmatch(r"\d+ s", lines[1][5])
    assert re.fullmatch(r"4 shards, 60\.\d kB stored, 1 KMS key\.", out.splitlines()[5])


def test_inspect_names_what_is_amiss(run, sealed):
    os.unlink("sealed/sub/_KEY_FOR_b.csv.json")
    os.unlink("sealed/sub/empty")
    write_files(sealed, {"_TMP_1": b"x"})
    status, out, _ = run("inspect", sealed)
    assert status == 0
    assert out.splitlines()[-4:] == [
        f"1 shard, {shard_size(60_000) / 1000:.1f} kB stored, 1 KMS key.",
        "sealed/_TMP_1: unfinished; delete it if no job is running",
        "sealed/sub/_KEY_FOR_empty.json: a key file without its shard",
        "sealed/sub/b.csv: no key file: not a shard, or nobody can open it",
    ]


def test_inspect_gives_json_for_programs(run, sealed):
    os.unlink("sealed/sub/_KEY_FOR_b.csv.json")
    status, out, _ = run("inspect", sealed, "--json")
    entries = {entry["path"]: entry for entry in json.loads(out)}
    assert (status, list(entries)) == (0, [f"sealed/{name}" for name in CONTENTS])
    assert entries["sealed/a.csv"]["context"] == {"dataset": "flights"}
    assert entries["sealed/a.csv"]["plaintext_bytes"] == 60_000
    assert entries["sealed/a.csv"]["stored_bytes"] == shard_size(60_000)
    assert entries["sealed/sub/b.csv"]["problem"] == "no key file: not a shard, or nobody can open it"


@pytest.mark.parametrize(
    ("seconds", "age"), [(0, "0 s"), (59, "59 s"), (61, "1 min"), (7200, "2 h"), (200_000, "2 d"), (None, "?")]
)
def test_ages_are_told_in_the_unit_that_fits(seconds, age):
    from beam_envelope import inspect_command

    assert inspect_command._age(seconds) == age


# ------------------------------------------------------------------------------------------------------ cat


def test_cat_writes_the_plaintext_of_shards_in_order_and_nothing_else(run, sealed, key):
    run("encrypt", "data/sub/b.csv", "--output", "other", "--key", key, *CONTEXT)
    status, out, err = run("cat", "sealed/a.csv", "sealed/sub", "other/b.csv", "--key", key, *CONTEXT)
    assert (status, err) == (0, "")
    assert out.encode() == CONTENTS["a.csv"] + CONTENTS["sub/b.csv"] + CONTENTS["sub/b.csv"]


def test_cat_needs_the_context_or_the_word_that_any_will_do(run, sealed, key):
    status, out, err = run("cat", "sealed/sub/b.csv", "--key", key)
    assert (status, out) == (1, "")
    assert "was written with another encryption context" in err
    assert run("cat", "sealed/sub/b.csv", "--key", key, "--any-context") == (0, "beta\n", "")


@pytest.mark.parametrize(("size", "wanted"), [(500_000, 10), (100, 0)])
def test_cat_stops_without_complaint_when_its_reader_has_enough(run, key, forker, tmp_path, size, wanted):
    write_files("many", {f"{number}": b"0123456789" * (size // 10) for number in range(8)})
    run("encrypt", "many", "--output", "sealed", "--key", key)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got = []

    def head():
        with fifo.open("rb", buffering=0) as stream:
            got.append(stream.read(wanted))

    reader = threading.Thread(target=head)
    reader.start()
    keyring = f"local-kms://{tmp_path}/keyring.json"
    status, log = forker.run("cat", tmp_path / "sealed", "--key", keyring, stdout=fifo)
    reader.join()
    assert (got, status, log) == ([b"0123456789"[:wanted]], 1, "")


# ----------------------------------------------------------------------------------------------- interrupted


def test_ctrl_c_says_how_to_go_on_and_is_status_130(run, key, forker, tmp_path):
    write_files("many", {f"{number:02}": os.urandom(1 << 19) for number in range(40)})
    words = (
        "encrypt",
        tmp_path / "many",
        "--output",
        tmp_path / "sealed",
        "--key",
        f"local-kms://{tmp_path}/keyring.json",
    )
    status, log = forker.run(*words, step=12, signal=signal.SIGINT, below=tmp_path / "sealed")
    assert status == 130
    assert log.splitlines()[-1] == "Interrupted. Run it again with --if-exists=skip to finish it."
    assert "Traceback" not in log
    status, _, err = run("encrypt", "many", "--output", "sealed", "--key", key, "--if-exists=skip")
    assert status == 0, err
    status, _, err = run("decrypt", "sealed", "--output", "opened", "--key", key)
    assert (status, read_files("opened")) == (0, read_files("many")), err


# ------------------------------------------------------------------------------------------ as a real process


def test_the_module_is_the_command(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def command(*words):
        program = [sys.executable, "-m", "beam_envelope.cli", *words]
        return subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert command("--version").stdout == f"beam-envelope {beam_envelope.__version__}\n"
    assert command("keygen", "--key", "local-kms://k.json").returncode == 0
    again = command("keygen", "--key", "local-kms://k.json")
    assert (again.returncode, again.stdout, "already has a key" in again.stderr) == (1, "", True)
    assert command("keygen").returncode == 2


def test_help_shows_how_to_begin_with_commands_that_work(run):
    status, out, _ = run("--help")
    assert status == 0
    examples = [line.split() for line in out.splitlines() if line.startswith("  beam-envelope ")]
    assert [words[1] for words in examples] == ["keygen", "encrypt", "inspect", "decrypt"]
    for words in examples:
        status, _, err = run(*(word.strip("'") for word in words[1:]))
        assert status == 0, err
    assert hashlib.sha256(read_files("opened")["a.csv"]).digest() == hashlib.sha256(CONTENTS["a.csv"]).digest()


def test_the_console_of_errors_is_stderr_whoever_took_its_place(run, sealed, key):
    # After a job, which lends the console another stream, the command still writes where sys.stderr points now.
    assert console.errors.file is sys.stderr
    assert jobs.SMALL_JOB_BYTES == 64 << 20
