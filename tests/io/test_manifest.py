"""Manifests on a store: what is added is not lost, and what a pattern finds is what they list."""

import json
import os
import random
import signal
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from apache_beam.io.filesystems import FileSystems

from beam_envelope import ANY_CONTEXT, AwsKms, LocalKms, create_shard
from beam_envelope.errors import (
    ContextMismatchError,
    EnvelopeError,
    FormatError,
    KeyAccessError,
    ManifestError,
    TamperedError,
    WrongKeyError,
)
from beam_envelope.formats.keyfile import KeyFile, WrappedDataKey, key_file_name
from beam_envelope.formats.manifest import Manifest, ManifestEntry, ManifestSection
from beam_envelope.io import manifest as module
from beam_envelope.io import manifest_reader
from beam_envelope.io.manifest import WrittenShard, add_to_manifest, nearest, parents, shard_on_store
from beam_envelope.io.manifest_reader import ManifestReader, Survey, check_shard_id, checked_mode, may_be_listed
from beam_envelope.io.s3 import clear_s3_clients, s3_client
from beam_envelope.io.store import expand
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import generate_local_key
from beam_envelope.keys.provider import DataKey, WrappedKey, kms_calls
from tests.children import Child
from tests.formats.test_manifest import written as text
from tests.io import test_store as other_filesystem
from tests.memory import peak_of
from tests.running import listing, write_files
from tests.wire import s3_error

CONTEXT = {"dataset": "flights"}
NAME = "_MANIFEST.json"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder `sealed` in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("sealed").mkdir()
    return tmp_path / "sealed"


@pytest.fixture
def other_key(tmp_path):
    """A second LocalKms."""
    key = LocalKms(tmp_path / "other" / "keyring.json")
    generate_local_key(key)
    return key


def seal(key, *paths, context=CONTEXT, content=b"content"):
    """Write shards."""
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with create_shard(path, key=key, context=context, overwrite=True) as shard:
            shard.write(content)


def add(folder, key, *names, context=CONTEXT, anew=True):
    """Add shards that are there to the manifest of a folder."""
    keys = key if isinstance(key, tuple) else (key,)
    return add_to_manifest(
        f"{folder}/", [shard_on_store(f"{folder}/{name}", anew=anew) for name in names], keys, context
    )


def dataset(folder, key, *names, context=CONTEXT):
    """Write shards, and a manifest of them."""
    seal(key, *(f"{folder}/{name}" for name in names), context=context)
    add(folder, key, *names, context=context)


def parsed(folder="sealed"):
    """Return the manifest of a folder."""
    return Manifest.from_bytes(Path(folder, NAME).read_bytes(), "the manifest")


def listed(folder="sealed"):
    """Return the names that a manifest lists."""
    return sorted(path for path, (_, entry) in parsed(folder).latest().items() if entry is not None)


def shard_id(path):
    """Return the shard id in a key file, as hexadecimal digits."""
    path = Path(path)
    return KeyFile.from_bytes(path.with_name(key_file_name(path.name)).read_bytes(), "k").shard_id.hex


def entry(number=1, **fields):
    return ManifestEntry(uuid.UUID(int=number).hex, 100, **fields)


def written(*paths):
    """Return shards that nobody has written."""
    return [WrittenShard(str(path), entry(number)) for number, path in enumerate(paths)]


# ------------------------------------------------------------------------------------------------------ adding


def test_the_first_job_makes_a_manifest_that_says_all_of_its_shards(folder, local_key):
    seal(local_key, "sealed/a", "sealed/sub/b", content=b"x" * 1000)
    shards = [
        WrittenShard("sealed/a", ManifestEntry(shard_id("sealed/a"), 1072, 1000, 3)),
        shard_on_store("sealed/sub/b"),
    ]
    assert add_to_manifest("sealed/", shards, (local_key,), CONTEXT) == f"{folder}/{NAME}"
    (section,) = parsed().sections
    assert section.shards == {
        "a": ManifestEntry(shard_id("sealed/a"), 1072, 1000, 3),
        "sub/b": ManifestEntry(shard_id("sealed/sub/b"), 1072),
    }
    assert section.context == CONTEXT
    with local_key.unwrap(section.data_key.wrapped_keys[0], CONTEXT) as data_key:
        section.verify(data_key, "it")
    assert listing("sealed") == ["_KEY_FOR_a.json", NAME, "a", "sub/_KEY_FOR_b.json", "sub/b"]


def test_each_job_adds_a_section_under_a_data_key_of_its_own(folder, local_key, other_key):
    dataset("sealed", local_key, "a")
    before = parsed().sections
    seal(other_key, "sealed/b", context={})
    add("sealed", (other_key, local_key), "b", context={})
    after = parsed().sections
    assert after[:1] == before
    assert after[1].shards.keys() == {"b"}
    assert after[1].data_key.key_id != before[0].data_key.key_id
    assert [form.kms_key for form in after[1].data_key.wrapped_keys] == [other_key.full_name(), local_key.full_name()]
    assert listed() == ["a", "b"]


def test_adding_needs_no_right_to_decrypt(folder, fake_kms):
    fake_kms.create_key("etl")
    fake_kms.deny("Decrypt")
    key = AwsKms("alias/etl")
    dataset("sealed", key, "a")
    clear_caches()
    dataset("sealed", key, "b")
    assert listed() == ["a", "b"]


def test_a_second_try_changes_nothing_and_asks_no_kms(folder, local_key):
    dataset("sealed", local_key, "a", "b")
    before = Path("sealed", NAME).read_bytes(), Path("sealed", NAME).stat().st_ino
    kms_calls.counts.clear()
    assert add("sealed", local_key, "a", "b") == f"{folder}/{NAME}"
    assert add("sealed", local_key, "b") == f"{folder}/{NAME}"
    assert (Path("sealed", NAME).read_bytes(), Path("sealed", NAME).stat().st_ino) == before
    assert not kms_calls.counts


