"""Shards that nobody finished: exceptions, garbage collection, killed processes, full disks, other writers."""

import contextlib
import errno
import gc
import gzip
import io
import os
import pickle
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pytest

from beam_envelope.errors import (
    EnvelopeError,
    NotEncryptedError,
)
from beam_envelope.formats import output as output_module
from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.formats.shard import create_shard, open_shard
from tests.formats.sealed import (
    CHUNK,
    HEADER,
    SEALED,
    names,
    nothing_opens,
    rows,
)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, Interrupted])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda writer: writer,
        contextlib.closing,
        io.BufferedWriter,
        lambda writer: io.TextIOWrapper(writer, write_through=True),
        lambda writer: io.TextIOWrapper(io.BufferedWriter(writer)),
    ],
    ids=["shard", "closing", "buffered", "text", "text over buffered"],
)
def test_an_exception_in_the_block_leaves_nothing(path, key, wrap, error):
    writer = create_shard(path, key=key)
    with pytest.raises(error), wrap(writer) as stream:  # noqa: PT012  # writing, then failing
        stream.write("text" if isinstance(stream, io.TextIOBase) else b"data")
        raise error
    assert writer.closed
    nothing_opens(path, key)
    assert names(path.parent) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from 3.13 on, wrappers tell
@pytest.mark.parametrize("cycle", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda writer: writer,
        io.BufferedWriter,
        io.TextIOWrapper,
        lambda writer: io.TextIOWrapper(io.BufferedWriter(writer)),
        lambda writer: gzip.GzipFile(fileobj=writer, mode="wb"),
        pa.PythonFile,
    ],
    ids=["shard", "buffered", "text", "text over buffered", "gzip", "arrow"],
)
def test_garbage_collection_does_not_finish_a_shard(path, key, wrap, cycle):
    stream = wrap(create_shard(path, key=key))
    stream.write("text" if isinstance(stream, io.TextIOBase) else b"data")
    if cycle and not isinstance(stream, pa.NativeFile):
        stream.me = [stream]
    del stream
    gc.collect()
    nothing_opens(path, key)
    assert names(path.parent) == []


def test_an_abort_leaves_nothing_and_may_come_again(path, key):
    stream = create_shard(path, key=key)
    stream.write(b"data")
    stream.abort()
    stream.abort()
    stream.close()
    nothing_opens(path, key)
    with pytest.raises(ValueError, match="is closed"):
        stream.write(b"x")


def test_a_close_while_an_exception_is_handled_drops_the_shard_and_says_so(path, key, caplog):
    stream = create_shard(path, key=key)
    stream.write(b"data")
    try:
        {}["missing"]
    except KeyError:
        stream.close()
    assert caplog.messages == [f"{path} is closed while KeyError is handled: it is dropped"]
    nothing_opens(path, key)


def test_a_shard_may_be_written_where_an_exception_is_handled(path, key):
    try:
        {}["missing"]
    except KeyError:
        with create_shard(path, key=key) as stream:
            stream.write(b"data")
    assert open_shard(path, key=key).read() == b"data"


def test_an_exception_that_is_raised_again_in_the_block_leaves_nothing(path, key):
    with pytest.raises(KeyError):  # noqa: PT012  # that is how it is raised again
        try:
            {}["missing"]
        except KeyError:
            with create_shard(path, key=key) as stream:
                stream.write(b"data")
                raise
    nothing_opens(path, key)


def test_an_exception_that_was_dealt_with_is_forgotten(path, key):
    with create_shard(path, key=key) as stream:
        with contextlib.suppress(KeyError):
            raise KeyError
        stream.write(b"data")
    assert open_shard(path, key=key).read() == b"data"


def test_a_text_wrapper_that_is_closed_finishes_the_shard(path, key):
    with io.TextIOWrapper(io.BufferedWriter(create_shard(path, key=key))) as stream:
        stream.write("text")
    assert open_shard(path, key=key).read() == b"text"


PROGRAM = """
import os, sys, signal
from beam_envelope.formats.shard import create_shard, open_shard
path, key, what = sys.argv[1:]
stream = create_shard(path, key="local-kms://" + key)
stream.write(b"some rows " * 100_000)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "exit":
    sys.exit()
if what == "hard exit":
    os._exit(0)
if what == "fork":
    child = os.fork()
    if not child:
        for call in (lambda: stream.write(bytes(5000)), stream.close):
            try:
                call()
            except ValueError as error:
                print(str(error).removeprefix(path))
            else:
                print("no error")
        sys.exit()  # the whole way, with all finalizers
    os.waitpid(child, 0)
    stream.write(b"the end")
    stream.close()
"""


def run_writer(path, key, what):
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM, path, key.path, what]
    return subprocess.run(program, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("what", "code", "left"), [("kill", -signal.SIGKILL, 1), ("exit", 0, 0), ("hard exit", 0, 1)])
