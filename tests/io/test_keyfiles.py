"""Key files: found by name alone, and replaced whole or not at all."""

import os
import stat
import threading

import pytest
from apache_beam.io.filesystems import FileSystems

from beam_envelope.formats import output
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, key_file_name
from beam_envelope.io import keyfiles
from beam_envelope.io.keyfiles import KeyFileReplacedError, find_key_files, read_key_file, replace_key_file, settle
from tests.running import listing, read_files, write_files

SHARDS = ("a.csv", "b.csv", "sub/a.csv", "sub/deep/c.csv", "x[1].csv", "sub2/a.csv")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder `sealed` of key files; in the place of each shard there is a pipe, which nobody can read."""
    monkeypatch.chdir(tmp_path)
    for shard in SHARDS:
        path, _, name = f"sealed/{shard}".rpartition("/")
        write_files(path, {key_file_name(name): b"{}"})
        os.mkfifo(f"sealed/{shard}")
    write_files("sealed", {"_TMP_1": b"left over", "_MANIFEST.json": b"", "_KEY_FOR_x": b"", "a_KEY_FOR_b.json": b""})
    return tmp_path


def shards_of(pattern):
    """Return the shards to which the key files that a pattern finds belong."""
    found = find_key_files(pattern)
    assert found == sorted(found)
    return sorted(path.replace("_KEY_FOR_", "").removesuffix(".json") for path in found)


@pytest.mark.parametrize(
    ("pattern", "shards"),
    [
        ("sealed", SHARDS),
        ("sealed/", SHARDS),
        ("./sealed/sub", ("sub/a.csv", "sub/deep/c.csv")),
        ("sealed/**", SHARDS),
        ("sealed/*", ("a.csv", "b.csv", "x[1].csv")),
        ("sealed/a.csv", ("a.csv",)),
        ("sealed/_KEY_FOR_a.csv.json", ("a.csv",)),
        ("sealed/_KEY_FOR_*", ("a.csv", "b.csv", "x[1].csv")),
        ("sealed/a*", ("a.csv",)),
        ("sealed/?.csv", ("a.csv", "b.csv")),
        ("sealed/[b].csv", ("b.csv",)),
        ("sealed/*/a.csv", ("sub/a.csv", "sub2/a.csv")),
        ("sealed/**a.csv", ("a.csv", "sub/a.csv", "sub2/a.csv")),
        ("sealed/sub/**.csv", ("sub/a.csv", "sub/deep/c.csv")),
        ("sealed/x[1].csv", ("x[1].csv",)),
        ("sealed/x[[]1].csv", ("x[1].csv",)),
    ],
)
def test_a_pattern_of_shards_or_key_files_finds_key_files_without_looking_at_shards(folder, pattern, shards):
    prefix = "./sealed/" if pattern.startswith("./") else "sealed/"
    assert shards_of(pattern) == sorted(prefix + shard for shard in shards)


def test_a_pattern_without_a_folder(folder, monkeypatch):
    monkeypatch.chdir(folder / "sealed")
    assert shards_of("*") == ["a.csv", "b.csv", "x[1].csv"]
    assert shards_of("a.csv") == ["a.csv"]
    assert shards_of("sub/") == ["sub/a.csv", "sub/deep/c.csv"]


def test_key_files_are_found_also_where_their_shards_are_not_there(tmp_path):
    write_files(tmp_path, {"keys/_KEY_FOR_00ff.json": b"{}"})
    assert find_key_files(f"{tmp_path}/keys") == [f"{tmp_path}/keys/_KEY_FOR_00ff.json"]
    assert find_key_files(f"{tmp_path}/keys/00ff") == [f"{tmp_path}/keys/_KEY_FOR_00ff.json"]


@pytest.mark.parametrize("pattern", ["sealed/none*", "sealed/sub/a", "empty/", "sealed/**.txt"])
def test_a_pattern_that_finds_none_says_so(folder, pattern):
    os.mkdir("empty")
    if pattern == "sealed/sub/a":  # whether there is one turns out when it is read
        assert find_key_files(pattern) == ["sealed/sub/_KEY_FOR_a.json"]
        return
    with pytest.raises(FileNotFoundError, match="no key file is there; quote a pattern"):
        find_key_files(pattern)


def test_a_key_file_is_read_no_further_than_it_may_be_large(tmp_path):
    write_files(tmp_path, {"k": bytes(MAX_KEY_FILE_BYTES + 10)})
    assert len(read_key_file(f"{tmp_path}/k")) == MAX_KEY_FILE_BYTES + 1


# ------------------------------------------------------------------------------------------- on a local disk


@pytest.fixture
def path(tmp_path):
    """A key file."""
    write_files(tmp_path, {"_KEY_FOR_a.json": b"old"})
    return tmp_path / "_KEY_FOR_a.json"


def test_it_is_replaced_and_nothing_else_is_left(path):
    replace_key_file(str(path), b"old", b"new")
    assert read_files(path.parent) == {path.name: b"new"}
    settle([str(path)])


def test_one_that_somebody_else_replaced_is_left_alone(path):
    path.write_bytes(b"theirs")
    with pytest.raises(KeyFileReplacedError, match=r"_KEY_FOR_a.json was replaced by somebody else"):
        replace_key_file(str(path), b"old", b"new")
    assert read_files(path.parent) == {path.name: b"theirs"}


def test_one_that_went_away_does_not_come_back(path):
    path.unlink()
    with pytest.raises(FileNotFoundError):
        replace_key_file(str(path), b"old", b"new")
    assert listing(path.parent) == []


def test_the_last_look_is_under_the_lock_of_those_who_write_shards(path):
    done = threading.Event()

    def replace():
        with pytest.raises(KeyFileReplacedError):
            replace_key_file(str(path), b"old", b"new")
        done.set()

    thread = threading.Thread(target=replace)
    with output.alone_in(path.parent):
        thread.start()
        assert not done.wait(0.3)
        path.write_bytes(b"theirs")
    thread.join(10)
    assert (done.is_set(), path.read_bytes()) == (True, b"theirs")


def test_it_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: order.append("replace") or replace(*names))
    replace_key_file(str(path), b"old", b"new")
    assert order == ["fsync", "replace"]
    settle([str(path)])
    assert order == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_leaves_the_old_one_and_no_temporary_file(path, monkeypatch, step):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        replace_key_file(str(path), b"old", b"new")
    assert read_files(path.parent) == {path.name: b"old"}


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
def test_its_mode_stays(path, mode):
    path.chmod(mode)
    replace_key_file(str(path), b"old", b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_its_owner_stays(path):
    os.chown(path, 65_534, 65_533)
    replace_key_file(str(path), b"old", b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (65_534, 65_533)


def test_a_link_stays_a_link(path, tmp_path):
    (tmp_path / "other").mkdir()
    link = tmp_path / "other/_KEY_FOR_b.json"
    link.symlink_to("../_KEY_FOR_a.json")
    replace_key_file(str(link), b"old", b"new")
    assert (link.is_symlink(), path.read_bytes()) == (True, b"new")
    assert listing(tmp_path / "other") == ["_KEY_FOR_b.json"]


# ------------------------------------------------------------------------------- on other filesystems of Beam


@pytest.fixture
def beam_path(path):
    """The same key file, by a name that goes through Beam's filesystem."""
    return f"file://{path}"


