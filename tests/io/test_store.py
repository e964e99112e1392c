"""Stores: what a pattern finds, and how a file becomes visible on a local disk and on any other Beam filesystem."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import boto3
import pytest
from apache_beam.io.filesystem import BeamIOError, CompressionTypes, FileMetadata, FileSystem
from apache_beam.io.filesystems import FileSystems

from beam_envelope import EnvelopeError, TamperedError, open_shard
from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.io import store
from beam_envelope.io.s3 import S3Store
from beam_envelope.io.store import (
    BeamStore,
    LocalStore,
    expand,
    glob_matcher,
    quote_glob,
    same_place,
    split_glob,
    store_of,
)
from tests.running import decrypt, encrypt, fails, listing, read_files, with_manifest, write_files
from tests.running import run as run_transform


def found(pattern, below=""):
    """Return the paths that a pattern finds, relative to a folder."""
    return [metadata.path.removeprefix(f"{below}/") for metadata in expand(str(pattern))[1]]


@pytest.fixture
def tree(tmp_path):
    """A folder of files at three depths."""
    names = ("a.csv", "b.txt", "sub/a.csv", "sub/deep/a.csv", "sub2/c.csv")
    return write_files(tmp_path / "tree", {name: name.encode() for name in names})


# ------------------------------------------------------------------------------------------------ patterns


def test_a_star_stays_within_its_folder(tree):
    assert found(f"{tree}/*", tree) == ["a.csv", "b.txt"]
    assert found(f"{tree}/*/a.csv", tree) == ["sub/a.csv"]


def test_two_stars_reach_into_all_folders_below(tree):
    assert found(f"{tree}/**", tree) == ["a.csv", "b.txt", "sub/a.csv", "sub/deep/a.csv", "sub2/c.csv"]
    assert found(f"{tree}/**.csv", tree) == ["a.csv", "sub/a.csv", "sub/deep/a.csv", "sub2/c.csv"]


def test_question_marks_and_sets_match_one_character(tree):
    assert found(f"{tree}/sub?/*", tree) == ["sub2/c.csv"]
    assert found(f"{tree}/[ab].*", tree) == ["a.csv", "b.txt"]
    assert found(f"{tree}/[!a].*", tree) == ["b.txt"]


@pytest.mark.parametrize("ending", ["", "/", "//"])
def test_a_folder_stands_for_all_that_is_below_it(tree, ending):
    assert found(f"{tree}/sub{ending}", tree) == ["sub/a.csv", "sub/deep/a.csv"]


def test_sizes_come_with_the_paths(tree):
    pattern, files = expand(f"{tree}/a.csv")
    modified = (tree / "a.csv").stat().st_mtime
    assert (pattern, files) == (f"{tree}/a.csv", [FileMetadata(f"{tree}/a.csv", len(b"a.csv"), modified)])
    assert next(iter(expand(f"{tree}/*.csv")[1])) == files[0]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.csv", ["a.csv"]),
        ("./*.csv", ["./a.csv"]),
        ("**.csv", ["a.csv", "sub/a.csv", "sub/deep/a.csv", "sub2/c.csv"]),
        ("sub", ["sub/a.csv", "sub/deep/a.csv"]),
        (".", ["./a.csv", "./b.txt", "./sub/a.csv", "./sub/deep/a.csv", "./sub2/c.csv"]),
        ("sub/../b.txt", ["sub/../b.txt"]),
    ],
)
def test_relative_patterns_find_paths_that_begin_as_they_do(tree, monkeypatch, pattern, expected):
    monkeypatch.chdir(tree)
    assert found(pattern) == expected


def test_a_file_whose_name_is_a_glob_is_found_by_its_name(tmp_path):
    write_files(tmp_path, {"a[1].csv": b"", "a1.csv": b"", "a*.csv": b"", "a[[]1].csv": b""})
    assert found(tmp_path / "a[1].csv", tmp_path) == ["a[1].csv"]
    assert found(tmp_path / "a*.csv", tmp_path) == ["a*.csv"]
    assert found(tmp_path / "a[12].csv", tmp_path) == ["a1.csv"]


@pytest.mark.parametrize("name", ["d[1]", "d*", "d?", "[", "d]"])
@pytest.mark.filterwarnings("error")
def test_a_folder_whose_name_is_a_glob_is_found_by_its_name(tmp_path, name):
    write_files(tmp_path, {f"{name}/x.csv": b"", f"{name}/e/y.csv": b"", "d1/no.csv": b"", "dd/no.csv": b""})
    assert found(tmp_path / name, tmp_path) == [f"{name}/e/y.csv", f"{name}/x.csv"]
    assert split_glob(expand(f"{tmp_path}/{name}")[0]) == (f"{tmp_path}/{name}/", "**")


def test_a_set_of_one_character_quotes_it():
    assert quote_glob("d[1]/a*?.csv") == "d[[]1]/a[*][?].csv"
    assert split_glob("d[[]1]/a[*]-*.csv") == ("d[1]/", "a[*]-*.csv")
    assert split_glob("s3://bucket/raw/2026/*") == ("s3://bucket/raw/2026/", "*")
    assert split_glob("*.csv") == ("", "*.csv")
    assert split_glob("data/part-?/x") == ("data/", "part-?/x")


@pytest.mark.parametrize("pattern", ["nothing.csv", "*.parquet", "empty", "empty/", "sub/a.csv/x", "x" * 300])
def test_a_pattern_that_finds_nothing_is_an_error_that_says_how_to_write_patterns(tree, pattern):
    (tree / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        expand(f"{tree}/{pattern}")
    assert caught.value.filename == f"{tree}/{pattern}"
    assert caught.value.strerror == (
        "no file matches; quote a pattern so that the shell leaves it alone, and use ** to look into sub-folders"
    )


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/none/")):
        expand(f"{tmp_path}/none/*.csv")


def test_links_to_files_are_followed_and_links_to_folders_are_not(tree):
    (tree / "link.csv").symlink_to("sub/a.csv")
    (tree / "link").symlink_to("sub")
    assert found(f"{tree}/**.csv", tree) == ["a.csv", "link.csv", "sub/a.csv", "sub/deep/a.csv", "sub2/c.csv"]
    assert expand(f"{tree}/link.csv")[1][0].size_in_bytes == len(b"sub/a.csv")
    assert found(f"{tree}/link", tree) == ["link/a.csv", "link/deep/a.csv"]  # named by the user, it is followed


def test_a_broken_link_is_an_error_that_names_it(tree):
    (tree / "broken.csv").symlink_to("nowhere")
    with pytest.raises(OSError, match="the link points to nothing; mend it or leave it out") as caught:
        expand(f"{tree}/*")
    assert caught.value.filename == f"{tree}/broken.csv"
    assert found(f"{tree}/*.txt", tree) == ["b.txt"]  # it is only in the way where the pattern finds it


def test_a_pipe_is_an_error_that_names_it(tree):
    os.mkfifo(tree / "pipe.csv")
    for pattern in (f"{tree}/*", f"{tree}/pipe.csv"):
        with pytest.raises(OSError, match=re.escape("not a regular file (a pipe, socket or device); leave it out")):
            expand(pattern)


# -------------------------------------------------------------------------------------------- same places


def finds(pattern, path):
    """Whether a pattern finds a path, as plans ask."""
    return glob_matcher(pattern)(same_place(path))


def test_a_glob_finds_a_path_however_its_folder_is_written(tree, monkeypatch):
    monkeypatch.chdir(tree)
    (tree.parent / "alias").symlink_to("tree")
    for folder in ("", "./", "sub/../", f"{tree}/", "../tree/", "../alias/"):
        assert finds("*.csv", f"{folder}new.csv")
        assert finds(f"{folder}*.csv", "new.csv")
        assert finds("./**", f"{folder}sealed/new.csv")
        assert not finds(f"{folder}*.csv", "sealed/new.csv")
        assert not finds(f"{folder}sub/**", "a.csv")
    assert not finds(f"{tree}/**", f"{tree}2/a.csv")
    assert finds("s3://bucket/raw/*", "s3://bucket/raw/a")
    assert not finds("s3://bucket/raw/*", "s3://bucket/sealed/a")


def test_a_link_to_a_file_is_another_place_than_the_file(tree):
    (tree / "link.csv").symlink_to("a.csv")
    assert same_place(f"{tree}/link.csv") != same_place(f"{tree}/a.csv")


def test_paths_with_a_scheme_choose_their_store():
    assert isinstance(store.store_of("data/a.csv"), LocalStore)
    assert isinstance(store.store_of("s3://bucket/a.csv"), S3Store)
    assert isinstance(store.store_of("gs://bucket/a.csv"), BeamStore)


# ------------------------------------------------------------------------------- any other Beam filesystem

ROOT = None  # the folder behind test-disk://


def _inside(path):
    return str(Path(ROOT, path.removeprefix("test-disk://")))


class DiskFileSystem(FileSystem):
    """A Beam filesystem over a folder; it logs what it does, and its rename may fail."""

    log: ClassVar = []
    broken_rename_of = None

    @classmethod
    def scheme(cls):
        return "test-disk"

    def join(self, basepath, *paths):
        return "/".join([basepath.rstrip("/"), *paths])

    def split(self, path):
        return path.rpartition("/")[0], path.rpartition("/")[2]

    def mkdirs(self, path):
        Path(_inside(path)).mkdir(parents=True)

    def has_dirs(self):
        return False

    def _list(self, dir_or_prefix):
        for name in listing(ROOT):
            path = f"test-disk://{name}"
            if path.startswith(dir_or_prefix):
                yield self.metadata(path)

    def create(self, path, mime_type="application/octet-stream", compression_type=CompressionTypes.AUTO):
        assert compression_type == CompressionTypes.UNCOMPRESSED
        self.log.append(("create", path.rpartition("/")[2]))
        Path(_inside(path)).parent.mkdir(parents=True, exist_ok=True)
        return Path(_inside(path)).open("xb")

    def open(self, path, mime_type="application/octet-stream", compression_type=CompressionTypes.AUTO):
        assert compression_type == CompressionTypes.UNCOMPRESSED
        return Path(_inside(path)).open("rb")

    def copy(self, source_file_names, destination_file_names):
        raise NotImplementedError

    def rename(self, source_file_names, destination_file_names):
        for source, target in zip(source_file_names, destination_file_names, strict=True):
            name = target.rpartition("/")[2]
            self.log.append(("rename", name))
            if name == self.broken_rename_of:
                raise BeamIOError("Rename operation failed", {(source, target): OSError("the network is down")})
            Path(_inside(source)).rename(_inside(target))

    def exists(self, path):
        return Path(_inside(path)).exists()

    def size(self, path):
        return Path(_inside(path)).stat().st_size

    def last_updated(self, path):
        return Path(_inside(path)).stat().st_mtime

    def metadata(self, path):
        return FileMetadata(path, self.size(path), self.last_updated(path))

    def delete(self, paths):
        for path in paths:
            self.log.append(("delete", path.rpartition("/")[2]))
            Path(_inside(path)).unlink()


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """The folder behind test-disk://, empty."""
    folder = tmp_path / "disk"
    folder.mkdir()
    monkeypatch.setattr(sys.modules[__name__], "ROOT", str(folder))
    monkeypatch.setattr(DiskFileSystem, "log", [])
    monkeypatch.setattr(DiskFileSystem, "broken_rename_of", None)
    return folder


