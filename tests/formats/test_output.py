"""Outputs: whole and durable after a commit, or not there at all."""

import errno
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from beam_envelope.errors import EnvelopeError
from beam_envelope.formats import output
from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.formats.output import LocalOutput, StreamOutput, check_key_file, write_atomically

_watching = []


def _audit(event, arguments):
    if _watching and event in {"os.rename", "os.link", "os.remove"}:
        paths = [os.fspath(path) for path in arguments if isinstance(path, (str, os.PathLike))]
        _watching[-1](event.removeprefix("os."), paths)


sys.addaudithook(_audit)  # there is no way to remove it; it does nothing when nobody watches


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """Call `see(what, paths)` before each rename, link, removal and flush of a file, at the level of the system."""

    def start(see):
        def guarded(what, paths):
            if what != "flush" and not paths[0].startswith(str(tmp_path)):
                return  # Python itself renames what it compiles
            _watching.remove(guarded)
            try:
                see(what, paths)
            finally:
                _watching.append(guarded)

        fsync = os.fsync

        def watched_fsync(handle):
            if _watching:
                _watching[-1]("flush", [handle])
            fsync(handle)

        monkeypatch.setattr(os, "fsync", watched_fsync)
        _watching.append(guarded)

    yield start
    _watching.clear()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def make(path, data=b"shard", key_file=b"key file", **settings):
    made = LocalOutput(path, **settings)
    try:
        made.begin(key_file)
        made.write(data)
        made.commit()
    except BaseException:
        made.abort()
        raise