def test_only_what_is_new_goes_into_the_section(folder, local_key):
    dataset("sealed", local_key, "a", "b")
    seal(local_key, "sealed/b", "sealed/c")
    kms_calls.counts.clear()
    add("sealed", local_key, "a", "b", "c")
    assert [sorted(section.shards) for section in parsed().sections] == [["a", "b"], ["b", "c"]]
    assert parsed().latest()["b"][1].shard_id == shard_id("sealed/b")
    assert kms_calls.counts == {"GenerateDataKey": 1}


def test_nothing_to_say_makes_no_manifest(folder, local_key):
    assert add_to_manifest("sealed/", [], (local_key,), CONTEXT) is None
    assert listing("sealed") == []
    assert not kms_calls.counts


def test_a_shard_that_was_there_is_listed_only_if_its_path_is_unknown(folder, local_key):
    dataset("sealed", local_key, "a")
    known = parsed().latest()["a"]
    seal(local_key, "sealed/a", "sealed/b")
    add("sealed", local_key, "a", "b", anew=False)
    assert parsed().latest()["a"] == known  # somebody may have put another one there: no word of ours for it
    assert parsed().latest()["b"][1].shard_id == shard_id("sealed/b")


def test_a_shard_that_was_removed_on_purpose_and_is_there_again_is_listed_again(folder, local_key):
    dataset("sealed", local_key, "a")
    with local_key.generate_data_key(CONTEXT) as data_key:
        Path("sealed", NAME).write_bytes(parsed().with_section(data_key, CONTEXT, {"a": None}).to_bytes())
    assert listed() == []
    add("sealed", local_key, "a", anew=False)
    assert listed() == ["a"]


@pytest.mark.parametrize("above", ["", "year/", "year/month/"])
def test_the_nearest_manifest_at_or_above_the_output_takes_the_shards(folder, local_key, above):
    write_files("sealed", {f"{above}{NAME}": Manifest().to_bytes()})
    write_files("sealed", {f"year/month/day/other/{NAME}": Manifest().to_bytes()})
    if above == "year/month/":
        write_files("sealed", {NAME: b"not looked at"})
    path = add_to_manifest("sealed/year/month/day/", written("sealed/year/month/day/a"), (local_key,), CONTEXT)
    assert path == f"{folder}/{above}{NAME}"
    assert listed(f"sealed/{above}") == ["year/month/day/a".removeprefix(above)]


def test_without_one_it_is_made_in_the_output_folder(folder, local_key):
    Path("sealed/year").mkdir()
    assert add_to_manifest("sealed/year/", written("sealed/year/a"), (local_key,), CONTEXT) == f"{folder}/year/{NAME}"


@pytest.mark.parametrize("spelling", ["sealed/", "./sealed/", "sealed/../sealed/", "link/", "{folder}/"])
def test_a_folder_is_the_same_however_it_is_written(folder, local_key, spelling):
    Path("link").symlink_to("sealed")
    dataset("sealed", local_key, "a")
    seal(local_key, "sealed/b")
    spelling = spelling.format(folder=folder)
    assert add_to_manifest(spelling, [shard_on_store(f"{spelling}b")], (local_key,), CONTEXT) == f"{folder}/{NAME}"
    assert listed() == ["a", "b"]


def test_a_shard_elsewhere_is_not_listed(folder, local_key):
    with pytest.raises(ManifestError) as caught:
        add_to_manifest("sealed/", written("sealed/a", "b"), (local_key,), CONTEXT)
    assert str(caught.value) == f"b is not below {folder}/, whose manifest was to list it"
    assert listing("sealed") == []


def test_what_is_no_manifest_is_not_written_over(folder, local_key):
    for content in (b"{}", b"", parsed_or_empty()[:-1]):
        write_files("sealed", {NAME: content})
        with pytest.raises(FormatError, match="is not a readable manifest"):
            add_to_manifest("sealed/", written("sealed/a"), (local_key,), CONTEXT)
        assert Path("sealed", NAME).read_bytes() == content


def parsed_or_empty():
    return Manifest().to_bytes()


def test_a_manifest_that_would_be_too_large_is_not_written(folder, local_key, monkeypatch):
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", 1500)
    add_to_manifest("sealed/", written("sealed/a"), (local_key,), CONTEXT)
    before = Path("sealed", NAME).read_bytes()
    with pytest.raises(ManifestError, match=r"would be larger than 1500 bytes\. Write into another folder"):
        add_to_manifest("sealed/", written(*(f"sealed/{n}" for n in range(20))), (local_key,), CONTEXT)
    assert Path("sealed", NAME).read_bytes() == before
    assert listing("sealed") == [NAME]


def test_a_manifest_that_may_not_be_read_is_not_taken_for_none(folder, local_key, monkeypatch):
    dataset("sealed", local_key, "a")
    real = module.read_small

    def denied(path, limit):
        if path.endswith(NAME):
            raise PermissionError(13, "Permission denied", path)
        return real(path, limit)

    monkeypatch.setattr(module, "read_small", denied)  # as root reads everything
    with pytest.raises(PermissionError):
        read("sealed", local_key)
    with pytest.raises(PermissionError):
        add_to_manifest("sealed/", written("sealed/b"), (local_key,), CONTEXT)


def test_what_was_written_is_gone_through_anew_when_another_job_was_faster(folder, local_key, monkeypatch):
    swap, tries = module._swap, []

    def slow(*arguments):
        tries.append(arguments)
        return len(tries) > 1 and swap(*arguments)

    monkeypatch.setattr(module, "_swap", slow)
    add_to_manifest("sealed/", iter(written("sealed/a", "sealed/b")), (local_key,), CONTEXT)
    assert listed() == ["a", "b"]


def test_many_shards_take_little_memory(folder, local_key):
    class Written:
        """Makes them when they are asked for, as a job that has them compressed."""

        def __iter__(self):
            for number in range(20_000):
                yield WrittenShard(f"sealed/part-{number:05}.csv", ManifestEntry(uuid.uuid4().hex, number, 1000))

    add_to_manifest("sealed/", written("sealed/a"), (local_key,), CONTEXT)
    Path("sealed", NAME).unlink()
    path, peak = peak_of(lambda: add_to_manifest("sealed/", Written(), (local_key,), CONTEXT))
    assert peak < 4.5 * Path(path).stat().st_size
    assert len(listed()) == 20_000


