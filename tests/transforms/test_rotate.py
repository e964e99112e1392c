"""RotateKeys: key files are rewritten, shards are not looked at, and one data key is one request."""

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.display import DisplayData
from apache_beam.transforms.error_handling import CollectingErrorHandler

from beam_envelope import AwsKms, LocalKms, RotatedFile, RotateKeys, WrongKeyError, jobs, open_shard
from beam_envelope.formats.dataset_key import DeterministicEncryptor
from beam_envelope.formats.keyfile import RAW_CELL_CIPHER, KeyFile, WrappedDataKey, key_file_name
from beam_envelope.formats.keystore import LocalKeyStore
from beam_envelope.formats.manifest import Manifest
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor
from beam_envelope.keys.cache import DataKeyPolicy, clear_caches
from beam_envelope.keys.local import generate_local_key
from beam_envelope.transforms import rotate
from beam_envelope.transforms.rotation_log import WriteRotationLog
from tests.running import Job, encrypt, fails, listing, read_files, run, write_files

CONTEXT = {"dataset": "flights"}
CONTENTS = {"a.csv": b"alpha" * 10_000, "b.csv": b"beta", "sub/c.csv": b""}


@pytest.fixture
def keys(tmp_path):
    """Three local keys, A, B and C."""
    made = [LocalKms(tmp_path / "keyring.json", name) for name in "ABC"]
    for key in made:
        generate_local_key(key)
    return made


@pytest.fixture
def sealed(tmp_path, keys):
    """Shards under the key A; all share one data key."""
    encrypt(write_files(tmp_path / "data", CONTENTS), tmp_path / "sealed", keys[0], context=CONTEXT)
    return tmp_path / "sealed"


def opens(folder, key, contents=CONTENTS):
    """Whether one key alone opens all shards (True) or none (False)."""
    clear_caches()
    opened = []
    for name, content in contents.items():
        try:
            with open_shard(folder / name, key=key, context=CONTEXT) as shard:
                assert shard.read() == content
            opened.append(True)
        except WrongKeyError:
            opened.append(False)
    assert len(set(opened)) == 1
    return opened[0]


def make_key_files(folder, keys, number, context=CONTEXT):
    """Write key files of one data key each."""
    for index in range(number):
        with keys[0].generate_data_key(context) as data_key:
            forms = [data_key.wrapped_keys[0], *(key.wrap(data_key, context) for key in keys[1:])]
            wrapped = WrappedDataKey(data_key.key_id, tuple(forms))
        key_file = KeyFile((wrapped,), context)
        write_files(folder, {key_file_name(f"{index:03}"): key_file.to_bytes()})


# ----------------------------------------------------------------------------------------------- what it does


def test_all_shards_open_under_the_new_key_and_none_under_the_old(sealed, keys):
    before = read_files(sealed)
    sealing = [name for name in before if "_KEY_FOR_" in name or name == "_MANIFEST.json"]
    results, counters = run(RotateKeys(keys[0], to=keys[1]), str(sealed))
    names = [f"local-kms:{key.full_name()}" for key in keys]
    assert results == [RotatedFile(f"{sealed}/{name}", [names[0]], [names[1]], True) for name in sorted(sealing)]
    # The shards share one data key, and the manifest has one of its own.
    assert counters == {"key_files": 4, "key_files_changed": 4, "kms_Decrypt": 2, "kms_Encrypt": 2}
    assert [opens(sealed, key) for key in keys] == [False, True, False]
    after = read_files(sealed)
    assert after.keys() == before.keys()
    assert {n for n in before if before[n] != after[n]} == set(sealing)


def test_a_second_run_changes_nothing(sealed, keys):
    run(RotateKeys(keys[0], to=keys[1]), str(sealed))
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in sealed.rglob("*") if path.is_file()}
    results, counters = run(RotateKeys(keys[0], to=keys[1]), str(sealed))
    assert counters == {"key_files": 4}
    assert [result.changed for result in results] == [False] * 4
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in before} == before