@pytest.fixture(autouse=True)
def files_by_url(monkeypatch):
    """Let `file://` paths be those of a store that Beam alone knows."""
    from beam_envelope.io.store import BeamStore, LocalStore

    class UrlStore(BeamStore):
        def size(self, path):
            return LocalStore().size(path.removeprefix("file://"))

        def open(self, path):
            return LocalStore().open(path.removeprefix("file://"))

    for name in ("create", "delete", "rename"):
        method = getattr(FileSystems, name)
        monkeypatch.setattr(FileSystems, name, staticmethod(lambda *a, m=method: m(*map(_plain, a))))
    store_of = keyfiles.store_of
    monkeypatch.setattr(keyfiles, "store_of", lambda p: UrlStore() if p.startswith("file://") else store_of(p))
    monkeypatch.setattr(keyfiles, "BeamStore", UrlStore)
    monkeypatch.setattr(keyfiles, "read_small", lambda p, n: keyfiles.store_of(p).open(p).read(n))


def _plain(argument):
    if isinstance(argument, list):
        return [_plain(item) for item in argument]
    return argument.removeprefix("file://") if isinstance(argument, str) else argument


def test_another_filesystem_has_the_new_one_whole_before_the_old_one_goes(path, beam_path, monkeypatch):
    steps = []
    delete = FileSystems.delete
    monkeypatch.setattr(
        FileSystems, "delete", staticmethod(lambda paths: steps.append(read_files(path.parent)) or delete(paths))
    )
    replace_key_file(beam_path, b"old", b"new")
    assert read_files(path.parent) == {path.name: b"new"}
    assert sorted(steps[0].values()) == [b"new", b"old"]
    with pytest.raises(KeyFileReplacedError):
        replace_key_file(beam_path, b"old", b"newer")
    assert read_files(path.parent) == {path.name: b"new"}


def test_another_filesystem_that_loses_bytes_keeps_the_old_one(path, beam_path, monkeypatch):
    create = FileSystems.create

    def cut(*arguments):
        stream = create(*arguments)
        write = stream.write
        stream.write = lambda data: write(data[:-1])
        return stream

    monkeypatch.setattr(FileSystems, "create", staticmethod(cut))
    with pytest.raises(OSError, match="the key file has the wrong size after it was written"):
        replace_key_file(beam_path, b"old", b"new")
    assert path.read_bytes() == b"old"