def test_the_data_key_is_erased(folder, local_key, monkeypatch):
    made = []

    def generate(keys, context):
        made.append(keys[0].generate_data_key(context))
        return made[-1]

    monkeypatch.setattr(module, "generate_data_key", generate)
    add_to_manifest("sealed/", written("sealed/a"), (local_key,), CONTEXT)
    monkeypatch.setattr(module, "_swap", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add_to_manifest("sealed/", written("sealed/b"), (local_key,), CONTEXT)
    assert [data_key.closed for data_key in made] == [True, True]


def test_a_link_stays_a_link(folder, local_key):
    Path("kept").mkdir()
    write_files("kept", {"list.json": Manifest().to_bytes()})
    Path("sealed", NAME).symlink_to("../kept/list.json")
    add_to_manifest("sealed/", written("sealed/a"), (local_key,), CONTEXT)
    assert Path("sealed", NAME).is_symlink()
    assert Manifest.from_bytes(Path("kept/list.json").read_bytes(), "m").latest().keys() == {"a"}


@pytest.mark.parametrize(
    ("folder", "below", "expected"),
    [
        ("/a/b/", "", ["/a/b/", "/a/", "/"]),
        ("/", "", ["/"]),
        ("/a/b/c/", "/a/", ["/a/b/c/", "/a/b/"]),
        ("/a/", "/a/", []),
        ("s3://bucket/a/b/", "", ["s3://bucket/a/b/", "s3://bucket/a/", "s3://bucket/"]),
        ("s3://bucket/", "", ["s3://bucket/"]),
        ("s3://bucket/a//b/", "s3://bucket/a/", ["s3://bucket/a//b/", "s3://bucket/a//"]),
        ("hdfs:///a/", "", ["hdfs:///a/", "hdfs:///"]),
    ],
)
def test_the_folders_above_a_folder_end_at_the_root(folder, below, expected):
    assert list(parents(folder, below)) == expected


@pytest.mark.parametrize("path", ["s3://bucket/a/../x", "s3://bucket/a//x"])
def test_a_name_that_no_reader_takes_is_not_listed(path):
    with pytest.raises(ManifestError, match="has a name that no manifest takes"):
        module._changes(Manifest(), written(path), "s3://bucket/a/")


# ------------------------------------------------------------------------------------- many writers at one time


def test_processes_that_add_at_one_time_lose_nothing(folder, local_key):
    def work(number):
        for index in range(5):
            add_to_manifest("sealed/", written(f"sealed/{number}-{index}"), (local_key,), CONTEXT)
        return number

    children = [Child(lambda number=number: work(number)) for number in range(8)]
    assert [child.result() for child in children] == list(range(8))
    assert listed() == sorted(f"{number}-{index}" for number in range(8) for index in range(5))
    assert len(parsed().sections) == 40
    read_everything(local_key)
    assert listing("sealed") == [NAME]


def read_everything(key):
    """Check every section."""
    for section in parsed().sections:
        with key.unwrap(section.data_key.wrapped_keys[0], section.context) as data_key:
            section.verify(data_key, "it")


def test_so_do_threads(folder, local_key):
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda number: add_to_manifest("sealed/", written(f"sealed/{number}"), (local_key,), CONTEXT), range(24)
            )
        )
    assert listed() == sorted(map(str, range(24)))


@contextmanager
def others_first(monkeypatch, other, times=1):
    """Have another writer come just before each replacement of a manifest."""
    real, left = module._swap, [times]

    def swap(path, old, new):
        left[0] -= 1
        if left[0] >= 0:
            other()
        return real(path, old, new)

    monkeypatch.setattr(module, "_swap", swap)
    yield left
    monkeypatch.setattr(module, "_swap", real)


@pytest.mark.parametrize("there", [False, True])
def test_who_comes_second_adds_to_what_the_first_has_written(folder, local_key, monkeypatch, there):
    if there:
        add_to_manifest("sealed/", written("sealed/z"), (local_key,), CONTEXT)
    real = module._swap

    def other():
        monkeypatch.setattr(module, "_swap", real)
        add_to_manifest("sealed/", written("sealed/b"), (local_key,), CONTEXT)

    kms_calls.counts.clear()
    with others_first(monkeypatch, other):
        add_to_manifest("sealed/", written("sealed/a"), (local_key,), CONTEXT)
    assert [sorted(section.shards) for section in parsed().sections] == [*([["z"]] if there else []), ["b"], ["a"]]
    assert kms_calls.counts == {"GenerateDataKey": 2}  # the second try has the data key of the first
    read_everything(local_key)
    assert listing("sealed") == [NAME]


def test_a_manifest_that_goes_away_meanwhile_is_made_anew(folder, local_key, monkeypatch):
    add_to_manifest("sealed/", written("sealed/z"), (local_key,), CONTEXT)
    with others_first(monkeypatch, Path("sealed", NAME).unlink):
        add_to_manifest("sealed/", written("sealed/a"), (local_key,), CONTEXT)
    assert listed() == ["a"]


def test_who_never_gets_a_turn_says_so(folder, local_key, monkeypatch):
    monkeypatch.setattr(module, "_swap", lambda *_: False)
    monkeypatch.setattr(module, "_WAIT_S", 0)
    with pytest.raises(ManifestError) as caught:
        add_to_manifest("sealed/", written("sealed/a"), (local_key,), CONTEXT)
    assert str(caught.value) == (
        f"{folder}/{NAME} was changed by others 100 times while this job added to it. Run it again"
    )
    assert kms_calls.counts == {"GenerateDataKey": 1}


def test_a_writer_killed_at_any_moment_leaves_a_whole_manifest(folder, local_key):
    moments = random.Random(5)

    def work(run):
        for index in range(10_000):
            add_to_manifest("sealed/", written(f"sealed/{run:02}-{index:05}"), (local_key,), CONTEXT)

    seen = 0
    for run in range(12):
        pid = os.fork()
        if pid == 0:
            try:
                work(run)
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0.005, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        if Path("sealed", NAME).exists():
            names = listed()
            ours = [name for name in names if name.startswith(f"{run:02}")]
            assert ours == [f"{run:02}-{index:05}" for index in range(len(ours))]
            assert len(names) - len(ours) == seen
            seen = len(names)
    assert seen > 0
    read_everything(local_key)