CONTENTS = {"a.csv": b"alpha\n" * 9, "sub/b.csv.gz": b"not really gzip" * 2000, "sub/empty": b""}


def test_files_go_to_another_filesystem_and_come_back(disk, tmp_path, local_key):
    data = write_files(tmp_path / "data", CONTENTS)
    encrypt(data, "test-disk://box/sealed", local_key)
    assert listing(disk / "box/sealed") == with_manifest(*CONTENTS)
    decrypt("test-disk://box/sealed/**", "test-disk://box/opened/", local_key)
    assert read_files(disk / "box/opened") == CONTENTS  # byte for byte: Beam would pack and unpack what ends in .gz


def test_a_shard_of_another_filesystem_is_one_of_the_local_disk(disk, tmp_path, local_key):
    encrypt(write_files(tmp_path / "data", CONTENTS), "test-disk://sealed", local_key)
    with open_shard(disk / "sealed/a.csv", key=local_key) as shard:
        assert shard.read() == CONTENTS["a.csv"]


def test_the_key_file_has_its_name_before_the_shard_has_its_own(disk, tmp_path, local_key):
    encrypt(write_files(tmp_path / "data", {"a.csv": b"a"}), "test-disk://sealed", local_key)
    renamed = [name for action, name in DiskFileSystem.log if action == "rename"]
    assert renamed == [key_file_name("a.csv"), "a.csv", "_MANIFEST.json"]
    assert {name[:5] for action, name in DiskFileSystem.log if action == "create"} == {"_TMP_"}