def test_an_added_key_opens_alone_and_so_does_the_first_until_it_is_removed(sealed, keys):
    run(RotateKeys(keys[0], add=keys[1]), str(sealed))
    assert [opens(sealed, key) for key in keys] == [True, True, False]
    run(RotateKeys(keys[1], remove=keys[0]), str(sealed))
    assert [opens(sealed, key) for key in keys] == [False, True, False]


def test_no_shard_is_read_or_needed(tmp_path, keys):
    make_key_files(tmp_path / "sealed", keys[:1], 3)
    os.mkfifo(tmp_path / "sealed/000")
    (tmp_path / "sealed/001").mkdir()
    write_files(tmp_path / "sealed", {"_TMP_left": b"over"})
    for pattern in ("sealed", "sealed/*", "sealed/00?"):
        results, _ = run(RotateKeys(keys[0], to=keys[1], dry_run=True), f"{tmp_path}/{pattern}")
        assert len(results) == 3
    _, counters = run(RotateKeys(keys[0], to=keys[1]), f"{tmp_path}/sealed/00*")
    assert counters["key_files_changed"] == 3


def test_a_dry_run_tells_and_changes_nothing(sealed, keys):
    before = read_files(sealed)
    dry, counters = run(RotateKeys(keys[0], to=keys[1], dry_run=True), str(sealed))
    assert counters == {"key_files": 4, "key_files_changed": 4}
    assert read_files(sealed) == before
    assert run(RotateKeys(keys[0], to=keys[1]), str(sealed)).results == dry


def test_a_file_that_two_patterns_find_is_rotated_once(sealed, keys):
    patterns = (str(sealed), f"{sealed}/*", f"{sealed}/a.csv", f"{sealed}/../sealed/_KEY_FOR_a.csv.json")
    results, counters = run(RotateKeys(keys[0], to=keys[1]), *patterns)
    assert [Path(result.key_file).name for result in results].count("_KEY_FOR_b.csv.json") == 1
    assert [Path(result.key_file).name for result in results].count("_MANIFEST.json") == 1
    assert counters["kms_Encrypt"] == 2  # the data key of the shards, and the manifest's
    assert "key_files_failed" not in counters
    assert opens(sealed, keys[1])