@pytest.mark.parametrize("there", [False, True])
def test_so_does_one_killed_at_any_step(folder, local_key, there):
    if there:
        add_to_manifest("sealed/", written("sealed/z"), (local_key,), CONTEXT)
    first = Path("sealed", NAME).read_bytes() if there else None
    seen = set()
    for step in range(1, 60):
        pid = os.fork()
        if pid == 0:
            try:
                sys.addaudithook(killer(f"{folder}", step))
                add_to_manifest("sealed/", written("sealed/a"), (local_key,), CONTEXT)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        if status == 0:
            break
        assert status == signal.SIGKILL
        names = tuple(listed()) if Path("sealed", NAME).exists() else None
        seen.add(names)
        assert names in ((("z",) if there else None), ("a", "z") if there else ("a",))
        Path("sealed", NAME).unlink(missing_ok=True)
        if first is not None:
            Path("sealed", NAME).write_bytes(first)
    assert status == 0
    assert len(seen) == 2  # it was killed before and after the manifest got its name


def killer(below, step):
    """Return an audit hook that kills this process just before the step-th time that it touches a file there."""
    left = [step]

    def count(event, arguments):
        if event in {"open", "os.rename", "os.link", "os.remove"} and str(arguments[0]).startswith(below):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return count


# --------------------------------------------------------------------------------------------- other filesystems


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """The folder behind a Beam filesystem of another scheme."""
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(other_filesystem, "ROOT", str(tmp_path / "disk"))
    monkeypatch.setattr(other_filesystem.DiskFileSystem, "log", [])
    return tmp_path / "disk"


def test_another_filesystem_of_beams_has_manifests_too(disk, local_key):
    root = "test-disk://box/sealed/"
    for name in ("a", "b"):
        assert add_to_manifest(root, written(f"{root}{name}"), (local_key,), CONTEXT) == f"{root}{NAME}"
    assert listed(disk / "box/sealed") == ["a", "b"]
    reader = ManifestReader("require", (local_key,), CONTEXT)
    assert reader.check(f"{root}*", [f"{root}a", f"{root}b"]) == {f"{root}a": "0" * 32, f"{root}b": "0" * 32}
    with pytest.raises(ManifestError, match="test-disk://box/sealed/b: listed by the manifest, and not there"):
        reader.check(f"{root}*", [f"{root}a"])
    assert listing(disk) == [f"box/sealed/{NAME}"]


def test_a_manifest_larger_than_a_key_file_may_be_is_added_to_there(disk, local_key):
    root = "test-disk://sealed/"
    for start in (0, 5000):
        add_to_manifest(root, written(*(f"{root}{start + n}" for n in range(5000))), (local_key,), CONTEXT)
    assert (disk / "sealed" / NAME).stat().st_size > 1 << 20
    assert len(listed(disk / "sealed")) == 10_000


@pytest.fixture
def bucket(moto_server, monkeypatch):
    """A client for an empty bucket."""
    monkeypatch.setattr(FileSystems, "_pipeline_options", None)
    clear_s3_clients()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    clear_s3_clients()


def s3_listed(client, prefix="sealed/"):
    raw = client.get_object(Bucket="bucket", Key=f"{prefix}{NAME}")["Body"].read()
    return sorted(Manifest.from_bytes(raw, "m").latest())


@pytest.mark.parametrize("there", [False, True])
def test_on_s3_who_comes_between_look_and_write_is_not_lost(bucket, local_key, there):
    root = "s3://bucket/sealed/"
    if there:
        add_to_manifest(root, written(f"{root}z"), (local_key,), CONTEXT)
    left = ["b", "c"]

    def come_between(**_):
        if left:
            add_to_manifest(root, written(f"{root}{left.pop(0)}"), (local_key,), CONTEXT)

    s3_client().meta.events.register("before-send.s3.PutObject", come_between)
    assert add_to_manifest(root, written(f"{root}a"), (local_key,), CONTEXT) == f"{root}{NAME}"
    assert s3_listed(bucket) == ["a", "b", "c", *(["z"] if there else [])]
    assert not left


def test_on_s3_the_nearest_manifest_is_found_and_what_is_hidden_passed_over(bucket, local_key):
    bucket.put_object(Bucket="bucket", Key=f"top/{NAME}", Body=Manifest().to_bytes())
    assert nearest("s3://bucket/top/sealed/day/") == (f"s3://bucket/top/{NAME}", Manifest().to_bytes())
    assert nearest("s3://bucket/elsewhere/") is None

    denied = []

    def deny(request, **_):
        path = request.url.partition("?")[0]
        if "list-type" in request.url or not path.endswith(f"/top/sealed/{NAME}"):
            denied.append(request.url)
            return s3_error(request, 403, "AccessDenied")
        return None

    for operation in ("GetObject", "ListObjectsV2"):
        s3_client().meta.events.register(f"before-send.s3.{operation}", deny)
    assert nearest("s3://bucket/top/sealed/day/") is None  # who may neither list nor read there
    assert denied
    root = "s3://bucket/top/sealed/"
    bucket.put_object(Bucket="bucket", Key=f"top/sealed/{NAME}", Body=Manifest().to_bytes())
    assert nearest(f"{root}day/") == (f"{root}{NAME}", Manifest().to_bytes())


def test_on_s3_a_manifest_that_is_listed_and_denied_is_an_error(bucket, local_key):
    root = "s3://bucket/sealed/"
    add_to_manifest(root, written(f"{root}a"), (local_key,), CONTEXT)

    def deny(request, **_):
        return s3_error(request, 403, "AccessDenied")

    s3_client().meta.events.register("before-send.s3.GetObject", deny)
    with pytest.raises(PermissionError, match="s3:GetObject"):
        nearest(root)


