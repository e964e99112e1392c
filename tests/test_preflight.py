"""What is checked before a job: each role's own permission, here and on workers, told at once, with nothing written."""

import argparse
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

import beam_envelope
from beam_envelope import EnvelopeError, KeyAccessError, KmsUnavailableError, cli, preflight, worker_check
from beam_envelope.formats.keyfile import KeyFile
from beam_envelope.formats.rotation import Rotation
from beam_envelope.keys import aws_check
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.preflight import Finding, KeyUse, examine, for_writer, problems, raise_problems
from beam_envelope.keys.provider import Need, kms_calls
from pipelines import decrypt as decrypt_program
from pipelines import encrypt as encrypt_program
from pipelines import rotate as rotate_program
from pipelines import verify as verify_program
from tests.running import listing, read_files, write_files

CONTEXT = {"dataset": "flights"}
ETL, NEW, FAR = "aws-kms://alias/etl", "aws-kms://alias/new", "aws-kms://alias/far"
WORDS = ("--context", "dataset=flights")
ALL = ("GenerateDataKey", "Encrypt", "Decrypt", "ReEncryptFrom", "ReEncryptTo", "DescribeKey")
WORKERS = ("--direct_running_mode=multi_processing", "--direct_num_workers=1")
ROOT = str(Path(beam_envelope.__file__).parents[1])
USER = "arn:aws:iam::111122223333:user/beam"


@pytest.fixture
def kms(fake_kms):
    for name in ("etl", "new", "far"):
        fake_kms.create_key(name)
    return fake_kms


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Run the command in this process, in a folder that holds `data`, as a fresh process would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FileSystems, "_pipeline_options", FileSystems._pipeline_options)
    write_files("data", {"a": b"alpha", "b": b"beta"})

    def run_words(*words):
        clear_caches()
        kms_calls.counts.clear()
        status = cli.main([str(word) for word in words])
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return run_words


@pytest.fixture
def sealed(kms, run):
    """The data, sealed under alias/etl."""
    assert run("encrypt", "data", "--output", "sealed", "--key", ETL, *WORDS)[0] == 0
    return "sealed"


def only(kms, *allowed):
    """Allow these operations and no others."""
    for operation in ALL:
        (kms.allow if operation in allowed else kms.deny)(operation)


def first_key_file(folder):
    path = next(Path(folder).glob("_KEY_FOR_*"))
    return [(str(path), KeyFile.from_bytes(path.read_bytes(), str(path)))]