@pytest.mark.parametrize("broken", ["a.csv", key_file_name("a.csv")])
def test_a_failed_rename_is_an_error_and_leaves_nothing_that_opens(disk, tmp_path, local_key, monkeypatch, broken):
    data = write_files(tmp_path / "data", {"a.csv": b"a"})
    monkeypatch.setattr(DiskFileSystem, "broken_rename_of", broken)
    error = fails(store_transform(local_key), str(data))
    assert error == ("OSError", "[Errno 5] the network is down: 'test-disk://sealed/a.csv'")
    assert "a.csv" not in listing(disk / "sealed")
    assert not FileSystems.exists("test-disk://sealed/a.csv")

    monkeypatch.setattr(DiskFileSystem, "broken_rename_of", None)
    run_transform(store_transform(local_key, "skip"), str(data))
    decrypt("test-disk://sealed/a.csv", tmp_path / "opened", local_key)
    assert read_files(tmp_path / "opened") == {"a.csv": b"a"}


def store_transform(key, if_exists="error"):
    from beam_envelope import EncryptFiles

    return EncryptFiles("test-disk://sealed", key=key, if_exists=if_exists)


def test_abort_removes_the_temporary_file(disk):
    output = BeamStore().create("test-disk://sealed/a", overwrite=False, size_hint=3)
    output.begin(b"key file")
    output.write(b"abc")
    assert [name[:5] for name in listing(disk / "sealed")] == ["_TMP_"]
    output.abort()
    output.abort()
    assert listing(disk / "sealed") == []