def test_on_s3_what_a_pattern_finds_is_what_is_listed(bucket, local_key):
    root = "s3://bucket/sealed/"
    add_to_manifest(root, written(f"{root}a", f"{root}sub/b"), (local_key,), CONTEXT)
    reader = ManifestReader("require", (local_key,), CONTEXT)
    for name in ("a", "sub/b", "x"):
        bucket.put_object(Bucket="bucket", Key=f"sealed/{name}", Body=b"")
    assert reader.check("s3://bucket/sealed/a", [f"{root}a"]) == {f"{root}a": "0" * 32}
    assert reader.check("s3://bucket/sealed/sub/*", [f"{root}sub/b"]).keys() == {f"{root}sub/b"}
    with pytest.raises(ManifestError, match=r"^s3://bucket/sealed/x: not listed by the manifest"):
        reader.check("s3://bucket/sealed/**", [f"{root}a", f"{root}sub/b", f"{root}x"])
    with pytest.raises(ManifestError, match=r"^s3://bucket/sealed/a, s3://bucket/sealed/sub/b: listed by"):
        reader.check("s3://bucket/sealed/**", [])


# ------------------------------------------------------------------------------------------------------- reading


def read(pattern, key, mode="use", context=CONTEXT, failures=None, reader=None):
    """Do what a reader does with a pattern: the shard ids, by path."""
    glob, found = expand(str(pattern))
    keys = key if isinstance(key, tuple) else (key,)
    reader = reader or ManifestReader(mode, keys, context)
    return reader.check(glob, [file.path for file in found if may_be_listed(file.path)], failures)


def error_of(kind, *arguments, **settings):
    with pytest.raises(EnvelopeError) as caught:
        read(*arguments, **settings)
    assert type(caught.value) is kind
    return str(caught.value)


THREE = ("a", "b", "sub/c")


@pytest.fixture
def three(folder, local_key):
    """Three shards and their manifest, in `sealed`."""
    dataset("sealed", local_key, *THREE)
    return local_key


def gone(*names):
    for name in names:
        path = Path("sealed", name)
        path.unlink()
        path.with_name(key_file_name(path.name)).unlink()


@pytest.mark.parametrize("mode", ["use", "require"])
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("sealed", THREE),
        ("sealed/", THREE),
        ("sealed/**", THREE),
        ("sealed/*", ("a", "b")),
        ("./sealed/*", ("a", "b")),
        ("{folder}/*", ("a", "b")),
        ("link/*", ("a", "b")),
        ("sealed/sub/../*", ("a", "b")),
        ("sealed/a", ("a",)),
        ("./sealed/a", ("a",)),
        ("link/a", ("a",)),
        ("sealed/?", ("a", "b")),
        ("sealed/[b-z]", ("b",)),
        ("sealed/*/c", ("sub/c",)),
        ("sealed/sub", ("sub/c",)),
        ("sealed/sub/*", ("sub/c",)),
        ("**", THREE),
    ],
)
def test_every_pattern_that_finds_listed_shards_gives_their_ids(three, folder, pattern, names, mode):
    Path("link").symlink_to("sealed")
    if pattern == "**":
        os.chdir(folder)
    found = read(pattern.format(folder=folder), three, mode)
    assert {str(Path(path).resolve().relative_to(folder)): shard for path, shard in found.items()} == {
        name: shard_id(folder / name) for name in names
    }


@pytest.mark.parametrize("name", ["x[1].csv", "x*", "a?", "sub[2]/b", "ü", "a b", "[", "]", "x[!a]", "a\nb", '"', "\\"])
def test_names_with_the_characters_of_globs_are_names(folder, local_key, name):
    dataset("sealed", local_key, name, "other")
    assert read(f"sealed/{name}", local_key) == {f"sealed/{name}": shard_id(f"sealed/{name}")}
    assert len(read("sealed", local_key)) == 2
    gone(name)
    message = error_of(ManifestError, "sealed", local_key)
    assert message.startswith(f"sealed/{name}: listed by the manifest, and not there.")


def test_a_missing_shard_is_named(three):
    gone("b")
    assert error_of(ManifestError, "sealed/**", three) == f"sealed/b: {manifest_reader.MISSING}"
    assert error_of(ManifestError, "sealed/*", three) == f"sealed/b: {manifest_reader.MISSING}"
    assert read("sealed/a", three) == {"sealed/a": shard_id("sealed/a")}
    assert read("sealed/sub/*", three).keys() == {"sealed/sub/c"}
    assert read("sealed/**", three, "ignore") == {}


def test_a_shard_that_nobody_listed_is_named(three):
    seal(three, "sealed/x", "sealed/sub/y")
    assert error_of(ManifestError, "sealed/*", three) == f"sealed/x: {manifest_reader.EXTRA}"
    assert error_of(ManifestError, "sealed/x", three) == f"sealed/x: {manifest_reader.EXTRA}"
    assert error_of(ManifestError, "sealed", three).startswith("sealed/sub/y, sealed/x: not listed by the manifest")
    assert read("sealed/[ab]", three).keys() == {"sealed/a", "sealed/b"}
    assert read("sealed/**", three, "ignore") == {}


def test_of_many_the_first_three_are_named(folder, local_key):
    names = [f"{number}" for number in range(9)]
    dataset("sealed", local_key, *names)
    gone(*names[1:])
    message = error_of(ManifestError, "sealed", local_key)
    assert message.startswith("sealed/1, sealed/2, sealed/3 (and 5 more): listed by")
    gone_again = [f"x{number}" for number in range(4)]
    dataset("sealed", local_key, *names)
    seal(local_key, *(f"sealed/{name}" for name in gone_again))
    assert error_of(ManifestError, "sealed", local_key).startswith("sealed/x0, sealed/x1, sealed/x2 (and 1 more): not")


def test_what_is_wrong_with_single_shards_may_be_taken_instead(three):
    gone("b")
    seal(three, "sealed/x")
    failures = {}
    assert read("sealed", three, failures=failures).keys() == {"sealed/a", "sealed/sub/c"}
    assert {path: (type(error), str(error)) for path, error in failures.items()} == {
        "sealed/b": (ManifestError, f"sealed/b: {manifest_reader.MISSING}"),
        "sealed/x": (ManifestError, f"sealed/x: {manifest_reader.EXTRA}"),
    }