@pytest.fixture
def worker_with(tmp_path, monkeypatch):
    """Start worker processes with other settings than this process has."""

    def start(**environment):
        script = tmp_path / "worker-python"
        settings = " ".join(f"'{name}={value}'" for name, value in ({"PYTHONPATH": ROOT} | environment).items())
        script.write_text(f'#!/bin/sh\nexec env {settings} {sys.executable} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(script))

    return start


# ----------------------------------------------------------------------------------- one role, one permission


@pytest.mark.parametrize(
    ("need", "permissions"),
    [
        (Need.GENERATE, ["GenerateDataKey"]),
        (Need.WRAP, ["Encrypt"]),
        (Need.UNWRAP, ["Decrypt"]),
        (Need.REWRAP, ["ReEncryptFrom", "ReEncryptTo"]),
        (Need.NAME, ["DescribeKey"]),
    ],
    ids=lambda value: value.name if isinstance(value, Need) else "",
)
@pytest.mark.parametrize("with_sample", [True, False])
def test_a_need_takes_its_own_permissions_and_no_other(kms, need, permissions, with_sample):
    key = AwsKms("alias/etl")
    if not with_sample and not aws_check._knows_modifiers(key, Need.UNWRAP):
        pytest.skip("this boto3 knows no DryRunModifiers")
    with key.generate_data_key(CONTEXT) as data_key:
        sample = data_key.wrapped_keys[0] if with_sample else None
    only(kms, *permissions)
    assert key.check(CONTEXT, need, sample=sample, to=AwsKms("alias/new")) is None
    for permission in permissions:
        kms.deny(permission)
        (finding,) = examine([KeyUse(key, need, tuple(CONTEXT.items()), sample, AwsKms("alias/new"))])
        assert (finding.state, finding.permission, finding.principal) == ("refused", f"kms:{permission}", USER)
        kms.allow(permission)


def test_no_plaintext_data_key_comes_out_of_kms(kms, monkeypatch):
    answers = []
    call = AwsKms._call
    monkeypatch.setattr(AwsKms, "_call", lambda *args, **more: answers.append(call(*args, **more)) or answers[-1])
    key = AwsKms("alias/etl")
    for need in (Need.GENERATE, Need.WRAP, Need.UNWRAP, Need.REWRAP):
        assert key.check(CONTEXT, need) is None
    assert answers == [{}] * 4
    assert kms.calls == {"GenerateDataKey": 1, "Encrypt": 1, "Decrypt": 1, "ReEncrypt": 1}


def test_a_kms_that_knows_no_dry_run_is_fine_too(moto_server):
    import boto3

    arn = boto3.client("kms").create_key()["KeyMetadata"]["Arn"]
    key = AwsKms(arn)
    with key.generate_data_key(CONTEXT) as data_key:
        sample = data_key.wrapped_keys[0]
    for need in Need:
        assert key.check(CONTEXT, need, sample=sample, to=key) is None
    (finding,) = examine([KeyUse(key, Need.GENERATE)], who=True)
    assert (finding.state, finding.principal) == ("ok", "arn:aws:sts::123456789012:user/moto")


def test_a_boto3_that_cannot_ask_without_a_sample_says_so(kms, monkeypatch):
    monkeypatch.setattr("beam_envelope.keys.aws_check._knows_modifiers", lambda *_: False)
    (finding,) = examine([KeyUse(AwsKms("alias/etl"), Need.UNWRAP)])
    assert (finding.state, finding.message[:39]) == ("not checked", "no wrapped key is there to try it on, a")
    assert problems([finding]) == []
    assert kms.calls == {}


@pytest.mark.parametrize(
    ("spoil", "state", "text"),
    [
        (lambda kms: kms.disable_key("alias/etl"), "refused", "is disabled or pending deletion"),
        (lambda kms: kms.schedule_key_deletion("alias/etl"), "refused", "is pending deletion"),
        (lambda kms: kms.__exit__(), "unavailable", "KMS could not be reached for GenerateDataKey"),
        (lambda _: os.environ.pop("AWS_ACCESS_KEY_ID"), "refused", "no usable AWS credentials"),
        (lambda _: (os.environ.pop("AWS_DEFAULT_REGION"), os.environ.pop("AWS_REGION")), "refused", "no AWS region"),
    ],
    ids=["disabled", "pending deletion", "no endpoint", "no credentials", "no region"],
)
def test_what_is_wrong_with_a_key_is_told(kms, monkeypatch, spoil, state, text):
    monkeypatch.setattr("botocore.retries.standard.RetryHandler.needs_retry", lambda *_, **__: None)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.setenv(name, os.environ[name])  # so that it comes back
    spoil(kms)
    (finding,) = examine(for_writer([[AwsKms("alias/etl")]], CONTEXT))
    assert finding.state == state
    assert text in finding.message


def test_a_key_that_is_not_there_and_a_good_one_are_both_told(kms):
    found = examine(for_writer([[AwsKms("alias/none")], [AwsKms("alias/etl"), AwsKms("alias/far")]], CONTEXT), who=True)
    assert [(one.key, one.permission, one.state) for one in found] == [
        ("aws-kms://alias/none", "kms:GenerateDataKey", "refused"),
        (ETL, "kms:GenerateDataKey", "ok"),
        (FAR, "kms:Encrypt", "ok"),
    ]
    assert {one.principal for one in found} == {USER}
    assert "there is no KMS key alias/none" in found[0].message


def test_a_provider_of_somebody_elses_is_asked_in_its_own_way(local_key):
    class Theirs(type(local_key)):
        def check(self, context):
            assert context == CONTEXT
            raise RuntimeError("a secret of theirs")

    (finding,) = examine([KeyUse(Theirs(local_key.path), Need.GENERATE, tuple(CONTEXT.items()))])
    assert (finding.state, finding.message) == ("refused", f"{local_key} could not be tried: RuntimeError")


def test_of_alternatives_one_is_enough():
    refused = Finding("launcher", ETL, "kms:Decrypt", "refused", "no", choice="1")
    other = Finding("launcher", FAR, "kms:Decrypt", "other key", "no", choice="1")
    opens = Finding("launcher", NEW, "kms:Decrypt", "ok", choice="1")
    assert problems([refused, opens, other]) == []
    assert problems([refused, other]) == [refused, other]
    elsewhere = Finding("worker 1", NEW, "kms:Decrypt", "ok", choice="1")
    assert problems([refused, elsewhere]) == [refused]


def test_the_class_of_the_error_says_whether_to_try_again():
    away = Finding("launcher", ETL, "kms:Decrypt", "unavailable", "away")
    refused = Finding("launcher", FAR, "kms:Decrypt", "refused", "refused")
    for findings, kind in [([away], KmsUnavailableError), ([away, refused], KeyAccessError)]:
        with pytest.raises(EnvelopeError) as caught:
            raise_problems(findings)
        assert type(caught.value) is kind


# ----------------------------------------------------------------------------------------- in the command


def test_the_writers_keys_are_tried_together_and_nothing_is_written(kms, run, tmp_path):
    kms.deny("Encrypt", "alias/far")
    kms.disable_key("alias/etl")
    before = read_files(tmp_path)
    status, out, err = run("encrypt", "data", "--output", "out", "--key", ETL, "--key", NEW, "--key", FAR, *WORDS)
    assert (status, out) == (1, "")
    lines = err.splitlines()
    assert lines[0] == (
        "beam-envelope encrypt: 2 of 3 checks failed, so nothing was started. docs/permissions.md has the policies. "
        "Where only workers may use the keys, give --no-check --check-workers."
    )
    assert [line.split() for line in lines[1:5]] == [
        ["where", "key", "permission", "who", "result"],
        ["launcher", ETL, "kms:GenerateDataKey", "?", "refused"],
        ["launcher", NEW, "kms:Encrypt", "?", "ok"],
        ["launcher", FAR, "kms:Encrypt", USER, "refused"],
    ]
    assert lines[5].startswith("launcher: KMS key alias/etl is disabled or pending deletion")
    assert lines[6].startswith("launcher: not allowed to use KMS key alias/far: the caller needs kms:Encrypt on it")
    assert read_files(tmp_path) == before


def test_a_reader_is_asked_for_decrypt_only(kms, sealed, run, tmp_path):
    only(kms, "Decrypt")
    assert run("decrypt", "sealed", "--output", "plain", "--key", FAR, "--key", ETL, *WORDS)[0] == 0
    assert run("verify", "sealed", "--key", FAR, "--key", ETL, *WORDS)[0] == 0
    only(kms)
    kms.disable_key("alias/far")
    for words in (("decrypt", "sealed", "--output", "again"), ("verify", "sealed")):
        status, _, err = run(*words, "--key", FAR, "--key", ETL, *WORDS)
        assert status == 1
        assert "2 of 2 checks failed" in err
        assert err.count("2 of 2 checks failed") == err.count("where ") == 1  # one table, also of what the plan met
        assert "KMS key alias/etl: the caller needs kms:Decrypt on it" in err
        assert "KMS key alias/far: the caller needs kms:Decrypt on it" in err
    assert "again" not in os.listdir(tmp_path)


def test_a_rotator_is_asked_for_reencrypt_and_a_dry_run_for_names_only(kms, sealed, run, tmp_path):
    before = read_files(tmp_path)
    only(kms, "DescribeKey")
    rotate = ("rotate", "sealed", "--from", ETL, "--to", NEW)
    assert run(*rotate, "--dry-run")[0] == 0
    status, _, err = run(*rotate)
    assert status == 1
    assert "kms:ReEncryptFrom on resource" in err
    only(kms, "ReEncryptFrom", "ReEncryptTo")
    status, _, err = run(*rotate)
    assert status == 1
    assert "2 of 2 checks failed" in err
    assert err.count("kms:DescribeKey (or name the key by its ARN, which needs none)") == 2
    assert read_files(tmp_path) == before
    only(kms, "ReEncryptFrom", "ReEncryptTo", "DescribeKey")
    calls = kms.calls
    assert run(*rotate)[0] == 0
    # For the data key of both shards, for that of the manifest, and as a dry run.
    assert (kms.calls - calls)["ReEncrypt"] == 1 + 1 + 1
    assert read_files(tmp_path) != before


def test_a_rotation_that_was_finished_is_asked_for_no_reencrypt(kms, sealed, run):
    assert run("rotate", "sealed", "--from", ETL, "--to", NEW)[0] == 0
    only(kms, "DescribeKey")
    assert run("rotate", "sealed", "--from", ETL, "--to", NEW)[0] == 0


def test_to_another_kms_a_rotation_unwraps_here_and_wraps_there(kms, sealed, local_key):
    rotation = Rotation((AwsKms("alias/etl"),), local_key)
    uses = preflight.uses_of_rotation(rotation, first_key_file(sealed))
    assert [(use.key, use.need) for use in uses] == [
        (AwsKms("alias/etl"), Need.NAME),
        (local_key, Need.NAME),
        (AwsKms("alias/etl"), Need.UNWRAP),
        (local_key, Need.WRAP),
    ]
    only(kms, "DescribeKey")
    assert [one.permission for one in problems(examine(uses))] == ["kms:Decrypt"]


def test_no_check_leaves_the_launcher_alone(kms, run):
    words = ("encrypt", "data", "--output", "out", "--key", ETL, *WORDS, "--no-check")
    assert run(*words)[0] == 0
    assert kms.calls == {"GenerateDataKey": 1 + 1}  # the job's own: for its shards, and for its manifest


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (encrypt_program, ["data", "--output", "out", "--key", ETL, "--key", FAR]),
        (decrypt_program, ["sealed", "--output", "out", "--key", ETL, "--key", FAR]),
        (verify_program, ["sealed", "--key", ETL]),
        (rotate_program, ["sealed", "--from", ETL, "--to", NEW]),
    ],
    ids=["encrypt", "decrypt", "verify", "rotate"],
)
def test_the_programs_check_too(kms, sealed, tmp_path, program, words):
    before = read_files(tmp_path)
    only(kms)
    clear_caches()
    context = [] if program is rotate_program else WORDS
    with pytest.raises(KeyAccessError, match="is not authorized"):
        program.run([*words, *context, "--direct_running_mode=in_memory"])
    assert read_files(tmp_path) == before