def test_what_exists_is_refused_or_replaced_as_asked(disk):
    write_files(disk, {"a": b"old", key_file_name("a"): b"old key file"})
    with pytest.raises(FileExistsError, match="the output exists; choose to skip or overwrite it"):
        BeamStore().create("test-disk://a", overwrite=False, size_hint=3)
    output = BeamStore().create("test-disk://a", overwrite=True, size_hint=3)
    output.begin(b"new key file")
    output.write(b"new")
    output.commit()
    assert read_files(disk) == {"a": b"new", key_file_name("a"): b"new key file"}


def test_what_came_into_being_meanwhile_is_not_replaced(disk):
    output = BeamStore().create("test-disk://a", overwrite=False, size_hint=3)
    output.begin(b"key file")
    output.write(b"abc")
    write_files(disk, {"a": b"other"})
    with pytest.raises(FileExistsError):
        output.commit()
    output.abort()
    assert read_files(disk) == {"a": b"other"}


def test_a_key_file_that_another_writer_replaces_meanwhile_is_noticed(disk, monkeypatch):
    rename = FileSystems.rename

    def rename_and_interfere(sources, targets):
        rename(sources, targets)
        if targets == ["test-disk://a"]:
            write_files(disk, {key_file_name("a"): b"of another writer"})

    monkeypatch.setattr(FileSystems, "rename", rename_and_interfere)
    output = BeamStore().create("test-disk://a", overwrite=False, size_hint=3)
    output.begin(b"key file")
    output.write(b"abc")
    with pytest.raises(EnvelopeError, match="another writer replaced the key file of test-disk://a"):
        output.commit()


def test_a_broken_shard_leaves_no_output(disk, tmp_path, local_key):
    encrypt(write_files(tmp_path / "data", {"a.csv": b"a" * 99_999}), tmp_path / "sealed", local_key)
    shard = tmp_path / "sealed/a.csv"
    raw = bytearray(shard.read_bytes())
    raw[50_000] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(TamperedError):
        decrypt(shard, "test-disk://opened", local_key)
    assert listing(disk) == []


def test_a_filesystem_that_does_not_know_a_path_is_an_os_error(disk, monkeypatch):
    def down(*_arguments):
        raise BeamIOError("List operation failed", {"test-disk://": OSError("the network is down")})

    monkeypatch.setattr(DiskFileSystem, "_list", down)
    with pytest.raises(OSError, match=r"the network is down.*: 'test-disk://x/\*'"):
        expand("test-disk://x/*")


@pytest.mark.skipif(shutil.which("mount") is None or os.getuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_leaves_nothing_and_says_which_file(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"big.bin": os.urandom(2 << 20)})
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        with pytest.raises(
            RuntimeError, match=f"No space left on device: '{data}/big.bin' -> '{small}/sealed/big.bin'"
        ):
            encrypt(data, small / "sealed", local_key)
        assert listing(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_every_store_tells_when_a_file_was_written(disk, moto_server):
    boto3.client("s3").create_bucket(Bucket="bucket")
    boto3.client("s3").put_object(Bucket="bucket", Key="a.csv", Body=b"12345")
    (disk / "a.csv").write_bytes(b"12345")
    os.utime(disk / "a.csv", (1_700_000_000, 1_700_000_000))
    for place in (f"{disk}/", "test-disk://", "s3://bucket/"):
        file = store_of(place).find(f"{place}a.csv")
        assert (file.path, file.size_in_bytes) == (f"{place}a.csv", 5)
        written = time.time() if place.startswith("s3:") else 1_700_000_000
        assert file.last_updated_in_seconds == pytest.approx(written, abs=120)
        assert expand(f"{place}a.csv")[1] == expand(f"{place}*.csv")[1] == [file]
        assert store_of(place).find(f"{place}none") is None