def test_a_survey_says_all_of_it(three):
    gone("b")
    seal(three, "sealed/x")
    reader = ManifestReader("use", (three,), CONTEXT)
    survey = reader.survey("sealed/*", ["sealed/a", "sealed/x"])
    assert survey == Survey((f"sealed/{NAME}",), {"sealed/a": shard_id("sealed/a")}, ("sealed/b",), ("sealed/x",))
    assert ManifestReader("ignore", (three,), CONTEXT).survey("sealed/*", ["sealed/a"]) == Survey((), {}, (), ())


def test_a_shard_of_another_id_is_not_the_one(three):
    (sealed,) = read("sealed/a", three).values()
    key_file = KeyFile.from_bytes(Path("sealed/_KEY_FOR_b.json").read_bytes(), "k")
    with pytest.raises(ManifestError) as caught:
        check_shard_id("sealed/a", key_file, sealed)
    assert str(caught.value).startswith(
        "sealed/a is not the shard that its manifest lists: it was swapped, or an older"
    )
    check_shard_id("sealed/b", key_file, key_file.shard_id.hex)
    check_shard_id("sealed/b", key_file, "")


def test_a_shard_removed_on_purpose_is_not_missing_and_is_extra_if_it_comes_back(three):
    with three.generate_data_key(CONTEXT) as data_key:
        Path("sealed", NAME).write_bytes(parsed().with_section(data_key, CONTEXT, {"b": None}).to_bytes())
    assert error_of(ManifestError, "sealed", three) == f"sealed/b: {manifest_reader.EXTRA}"
    gone("b")
    assert read("sealed", three).keys() == {"sealed/a", "sealed/sub/c"}


def test_the_last_section_that_names_a_shard_counts(three):
    old = shard_id("sealed/a")
    seal(three, "sealed/a")
    add("sealed", three, "a")
    assert read("sealed", three)["sealed/a"] == shard_id("sealed/a") != old


def test_without_a_manifest(folder, local_key):
    seal(local_key, "sealed/a")
    kms_calls.counts.clear()
    assert read("sealed", local_key) == read("sealed", local_key, "ignore") == {}
    assert error_of(ManifestError, "sealed/*", local_key, "require") == (
        f"sealed/ has no {NAME}, nor has a folder above it: it was lost, or the shards were written without one. "
        "Restore it from a copy, or read with manifest='use' (--manifest=use)"
    )
    assert not kms_calls.counts


def test_a_manifest_above_speaks_for_its_folders(three, folder):
    seal(three, "sealed/sub/x")
    assert error_of(ManifestError, "sealed/sub", three) == f"sealed/sub/x: {manifest_reader.EXTRA}"
    os.chdir("sealed/sub")
    assert error_of(ManifestError, "*", three) == f"x: {manifest_reader.EXTRA}"
    assert error_of(ManifestError, "x", three) == f"x: {manifest_reader.EXTRA}"
    os.remove("x")
    os.remove("c")
    os.remove("_KEY_FOR_c.json")
    with pytest.raises(ManifestError, match=r"^c: listed by the manifest, and not there\."):
        ManifestReader("use", (three,), CONTEXT).check("*", [])


def test_the_manifests_of_folders_below_speak_for_theirs(folder, local_key):
    for day in ("1", "2"):
        dataset(f"sealed/day={day}", local_key, "a", "b")
    assert len(read("sealed", local_key, "require")) == 4
    assert len(read("sealed/*/*", local_key, "require")) == 4
    seal(local_key, "sealed/day=2/x")
    assert error_of(ManifestError, "sealed/*/*", local_key) == f"sealed/day=2/x: {manifest_reader.EXTRA}"
    os.remove("sealed/day=2/x")
    os.remove("sealed/day=1/b")
    assert error_of(ManifestError, "sealed/*/*", local_key) == f"sealed/day=1/b: {manifest_reader.MISSING}"
    assert len(read("sealed/day=2/*", local_key)) == 2


def test_a_folder_whose_shards_are_all_gone_is_told_of_by_its_manifest(folder, local_key):
    for day in ("1", "2"):
        dataset(f"sealed/day={day}", local_key, "a")
    gone("day=2/a")
    assert error_of(ManifestError, "sealed", local_key) == f"sealed/day=2/a: {manifest_reader.MISSING}"
    gone("day=1/a")
    assert error_of(ManifestError, "sealed", local_key).startswith("sealed/day=1/a, sealed/day=2/a: listed by")


def test_a_file_beside_the_folders_with_manifests_passes_unless_one_is_required(folder, local_key):
    seal(local_key, "sealed/top")
    assert read("sealed", local_key) == {}
    dataset("sealed/day=1", local_key, "a")
    assert read("sealed", local_key).keys() == {"sealed/day=1/a"}
    assert error_of(ManifestError, "sealed", local_key, mode="require") == f"sealed/top: {manifest_reader.EXTRA}"
    assert read("sealed/*", local_key) == {}


def test_a_manifest_made_above_another_lists_with_it(folder, local_key):
    dataset("sealed/day=1", local_key, "a")
    dataset("sealed", local_key, "b")
    assert listed("sealed") == ["b"]
    assert read("sealed", local_key).keys() == {"sealed/day=1/a", "sealed/b"}


def test_a_shard_that_two_manifests_list_as_two_is_an_error(folder, local_key):
    dataset("sealed", local_key, "day/a", "day/b")
    seal(local_key, "sealed/day/a")
    shard = shard_on_store("sealed/day/a")
    write_files("sealed/day", {NAME: Manifest().to_bytes()})
    add_to_manifest("sealed/day/", [shard_on_store("sealed/day/b")], (local_key,), CONTEXT)
    assert len(ManifestReader("use", (local_key,), CONTEXT).check("sealed/day/b", ["sealed/day/b"])) == 1
    add_to_manifest("sealed/day/", [shard], (local_key,), CONTEXT)
    message = error_of(ManifestError, "sealed", local_key)
    assert message.startswith(
        f"{folder}/day/a is listed by two manifests as two shards: by {folder}/day/{NAME}, and by"
    )