def test_a_writer_that_ends_without_closing_leaves_nothing_that_opens(path, key, what, code, left):
    done = run_writer(path, key, what)
    assert (done.returncode, done.stderr) == (code, "")
    nothing_opens(path, key)
    (*temporary,) = names(path.parent)
    assert len(temporary) == left
    for name in temporary:
        with pytest.raises(NotEncryptedError, match="is a key file or an unfinished file, not a shard"):
            open_shard(path.parent / name, key=key)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_cannot_go_on_with_a_writer_and_does_not_harm_the_parents(path, key):
    done = run_writer(path, key, "fork")
    said = " was opened before a fork; only the process that opened it may go on writing\n"
    assert (done.stdout, done.stderr, done.returncode) == (said * 2, "", 0)
    assert open_shard(path, key=key).read() == b"some rows " * 100_000 + b"the end"


def test_open_shards_do_not_travel(path, key):
    with create_shard(path, key=key) as stream, pytest.raises(TypeError, match="cannot be pickled or copied"):
        pickle.dumps(stream)
    with open_shard(path, key=key) as stream, pytest.raises(TypeError):
        pickle.dumps(stream)


# Disks and other writers


def test_an_existing_shard_is_kept_unless_the_caller_says_overwrite(path, key):
    for data, settings_ in ((b"first", {}), (b"second", {"overwrite": True})):
        with create_shard(path, key=key, **settings_) as stream:
            stream.write(data)
        with pytest.raises(FileExistsError, match="the output exists; choose to skip or overwrite it"):
            create_shard(path, key=key)
        assert open_shard(path, key=key).read() == data
    assert names(path.parent) == sorted([path.name, key_file_name(path.name)])


def test_an_overwrite_that_fails_keeps_the_old_shard(path, key):
    with create_shard(path, key=key) as stream:
        stream.write(b"old")
    with pytest.raises(KeyError), create_shard(path, key=key, overwrite=True) as stream:  # noqa: PT012  # writing, then failing
        stream.write(b"new")
        raise KeyError
    assert open_shard(path, key=key).read() == b"old"


def fill_after(monkeypatch, size):
    """Let the disk take `size` more bytes."""
    left, write = [size], os.write

    def full(handle, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(handle, data[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr("beam_envelope.formats.output.os.write", full)


@pytest.mark.parametrize("size", [0, 10, HEADER + SEALED, 100_000])
def test_a_full_disk_leaves_nothing(path, key, monkeypatch, size):
    fill_after(monkeypatch, size)
    with pytest.raises(OSError, match="No space left"), create_shard(path, key=key) as stream:
        stream.write(rows(200_000))
    nothing_opens(path, key)
    assert names(path.parent) == []


@pytest.mark.parametrize("wrap", [lambda writer: writer, io.BufferedWriter], ids=["shard", "buffered"])
def test_after_a_write_that_failed_no_shard_is_made_even_if_there_is_room_again(path, key, monkeypatch, wrap):
    stream = wrap(create_shard(path, key=key))
    stream.write(rows(20_000))
    fill_after(monkeypatch, 10)
    with pytest.raises(OSError, match="No space left"):
        stream.write(rows(400_000))
    monkeypatch.undo()
    said = f"an earlier write to {path} failed, so it is dropped. Write it again from the start"
    for call in (lambda: stream.write(rows(20_000)), stream.close):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
            call()
        assert str(caught.value) == said
    nothing_opens(path, key)
    assert names(path.parent) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("buffering", [0, 1 << 20])
def test_a_device_that_is_full_is_told(key, buffering):
    key_file = io.BytesIO()
    full = open("/dev/full", "wb", buffering=buffering)  # noqa: SIM115  # its own close fails, too
    with pytest.raises(OSError, match="No space left"), create_shard(full, key=key, key_file=key_file) as stream:
        stream.write(rows(CHUNK * 2))
    with contextlib.suppress(OSError):
        full.close()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB; only root can have one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]
    try:
        made = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("cannot mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_real_full_disk_keeps_the_old_shard_and_leaves_no_stray_file(small_disk, key):
    path = small_disk / "part-0"
    with create_shard(path, key=key) as stream:
        stream.write(rows(50_000))
    for size in (1_000_000, 185_000):  # no room for the shard; room for it, but not for its key file
        with pytest.raises(OSError, match="No space left"), create_shard(path, key=key, overwrite=True) as stream:  # noqa: PT012  # writing, then failing
            stream.write(rows(size))
            if size < 256_000:
                (small_disk / "filler").write_bytes(bytes(1))
                with contextlib.suppress(OSError), (small_disk / "filler").open("ab", buffering=0) as filler:
                    while filler.write(bytes(4096)):
                        pass
        assert open_shard(path, key=key).read() == rows(50_000)
        assert set(names(small_disk)) <= {"part-0", "_KEY_FOR_part-0.json", "filler"}


def test_another_writer_that_replaces_the_key_file_meanwhile_is_seen(path, key, monkeypatch):
    publish = output_module._publish

    def interfered(*arguments, **settings_):
        publish(*arguments, **settings_)
        (path.parent / key_file_name(path.name)).write_bytes(b"of another machine")

    monkeypatch.setattr(output_module, "_publish", interfered)
    with pytest.raises(EnvelopeError, match=f"another writer replaced the key file of {path} while it was written"):
        create_shard(path, key=key).close()