# ------------------------------------------------------------------------------------------- on the workers


def table_of(err):
    """Return the rows of the table in a message."""
    rows = [line.split() for line in err.splitlines()]
    start = next(number for number, row in enumerate(rows) if row[:2] == ["where", "key"])
    return rows[start + 1 :]


def test_workers_that_may_do_less_are_named_with_what_they_lack(kms, run, worker_with, tmp_path):
    worker_with(**kms.environment("worker"))
    kms.deny("GenerateDataKey", "alias/etl", user="worker")
    kms.deny("Encrypt", user="worker")
    words = ("encrypt", "data", "--output", "out", "--key", ETL, "--key", FAR, *WORDS, *WORKERS)
    status, out, err = run(*words, "--check-workers")
    assert (status, out) == (1, "")
    assert "2 of 5 checks failed, so nothing was started" in err, err
    here, theirs = USER, USER.replace("beam", "worker")
    rows = table_of(err)
    assert rows[:2] == [
        ["launcher", ETL, "kms:GenerateDataKey", here, "ok"],
        ["launcher", FAR, "kms:Encrypt", here, "ok"],
    ]
    assert [row[2:] for row in rows[3:5]] == [
        [ETL, "kms:GenerateDataKey", theirs, "refused"],
        [FAR, "kms:Encrypt", theirs, "refused"],
    ]
    assert rows[2][0] == "worker"
    assert rows[2][2:4] == ["software", "Python"]
    assert err.count(f"User: {theirs} is not authorized to perform: kms:Encrypt") == 1
    assert listing(tmp_path / "out") == []