def test_a_broken_manifest_is_an_error_and_not_passed_over(three):
    whole = Path("sealed", NAME).read_bytes()
    for raw in (b"", b"{}", whole[:-1], whole.replace(b'"sub/c"', b'"sub/d"')):
        Path("sealed", NAME).write_bytes(raw)
        with pytest.raises((FormatError, ManifestError)):
            read("sealed", three)
        assert read("sealed", three, "ignore") == {}


def change(field, value):
    document = json.loads(Path("sealed", NAME).read_bytes())
    document["sections"][0]["shards"]["a"][field] = value
    Path("sealed", NAME).write_bytes(text(document))


@pytest.mark.parametrize(
    ("field", "value"),
    [("shard_id", "0" * 32), ("stored_bytes", 1), ("plaintext_bytes", 1), ("records", 1)],
)
def test_a_changed_field_is_an_error(three, field, value):
    change(field, value)
    for pattern in ("sealed", "sealed/*", "sealed/a", "sealed/b", "sealed/sub/*"):
        message = error_of(ManifestError, pattern, three)
        assert message.startswith("section 1 of ")
        assert "was changed after it was written, or forged" in message


def test_a_manifest_forged_without_the_key_is_an_error(three, other_key):
    """By somebody who has a KMS key of his own, or none, and gives the right key's name."""
    name = three.full_name()
    for data_key in (
        DataKey(bytes(32), (WrappedKey("local-kms", name, b"x" * 60),)),
        other_key.generate_data_key(CONTEXT),
    ):
        with data_key:
            Path("sealed", NAME).write_bytes(Manifest().with_section(data_key, CONTEXT, {"a": entry()}).to_bytes())
        clear_caches()
        with pytest.raises((WrongKeyError, TamperedError)) as caught:
            read("sealed", three)
        assert NAME in str(caught.value)


def test_a_manifest_under_the_data_key_of_a_shard_is_an_error(three):
    """Who sees the shards' wrapped keys, and no data key, cannot sign with them."""
    key_file = KeyFile.from_bytes(Path("sealed/_KEY_FOR_a.json").read_bytes(), "k")
    section = ManifestSection(key_file.data_keys[0], CONTEXT, {"a": entry()}, Manifest().digest(), mac=bytes(32))
    Path("sealed", NAME).write_bytes(Manifest((section,)).to_bytes())
    assert "was changed after it was written, or forged" in error_of(ManifestError, "sealed", three)


def test_the_manifest_of_another_dataset_is_an_error(three, other_key):
    real = Path("sealed", NAME).read_bytes()
    for name, key, context, kind in (
        ("same", three, CONTEXT, ManifestError),
        ("context", three, {"dataset": "cars"}, ContextMismatchError),
        ("key", other_key, CONTEXT, WrongKeyError),
    ):
        dataset(name, key, "a", "b", context=context)
        Path("sealed", NAME).write_bytes(Path(name, NAME).read_bytes())
        assert error_of(kind, "sealed", three)
        gone_path = Path("sealed", NAME)
        gone_path.write_bytes(real)
    assert len(read("sealed", three)) == 3


def test_sections_taken_out_are_noticed(three):
    for names in (("d",), ("e",)):
        dataset("sealed", three, *names)
    a, b, c = parsed().sections

    def put(*sections):
        Path("sealed", NAME).write_bytes(Manifest(sections).to_bytes())

    for sections in ((b, c), (a, c), (b, a, c), (a, b, b, c), (c,)):
        put(*sections)
        assert "has lost a section, or got one from elsewhere" in error_of(ManifestError, "sealed", three)
    # Whoever takes one out and mends the chain is found by the MAC of the last section, whatever the pattern.
    put(a, replace(c, earlier=Manifest((a,)).digest()))
    for pattern in ("sealed", "sealed/a", "sealed/e"):
        assert "section 2 of" in error_of(ManifestError, pattern, three)


# -------------------------------------------------------------------------- tenants, keys and contexts in one folder

A, B = {"tenant": "a"}, {"tenant": "b"}


@pytest.fixture
def tenants(folder, local_key, other_key):
    """Shards of two tenants in one folder, each under a key and context of its own."""
    dataset("sealed", local_key, "a/1", "a/2", context=A)
    dataset("sealed", other_key, "b/1", context=B)
    dataset("sealed", local_key, "a/3", context=A)
    dataset("sealed", other_key, "b/2", context=B)
    return local_key, other_key


def test_a_tenants_reader_needs_that_tenants_key_and_context_only(tenants):
    ours, theirs = tenants
    assert len(read("sealed/a/*", ours, "require", A)) == 3
    assert len(read("sealed/b/*", theirs, "require", B)) == 2
    assert len(read("sealed", tenants, "require", ANY_CONTEXT)) == 5
    error_of(WrongKeyError, "sealed/b/*", ours, "use", ANY_CONTEXT)
    error_of(ContextMismatchError, "sealed/b/*", tenants, "use", A)
    error_of(ContextMismatchError, "sealed", tenants, "use", A)


def forge(shards, context, form, mac=bytes(32)):
    """Add a section that nobody can open, in its right place."""
    before = parsed()
    section = ManifestSection(WrappedDataKey(bytes(16), (form,)), context, shards, before.digest(), mac=mac)
    Path("sealed", NAME).write_bytes(Manifest((*before.sections, section)).to_bytes())


@pytest.mark.parametrize("said", [None, entry()])
def test_a_section_that_claims_our_paths_and_cannot_be_opened_is_an_error(tenants, said):
    ours, _ = tenants
    gone("a/1")
    before = Path("sealed", NAME).read_bytes()
    strange = WrappedKey("local-kms", "default/" + "0" * 32, b"x" * 60)
    known = WrappedKey("local-kms", ours.full_name(), b"x" * 60)
    for context, form, kind in ((A, strange, WrongKeyError), (B, known, ContextMismatchError)):
        forge({"a/1": said}, context, form)
        error_of(kind, "sealed/a/*", ours, "use", A)
        Path("sealed", NAME).write_bytes(before)
    forge({"a/1": said}, A, known)
    with pytest.raises(EnvelopeError):
        read("sealed/a/*", ours, "use", A)


def test_a_section_of_others_that_claims_none_of_our_paths_does_not_stop_us(tenants):
    forge({"b/9": entry()}, B, WrappedKey("local-kms", "default/" + "0" * 32, b"x" * 60))
    assert len(read("sealed/a/*", tenants[0], "require", A)) == 3