def test_requests_are_as_many_as_data_keys_and_not_more_than_so_many_in_a_second(tmp_path, keys, monkeypatch):
    make_key_files(tmp_path / "sealed", keys[:1], 5)
    for index in range(5):
        key_file = tmp_path / "sealed" / key_file_name(f"{index:03}")
        write_files(tmp_path / "sealed", {key_file_name(f"copy-{index}"): key_file.read_bytes()})
    slept, now = [], [100.0]

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    # Of this module alone: threads that other tests left may sleep too.
    monkeypatch.setattr(rotate, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    _, counters = run(RotateKeys(keys[0], to=keys[1], max_requests_per_s=4), str(tmp_path / "sealed"))
    assert (counters["key_files_changed"], counters["kms_Encrypt"]) == (10, 5)
    assert slept == [0.0, 0.25, 0.25, 0.25, 0.25]


def test_aws_is_asked_once_for_each_data_key_from_many_threads(tmp_path, fake_kms, monkeypatch):
    old, new = fake_kms.create_key("old"), fake_kms.create_key("new")
    make_key_files(tmp_path / "sealed", [AwsKms(old)], 40)
    for path in sorted((tmp_path / "sealed").iterdir()):
        write_files(tmp_path / "copies", {path.name: path.read_bytes()})
    before = fake_kms.calls
    _, counters = run(RotateKeys(f"aws-kms://{old}", to=f"aws-kms://{new}"), str(tmp_path))
    assert fake_kms.calls - before == Counter(ReEncrypt=40)
    assert counters == {"key_files": 80, "key_files_changed": 80, "kms_ReEncrypt": 40}


# ------------------------------------------------------------------------------------------------ key stores


@pytest.mark.parametrize("settings", [{"to": "B"}, {"add": "B"}])
def test_key_stores_open_after_rotation_and_records_written_later_do_as_well(tmp_path, keys, settings):
    store = LocalKeyStore(tmp_path / "keys")
    named = dict(zip("ABC", keys, strict=True))
    raw = RecordEncryptor(keys[:1], store, CONTEXT, DataKeyPolicy(), RAW_CELL_CIPHER)
    raw_key, _ = raw.reserve(1, 10)
    envelopes = [
        RecordEncryptor(keys[:1], store, CONTEXT, DataKeyPolicy()).encrypt(b"one"),
        DeterministicEncryptor(keys[:1], store, CONTEXT).encrypt(b"one"),
    ]
    assert len(listing(tmp_path / "keys")) == 4  # the dataset key lies there twice
    _, counters = run(
        RotateKeys(keys[0], **{name: named[letter] for name, letter in settings.items()}), f"{tmp_path}/keys/"
    )
    assert counters["key_files_changed"] == 4
    clear_caches()
    for reader in [keys[1], *([keys[0]] if "add" in settings else [])]:
        decryptor = RecordDecryptor([reader], store, CONTEXT)
        assert [decryptor.decrypt(envelope) for envelope in envelopes] == [b"one", b"one"]
        assert decryptor.key(raw_key.key_id, RAW_CELL_CIPHER).raw_key() == raw_key.raw_key()
        assert DeterministicEncryptor([reader], store, CONTEXT).encrypt(b"one") == envelopes[1]
    if "to" in settings:
        with pytest.raises(WrongKeyError):
            RecordDecryptor([keys[0]], store, CONTEXT).decrypt(envelopes[0])
    later = RecordEncryptor([keys[1]], store, CONTEXT, DataKeyPolicy()).encrypt(b"later")
    assert run(RotateKeys(keys[1], to=keys[0]), f"{tmp_path}/keys/").counters["key_files_changed"] == 5
    clear_caches()
    reader = RecordDecryptor([keys[0]], store, CONTEXT)
    assert [reader.decrypt(envelope) for envelope in (*envelopes, later)] == [b"one", b"one", b"later"]


# --------------------------------------------------------------------------------------------- what goes wrong

_failed = []


def _keep_failed(row):
    """Keep a failure, as `running._keep` keeps a result."""
    _failed.append(row)


def run_with_handler(transform, *patterns):
    """Run a transform with an error handler; return its output, the failures and our counters."""
    from tests import running

    running._results.clear()
    _failed.clear()
    pipeline = jobs.make_pipeline(PipelineOptions([]), 1, 0)
    with CollectingErrorHandler() as errors:
        good = pipeline | beam.Create(list(patterns)) | transform.with_error_handler(errors)
    _ = good | "Keep" >> beam.Map(running._keep)
    _ = errors.output() | "KeepFailed" >> beam.Map(_keep_failed)
    result = pipeline.run()
    result.wait_until_finish()
    return Job(sorted(running._results), jobs.counters(result)), sorted(_failed)


def test_bad_files_go_to_the_error_handler_and_all_others_are_rotated(tmp_path, keys):
    folder = tmp_path / "sealed"
    make_key_files(folder, keys[:1], 2)
    make_key_files(folder / "theirs", keys[2:], 1)
    good = (folder / key_file_name("000")).read_bytes()
    document = json.loads(good)
    document["data_keys"][0]["wrapped_keys"][0]["wrapped_key"] = "A" * 80
    tampered = json.dumps(document, indent=2).encode() + b"\n"
    write_files(
        folder,
        {
            key_file_name("cut"): good[:-5],
            key_file_name("empty"): b"",
            key_file_name("list"): b"[1]",
            key_file_name("deep"): b"[" * 100_000,
            key_file_name("tampered"): tampered,
            key_file_name("other context"): good.replace(b"flights", b"trains!"),
        },
    )
    job, failed = run_with_handler(RotateKeys(keys[0], to=keys[1]), str(folder), f"{folder}/none")
    assert [(Path(row.source).relative_to(folder).as_posix(), row.error) for row in failed] == [
        ("_KEY_FOR_cut.json", "FormatError"),
        ("_KEY_FOR_deep.json", "FormatError"),
        ("_KEY_FOR_empty.json", "FormatError"),
        ("_KEY_FOR_list.json", "FormatError"),
        ("_KEY_FOR_none.json", "KeyFileMissingError"),
        ("_KEY_FOR_other context.json", "TamperedError"),
        ("_KEY_FOR_tampered.json", "TamperedError"),
        ("theirs/_KEY_FOR_000.json", "WrongKeyError"),
    ]
    assert (job.counters["key_files"], job.counters["key_files_failed"]) == (2, 8)
    assert [result.changed for result in job.results] == [True, True]
    assert (folder / key_file_name("tampered")).read_bytes() == tampered


def test_without_a_handler_the_job_fails_with_the_files_name(sealed, keys):
    path = sealed / key_file_name("a.csv")
    path.write_bytes(path.read_bytes().replace(b"flights", b"trains!"))
    name, message = fails(RotateKeys(keys[0], to=keys[1]), f"{sealed}/a.csv")
    assert (name, message.startswith(f"{path}: the key A/")) == ("TamperedError", True)
    name, message = fails(RotateKeys(keys[2], to=keys[1]), f"{sealed}/b.csv")
    assert (name, message.startswith(f"{sealed}/{key_file_name('b.csv')} is wrapped by A/")) == ("WrongKeyError", True)
    assert opens(sealed, keys[0], {"b.csv": b"beta"})


def test_errors_of_the_kms_fail_the_job_also_with_a_handler(sealed, keys):
    with pytest.raises(Exception, match="has no key named 'none'"):
        run_with_handler(RotateKeys(keys[0], to=LocalKms(keys[0].path, "none")), str(sealed))
    assert opens(sealed, keys[0])


def test_a_pattern_that_finds_nothing_fails_the_job(tmp_path, keys):
    name, message = fails(RotateKeys(keys[0], to=keys[1]), f"{tmp_path}/none*")
    assert (name, "no key file is there" in message) == ("FileNotFoundError", True)


def test_the_last_key_is_not_removed(tmp_path, keys):
    make_key_files(tmp_path / "one", keys[:1], 1)
    make_key_files(tmp_path / "two", keys[:2], 1)
    before = read_files(tmp_path / "one")
    for dry_run in (True, False):
        job, failed = run_with_handler(RotateKeys(keys[1], remove=keys[0], dry_run=dry_run), str(tmp_path))
        assert [(row.error, "nobody could open it any more" in row.message) for row in failed] == [
            ("WrongKeyError", True)
        ]
        assert [result.changed for result in job.results] == [True]
    assert read_files(tmp_path / "one") == before


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_another_job_replaced_meanwhile_is_rotated_from_what_that_one_left(
    sealed, keys, monkeypatch, times
):
    path = sealed / key_file_name("a.csv")
    rotator = rotate.Rotator(rotate.Rotation((keys[0],), add=(keys[2],)))
    left = [times]
    replace = rotate.replace_key_file

    def late(name, old, new):
        if name == str(path) and left[0]:
            left[0] -= 1
            theirs = rotator.rotate(KeyFile.from_bytes(path.read_bytes(), "k"), "k")
            path.write_bytes(theirs.to_bytes())
            rotator._rotation = rotate.Rotation((keys[0],), remove=(keys[2],))
        replace(name, old, new)

    monkeypatch.setattr(rotate, "replace_key_file", late)
    _, counters = run(RotateKeys(keys[0], to=keys[1]), str(sealed))
    assert (left, counters["key_files_changed"]) == ([0], 4)
    assert opens(sealed, keys[1])
    assert opens(sealed, keys[2], {"a.csv": CONTENTS["a.csv"]}) is (times == 1)


def test_a_file_that_another_job_rotated_meanwhile_is_done(sealed, keys, monkeypatch):
    """Also what a runner sees that tries a bundle again after a worker died."""
    replace = rotate.replace_key_file

    def late(name, old, new):
        path = Path(name)
        kind = Manifest if path.name == "_MANIFEST.json" else KeyFile
        path.write_bytes(
            rotate.Rotator(rotate.Rotation((keys[0],), keys[1])).rotate(kind.from_bytes(old, "k"), "k").to_bytes()
        )
        replace(name, old, new)

    monkeypatch.setattr(rotate, "replace_key_file", late)
    results, counters = run(RotateKeys(keys[0], to=keys[1]), str(sealed))
    assert [result.changed for result in results] == [False] * 4
    assert counters["key_files"] == 4
    assert opens(sealed, keys[1])


def test_a_file_that_others_replace_all_the_time_is_a_failure_of_its_own(sealed, keys, monkeypatch):
    path = sealed / key_file_name("a.csv")

    def never(name, old, new):
        raise rotate.KeyFileReplacedError(f"{name} was replaced by somebody else")

    replace = rotate.replace_key_file
    monkeypatch.setattr(rotate, "replace_key_file", lambda n, *a: (never if n == str(path) else replace)(n, *a))
    job, failed = run_with_handler(RotateKeys(keys[0], to=keys[1]), str(sealed))
    assert ([row.error for row in failed], len(job.results)) == (["KeyFileReplacedError"], 3)


def test_a_file_that_went_away_meanwhile_is_a_failure_of_its_own(sealed, keys, monkeypatch):
    read = rotate.read_key_file

    def then_remove(name):
        raw = read(name)
        if "_KEY_FOR_a" in name:
            os.unlink(name)
        return raw

    monkeypatch.setattr(rotate, "read_key_file", then_remove)
    job, failed = run_with_handler(RotateKeys(keys[0], to=keys[1]), str(sealed))
    assert ([row.error for row in failed], len(job.results)) == (["KeyFileMissingError"], 3)
    assert not (sealed / key_file_name("a.csv")).exists()


# ------------------------------------------------------------------------------------------------- the shell


def test_arguments_are_checked_before_anything_runs(keys):
    with pytest.raises(ValueError, match="nothing to do"):
        RotateKeys(keys[0])
    with pytest.raises(ValueError, match="give the key that opens what is there"):
        RotateKeys((), to=keys[1])
    for rate in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="max_requests_per_s is above 0"):
            RotateKeys(keys[0], to=keys[1], max_requests_per_s=rate)
    transform = RotateKeys("aws-kms://alias/a", to="aws-kms://alias/b", add=["aws-kms://alias/c"])
    assert transform.rotation == rotate.Rotation((AwsKms("alias/a"),), AwsKms("alias/b"), add=(AwsKms("alias/c"),))