# The order of a commit


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_each_step_of_a_commit_is_durable_before_the_next(tmp_path, watch, overwrite):
    path, key_path = tmp_path / "a", tmp_path / key_file_name("a")
    if overwrite:
        make(path, b"old shard", b"old key file")
    steps = []

    def see(what, paths):
        if what == "flush":
            status = os.fstat(paths[0])
            what_file = "folder" if status.st_ino == tmp_path.stat().st_ino else status.st_ino
            steps.append(f"flush {what_file}" + ("" if what_file == "folder" else f" of {status.st_size} bytes"))
        else:
            steps.append(" to ".join([f"{what} {Path(paths[0]).stat().st_ino}", *(Path(to).name for to in paths[1:])]))

    if overwrite:
        old = path.stat().st_ino
    watch(see)
    make(path, b"new shard", b"new key file", overwrite=overwrite)
    shard, key_file = path.stat().st_ino, key_path.stat().st_ino
    assert steps == [
        f"flush {shard} of 9 bytes",
        f"flush {key_file} of 12 bytes",
        *([f"remove {old}"] if overwrite else []),
        f"rename {key_file} to _KEY_FOR_a.json",
        "flush folder",
        *([f"rename {shard} to a"] if overwrite else [f"link {shard} to a", f"remove {shard}"]),
        "flush folder",
    ]
    assert (path.read_bytes(), key_path.read_bytes()) == (b"new shard", b"new key file")
    assert names(tmp_path) == ["_KEY_FOR_a.json", "a"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_at_no_step_does_a_shard_stand_without_its_key_file(tmp_path, watch, overwrite):
    path, key_path = tmp_path / "a", tmp_path / key_file_name("a")
    if overwrite:
        make(path, b"old", b"key of old")
    seen = []

    def see(*_):
        if path.exists():
            assert key_path.read_bytes() == b"key of " + path.read_bytes()
        seen.append(path.exists())

    watch(see)
    make(path, b"new", b"key of new", overwrite=overwrite)
    assert len(seen) == 7
    see()


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("step", range(7))
def test_a_commit_that_fails_at_any_step_leaves_a_whole_shard_or_none(tmp_path, watch, overwrite, step):
    path, key_path = tmp_path / "a", tmp_path / key_file_name("a")
    if overwrite:
        make(path, b"old", b"key of old")
    steps = iter(range(100))

    def see(*_):
        if next(steps) == step:
            raise OSError(errno.EIO, "broken")

    watch(see)
    with pytest.raises(OSError, match="broken"):
        make(path, b"new", b"key of new", overwrite=overwrite)
    if path.exists():
        assert key_path.read_bytes() == b"key of " + path.read_bytes()
    assert set(names(tmp_path)) <= {"_KEY_FOR_a.json", "a"}


def test_a_disk_that_is_full_when_the_key_file_comes_keeps_the_old_shard(tmp_path, monkeypatch):
    make(tmp_path / "a", b"old", b"key of old")

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(output, "write_durably", full)
    with pytest.raises(OSError, match="no space"):
        make(tmp_path / "a", b"new", b"key of new", overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert (tmp_path / key_file_name("a")).read_bytes() == b"key of old"


# Other writers


def test_an_existing_file_is_refused_at_once(tmp_path):
    make(tmp_path / "a", b"old")
    with pytest.raises(FileExistsError, match="the output exists; choose to skip or overwrite it"):
        LocalOutput(tmp_path / "a")
    assert names(tmp_path) == ["_KEY_FOR_a.json", "a"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    late = LocalOutput(tmp_path / "a")
    late.begin(b"key of late")
    make(tmp_path / "a", b"first", b"key of first")
    with pytest.raises(FileExistsError):
        late.commit()
    late.abort()
    assert (tmp_path / "a").read_bytes() == b"first"
    assert (tmp_path / key_file_name("a")).read_bytes() == b"key of first"
    assert names(tmp_path) == ["_KEY_FOR_a.json", "a"]


def test_a_file_that_appears_in_the_last_moment_is_not_replaced(tmp_path, monkeypatch):
    made = LocalOutput(tmp_path / "a")
    made.begin(b"key of late")
    monkeypatch.setattr(LocalOutput, "_refuse_existing", lambda _: None)  # both looked before either came
    (tmp_path / "a").write_bytes(b"first")
    with pytest.raises(FileExistsError):
        made.commit()
    made.abort()
    assert (tmp_path / "a").read_bytes() == b"first"


def test_of_two_writers_in_one_moment_one_makes_its_shard_and_the_other_is_told(tmp_path, watch):
    path = tmp_path / "a"
    results = {}

    def attempt(name):
        try:
            make(path, name.encode(), b"key of " + name.encode())
            results[name] = "made"
        except FileExistsError:
            results[name] = "refused"

    second = threading.Thread(target=attempt, args=("second",))

    def see(what, _):
        if what == "rename" and not second.ident:  # the first has looked, and is about to place its key file
            second.start()
            second.join(0.3)  # alone, the second would now make its shard, whose key file the first then replaces

    watch(see)
    attempt("first")
    second.join()
    assert results == {"first": "made", "second": "refused"}
    assert path.read_bytes() == b"first"
    assert (tmp_path / key_file_name("a")).read_bytes() == b"key of first"


def test_a_writer_on_another_machine_that_replaces_the_key_file_is_seen(tmp_path, monkeypatch):
    publish = output._publish

    def interfered(*arguments, **settings):
        publish(*arguments, **settings)
        (tmp_path / key_file_name("a")).write_bytes(b"theirs")

    monkeypatch.setattr(output, "_publish", interfered)
    with pytest.raises(EnvelopeError) as caught:
        make(tmp_path / "a")
    assert str(caught.value) == (
        f"another writer replaced the key file of {tmp_path / 'a'} while it was written, so the two do not belong "
        "together. Let one job at a time write to a folder, and run this one again with overwrite"
    )


def test_a_key_file_that_is_the_same_passes():
    assert check_key_file(b"same", b"same", "a") is None
    with pytest.raises(EnvelopeError):
        check_key_file(b"", b"same", "a")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_that_was_forked_during_a_commit_does_not_keep_the_folder_locked(tmp_path):
    import fcntl

    here, there = os.pipe()
    with output.alone_in(tmp_path):
        child = os.fork()
        if not child:
            os.close(there)
            os.read(here, 1)  # until the parent is done
            os._exit(0)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)
        os.close(there)
        os.close(here)
        os.waitpid(child, 0)


# Disks of all kinds


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV])
def test_a_disk_without_hard_links(tmp_path, monkeypatch, number):
    def no_link(*_):
        raise OSError(number, "no links")

    monkeypatch.setattr(os, "link", no_link)
    make(tmp_path / "a", b"data")
    assert (tmp_path / "a").read_bytes() == b"data"
    assert names(tmp_path) == ["_KEY_FOR_a.json", "a"]