def test_workers_that_are_well_cost_one_small_job_and_are_shown(kms, run, tmp_path):
    status, out, err = run("encrypt", "data", "--output", "out", "--key", ETL, *WORDS, "--check-workers", "--json")
    assert status == 0
    rows = table_of(err)
    assert [row[-1] for row in rows[:3]] == ["ok"] * 3
    assert rows[0][0] == "launcher"
    assert rows[2] == ["worker", rows[2][1], ETL, "kms:GenerateDataKey", USER, "ok"]
    assert rows[3][0] == "Encrypting"
    assert kms.calls == {"GenerateDataKey": 1 + 1 + 1 + 1}  # launcher, worker, and the job: shards, manifest
    assert json.loads(out)["files"] == 2


def test_readers_and_rotators_on_workers_need_their_own_permissions_only(kms, sealed, run, worker_with):
    only(kms, "Decrypt")
    more = ("--check-workers", "--no-check")
    assert run("decrypt", "sealed", "--output", "plain", "--key", ETL, *WORDS, *more)[0] == 0
    only(kms, "ReEncryptFrom", "ReEncryptTo", "DescribeKey")
    status, _, err = run("verify", "sealed", "--key", ETL, *WORDS, *more)
    assert (status, table_of(err)[1][2:]) == (1, [ETL, "kms:Decrypt", USER, "refused"])
    assert run("rotate", "sealed", "--from", ETL, "--to", NEW, *more)[0] == 0