def test_display_data_shows_the_settings(keys):
    items = DisplayData.create_from(RotateKeys(keys[0], to=keys[1], remove=keys[2])).items
    assert {item.key: item.value for item in items} == {
        "from": str(keys[0]),
        "to": str(keys[1]),
        "add": "",
        "remove": str(keys[2]),
        "dry_run": False,
    }


def test_the_log_has_a_line_for_each_key_file_and_no_secret(tmp_path, keys):
    folder = tmp_path / "sealed"
    make_key_files(folder, keys[:1], 2)
    write_files(folder, {key_file_name("bad"): b"{}"})
    pipeline = jobs.make_pipeline(PipelineOptions([]), 1, 0)
    with CollectingErrorHandler() as errors:
        good = pipeline | beam.Create([str(folder)]) | RotateKeys(keys[0], to=keys[1]).with_error_handler(errors)
    _ = (good, errors.output()) | WriteRotationLog(f"{tmp_path}/audit/log.jsonl")
    pipeline.run().wait_until_finish()
    text = (tmp_path / "audit/log.jsonl").read_text()
    rows = sorted((json.loads(line) for line in text.splitlines()), key=lambda row: row["key_file"])
    assert [sorted(row) for row in rows] == [["after", "before", "changed", "key_file", "time"]] * 2 + [
        ["error", "key_file", "message", "time"]
    ]
    assert rows[0]["before"] == [f"local-kms:{keys[0].full_name()}"]
    assert rows[0]["after"] == [f"local-kms:{keys[1].full_name()}"]
    assert rows[2]["error"] == "FormatError"
    for raw in read_files(folder).values():
        for form in json.loads(raw).get("data_keys", [{"wrapped_keys": []}])[0]["wrapped_keys"]:
            assert form["wrapped_key"] not in text
    assert listing(tmp_path / "audit") == ["log.jsonl"]