def test_other_failures_to_link_are_told(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "link", broken)
    with pytest.raises(OSError, match="broken"):
        make(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("number", "works"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_disk_that_cannot_flush_folders(tmp_path, monkeypatch, number, works):
    fsync = os.fsync

    def only_files(handle):
        if os.fstat(handle).st_ino == tmp_path.stat().st_ino:
            raise OSError(number, "cannot")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    if works:
        make(tmp_path / "a")
    else:
        with pytest.raises(OSError, match="cannot"):
            make(tmp_path / "a")


def test_a_write_that_takes_a_part_is_finished(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:7]))
    data = bytes(range(256))
    made = LocalOutput(tmp_path / "a")
    made.begin(b"key file")
    made.write(data)
    monkeypatch.undo()
    made.commit()
    assert (tmp_path / "a").read_bytes() == data


# Names and folders


def test_folders_are_made(tmp_path):
    make(tmp_path / "deep" / "er" / "a", b"data")
    assert (tmp_path / "deep" / "er" / "a").read_bytes() == b"data"


def test_a_name_that_leaves_no_room_for_its_key_file_is_refused_before_any_work(tmp_path):
    fits = "a" * (255 - len(key_file_name("")))
    make(tmp_path / fits)
    with pytest.raises(OSError, match="the name is too long: with its key file's prefix it passes 255 bytes") as caught:
        LocalOutput(tmp_path / (fits + "a"))
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(OSError, match="passes 255 bytes"):
        LocalOutput(tmp_path / ("ü" * 125))  # bytes, not characters
    assert len(names(tmp_path)) == 2


def test_the_file_has_the_rights_that_the_user_asked_for(tmp_path):
    before = os.umask(0o027)
    try:
        make(tmp_path / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_before_the_commit_only_a_temporary_file_is_there_and_an_abort_removes_it(tmp_path):
    made = LocalOutput(tmp_path / "a")
    made.begin(b"key file")
    made.write(b"data")
    assert [name[:5] for name in names(tmp_path)] == ["_TMP_"]
    made.abort()
    made.abort()
    assert names(tmp_path) == []


def test_an_open_output_is_not_handed_on_to_other_programs(tmp_path):
    made = LocalOutput(tmp_path / "a")
    program = f"import os; os.write({made._handle}, b'x')"
    assert subprocess.run([sys.executable, "-c", program], check=False, close_fds=False, capture_output=True).returncode
    made.abort()


def test_a_plain_file_has_no_key_file(tmp_path):
    for data in (b"old", b"new"):
        made = LocalOutput(tmp_path / "a", overwrite=True)
        made.write(data)
        made.commit()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


# Streams


def test_a_stream_gets_its_key_file_first_and_stays_open():
    order = []

    class Stream(io.BytesIO):
        def write(self, data):
            order.append("write")
            return super().write(data)

        def flush(self):
            order.append("flush")

    stream = Stream()
    made = StreamOutput(stream, order.append)
    made.begin(b"key file")
    made.write(memoryview(b"data"))
    made.commit()
    assert order == [b"key file", "write", "flush"]
    made.abort()
    assert stream.getvalue() == b"data"
    assert made.name == "a stream"


def test_a_raw_stream_that_takes_a_part_gets_the_rest():
    taken = []

    class Raw(io.RawIOBase):
        def write(self, data):
            taken.append(bytes(data[:3]))
            return len(taken[-1])

    StreamOutput(Raw(), print).write(b"0123456789")
    assert taken == [b"012", b"345", b"678", b"9"]


def test_a_file_like_object_that_returns_nothing_takes_all():
    class Sink:
        name = "sink"
        data = b""

        def write(self, data):
            self.data += data

    sink = Sink()
    StreamOutput(sink, print).write(b"0123456789")
    assert sink.data == b"0123456789"


def test_a_pipe_that_does_not_wait_loses_nothing_in_silence():
    class Full(io.RawIOBase):
        def write(self, data):
            return None  # "no single byte could be readily written": io.RawIOBase.write

    with pytest.raises(BlockingIOError, match="the stream does not wait, and takes no more at the moment"):
        StreamOutput(Full(), print).write(b"data")


# Small files


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"

    def broken(_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="broken"):
        write_atomically(path, b"three")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["a"]


def test_a_small_file_is_flushed_before_it_is_renamed(tmp_path, watch):
    steps = []
    watch(lambda what, _: steps.append(what))
    write_atomically(tmp_path / "a", b"data")
    assert steps == ["flush", "rename", "flush"]