def test_workers_without_credentials_or_a_keyring_are_told_of(kms, run, worker_with):
    words = ("encrypt", "data", "--output", "out", *WORDS, *WORKERS, "--check-workers")
    here = [word for word in words if word not in WORKERS]
    status, _, err = run(*here, "--key", "local-kms://k.json", "--no-check")
    assert (status, "there is no keyring at" in err) == (1, True), err
    worker_with(AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    status, _, err = run(*words, "--key", ETL)
    assert (status, "no usable AWS credentials for GenerateDataKey on alias/etl" in err) == (1, True)


def test_a_worker_with_another_release_is_told(kms, run, worker_with, tmp_path):
    copy = tmp_path / "other" / "beam_envelope"
    shutil.copytree(Path(beam_envelope.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    module = copy / "__init__.py"
    module.write_text(module.read_text().replace(f'"{beam_envelope.__version__}"', '"0.0.1"'))
    worker_with(PYTHONPATH=str(copy.parent))
    words = ("encrypt", "data", "--output", "out", "--key", ETL, *WORDS, *WORKERS, "--check-workers")
    status, _, err = run(*words)
    assert status == 1
    assert f"beam-envelope is 0.0.1, and {beam_envelope.__version__} on the launcher. Give the workers the same" in err
    assert "mismatch" in err
    # As where there is none: if the file were gone, an editable install's finder would take the launcher's.
    missing = "No module named 'beam_envelope.worker_check'"
    (copy / "worker_check.py").write_text(f"raise ModuleNotFoundError({missing!r})\n")
    status, _, err = run(*words)
    assert status == 1
    assert "The workers have no beam-envelope, or another version of it" in err
    assert listing(tmp_path / "out") == []


def test_what_differs_of_software_is_named():
    here = {"Python": "3.11", "apache-beam": "2.77.0", "[vault]": "yes"}
    assert worker_check.compare_software(here, dict(here), "worker 1").state == "ok"
    finding = worker_check.compare_software(here, here | {"Python": "3.13", "[vault]": "no"}, "worker 1")
    assert finding.state == "mismatch"
    assert finding.message.startswith(
        "Python is 3.13, and 3.11 on the launcher; [vault] is no, and yes on the launcher"
    )


@pytest.mark.parametrize("metrics", [True, False], ids=["metrics", "no metrics"])
def test_check_workers_is_for_pipelines_of_ones_own(kms, monkeypatch, metrics):
    if not metrics:
        monkeypatch.setattr(worker_check, "_findings_of", lambda _: [])  # as of a runner that has none
    options = PipelineOptions(["--direct_running_mode=in_memory"])
    needs = [Need.GENERATE, Need.UNWRAP]
    found = beam_envelope.check_workers(ETL, options, context=CONTEXT, needs=needs)
    assert {one.state for one in found} == {"ok"}
    assert len(found) == (3 if metrics else 1)
    kms.deny("Decrypt")
    with pytest.raises(KeyAccessError) as caught:
        beam_envelope.check_workers(ETL, options, context=CONTEXT, needs=needs)
    assert "1 of 3 checks failed" in str(caught.value)
    assert "kms:Decrypt" in str(caught.value)


def test_extras_that_workers_must_have(kms, monkeypatch):
    options = PipelineOptions(["--direct_running_mode=in_memory"])
    found = beam_envelope.check_workers(ETL, options, extras=["fsspec"])
    assert "[fsspec] yes" in found[0].permission
    monkeypatch.setitem(worker_check._EXTRAS, "fsspec", "no_such_module")
    with pytest.raises(EnvelopeError, match=r"\[fsspec\] is no, and yes"):
        beam_envelope.check_workers(ETL, options, extras=["fsspec"])


def test_the_callers_options_stay_as_they_were(kms):
    options = PipelineOptions(["--job_name=mine"])
    before = options.get_all_options()
    arguments = argparse.Namespace(no_check=True, check_workers=True)
    preflight.before_job([KeyUse(AwsKms("alias/etl"), Need.GENERATE)], arguments, options, n_tasks=1, n_bytes=0)
    assert options.get_all_options() == before


# ------------------------------------------------------------------------------------------ keys that paths choose


def test_keys_that_paths_choose_are_tried_each_the_first_few_of_many(kms, run, tmp_path):
    write_files("many", {f"tenant=t{number:02}/a": b"alpha" for number in range(22)})
    for number in range(22):
        kms.create_key(f"data-t{number:02}")
    kms.deny("GenerateDataKey", "alias/data-t03")
    kms.deny("GenerateDataKey", "alias/data-t21")  # beyond those that are tried
    words = ("many/**", "--output", "out", "--key", "aws-kms://alias/data-{tenant}", "--context", "tenant={tenant}")
    status, _, err = run("encrypt", *words)
    assert (status, "alias/data-t03" in err, "alias/data-t21" in err) == (1, True, False)
    assert not (tmp_path / "out").exists()
    for tenant in ("t03", "t21"):
        kms.allow("GenerateDataKey", f"alias/data-{tenant}")
    assert run("encrypt", *words)[0] == 0
    assert run("decrypt", "out/", *words[1:2], "opened", *words[3:])[0] == 0
    assert read_files("opened") == read_files("many")


def test_the_program_tries_keys_that_paths_choose_too(kms, run, tmp_path):
    write_files("many", {"tenant=acme/a": b"alpha"})
    words = ["many/**", "--output", "out", "--key", "aws-kms://alias/data-{tenant}", "--context", "tenant={tenant}"]
    with pytest.raises(KeyAccessError, match="there is no KMS key alias/data-acme"):
        encrypt_program.run(words)
    kms.create_key("data-acme")
    encrypt_program.run(words).wait_until_finish()
    assert "tenant=acme/a" in listing("out")


def test_a_launcher_that_may_not_open_anything_leaves_it_to_the_workers(kms, sealed, run, worker_with, tmp_path):
    kms.deny("Decrypt", user="beam")
    worker_with(**kms.environment("ops"))
    words = ("decrypt", sealed, "--output", "opened", "--key", ETL, *WORDS, *WORKERS)
    assert run(*words)[0] == 1
    assert run(*words, "--no-check")[0] == 0
    assert read_files("opened") == read_files("data")