def test_a_last_section_under_another_key_in_our_context_does_not_stop_us(folder, local_key, other_key):
    dataset("sealed", local_key, "a/1")
    dataset("sealed", other_key, "b/1")
    assert len(read("sealed/a/*", local_key, "require")) == 1
    error_of(WrongKeyError, "sealed", local_key)


def test_one_that_lies_before_our_last_is_bound_by_it(tenants):
    """Others' sections are in the chain of ours, though we cannot open them."""
    one, two, three, four = parsed().sections
    changed = replace(two, shards={**two.shards, "b/7": entry()}, mac=bytes(32))
    behind = replace(three, earlier=Manifest((one, changed)).digest())
    last = replace(four, earlier=Manifest((one, changed, behind)).digest())
    Path("sealed", NAME).write_bytes(Manifest((one, changed, behind, last)).to_bytes())
    for pattern in ("sealed/a/1", "sealed/a/3", "sealed/a/*"):
        assert "section 3 of" in error_of(ManifestError, pattern, tenants[0], "use", A)


def test_a_key_that_may_not_be_used_is_an_error_where_its_paths_are_read(folder, fake_kms):
    keys = [AwsKms(fake_kms.create_key()) for _ in range(2)]
    for number, key in enumerate(keys):
        dataset("sealed", key, f"{number}/x")
    fake_kms.deny("Decrypt", keys[1].key_id)
    clear_caches()
    assert len(read("sealed/0/*", tuple(keys))) == 1
    error_of(KeyAccessError, "sealed/1/*", tuple(keys))


# ----------------------------------------------------------------------------------------------- calls and caches


def test_a_section_is_one_decrypt_for_a_reader_and_process(folder, local_key):
    for name in ("a", "b", "c"):
        dataset("sealed", local_key, name)
    clear_caches()
    reader = ManifestReader("use", (local_key,), CONTEXT)
    kms_calls.counts.clear()
    read("sealed/a", local_key, reader=reader)
    assert kms_calls.counts == {"Decrypt": 2}  # that of its section, and of the last, which binds all others
    read("sealed", local_key, reader=reader)
    read("sealed", local_key, reader=reader)
    read("sealed", local_key)
    assert kms_calls.counts == {"Decrypt": 3}


def test_a_manifest_is_read_once_for_a_reader_and_anew_for_the_next(three, monkeypatch):
    reads, real = [], module.read_manifest

    def counted(path):
        reads.append(path)
        return real(path)

    monkeypatch.setattr(module, "read_manifest", counted)
    reader = ManifestReader("use", (three,), CONTEXT)
    for _ in range(3):
        for pattern in ("sealed", "sealed/a", "sealed/*"):
            read(pattern, three, reader=reader)
    assert len(reads) == 1
    read("sealed", three)
    assert len(reads) == 2


def test_after_a_minute_it_is_read_again(three, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(manifest_reader.time, "monotonic", lambda: now[0])
    reader = ManifestReader("use", (three,), CONTEXT)
    read("sealed", three, reader=reader)
    Path("sealed", NAME).write_bytes(b"broken")
    now[0] = 59.0
    read("sealed", three, reader=reader)
    now[0] = 60.0
    with pytest.raises(FormatError):
        read("sealed", three, reader=reader)


@pytest.mark.parametrize("pattern", ["sealed", "sealed/d"])
def test_what_a_job_added_meanwhile_is_seen_at_once(three, pattern):
    """In a stream of paths, each new file is read by a reader that knows the manifest of before."""
    reader = ManifestReader("use", (three,), CONTEXT)
    read("sealed", three, reader=reader)
    seal(three, "sealed/d")
    with pytest.raises(ManifestError, match="sealed/d: not listed"):
        read(pattern, three, reader=reader)
    add("sealed", three, "d")
    assert read(pattern, three, reader=reader)["sealed/d"] == shard_id("sealed/d")


def test_a_manifest_that_came_meanwhile_is_seen_where_there_has_to_be_one(folder, local_key):
    seal(local_key, "sealed/a")
    reader = ManifestReader("require", (local_key,), CONTEXT)
    for _ in range(2):
        with pytest.raises(ManifestError, match=r"has no _MANIFEST\.json"):
            read("sealed", local_key, reader=reader)
    add("sealed", local_key, "a")
    assert len(read("sealed", local_key, reader=reader)) == 1


def test_the_readers_of_few_are_kept(three, monkeypatch):
    readers = [ManifestReader("use", (three,), CONTEXT) for _ in range(6)]
    assert len({reader.run for reader in readers}) == 6
    for reader in readers:
        read("sealed", three, reader=reader)
    assert list(manifest_reader._runs()._by_run) == [reader.run for reader in readers[2:]]


def test_threads_share_what_is_read(folder, fake_kms):
    key = AwsKms(fake_kms.create_key())
    dataset("sealed", key, *THREE)
    reader = ManifestReader("use", (key,), CONTEXT)
    clear_caches()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read("sealed", key, reader=reader), range(32)))
    assert all(one == found[0] for one in found)
    assert fake_kms.calls["Decrypt"] == 1


def test_modes_are_three():
    assert [checked_mode(mode) for mode in ("use", "require", "ignore")] == ["use", "require", "ignore"]
    with pytest.raises(ValueError, match="manifest is one of use, require, ignore, not 'yes'"):
        checked_mode("yes")


def test_a_manifest_of_many_shards_takes_little_time_and_space(folder, local_key):
    """Measured with 100 000 shards: 14.5 MB, 160 MiB of memory; 1.1 s of one core to add, 2.2 s to read."""
    shards = written(*(f"sealed/part-{number:05}-of-20000.csv" for number in range(20_000)))
    start = time.process_time()
    add_to_manifest("sealed/", shards, (local_key,), CONTEXT)
    found = ManifestReader("require", (local_key,), CONTEXT).check("sealed/part-*", [shard.path for shard in shards])
    assert time.process_time() - start < 10
    assert len(found) == len(shards)
    assert Path("sealed", NAME).stat().st_size < 160 * len(shards)
