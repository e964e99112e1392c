"""Shards: what is written comes back, to whoever may read it, through any software."""

import csv
import gc
import gzip
import io
import os
import random
import subprocess
import sys
import zipfile
from dataclasses import replace

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor

from beam_envelope.errors import (
    AlreadyEncryptedError,
    ContextMismatchError,
    EnvelopeError,
    FormatError,
    KeyAccessError,
    KeyFileMissingError,
    NotEncryptedError,
    TamperedError,
    TruncatedError,
    WrongKeyError,
)
from beam_envelope.formats.keyfile import KeyFile, WrappedDataKey, key_file_name
from beam_envelope.formats.shard import create_shard, missing_key_file, open_sealed, open_shard, refuse_encrypted
from beam_envelope.formats.shard_layout import plaintext_size, shard_size
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.context import ANY_CONTEXT
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.testing import find_plaintext
from tests.formats.sealed import (
    CHUNK,
    COMPRESSIONS,
    CONTEXT,
    HEADER,
    READS,
    Sealed,
    names,
    rows,
)

# Round trips


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 16 * CHUNK, 16 * CHUNK + 1, 5 << 20])
def test_any_size_comes_back(path, key, size, compression):
    data = rows(size)
    with create_shard(path, key=key, context=CONTEXT, compression=compression) as stream:
        assert stream.write(data) == size
        assert stream.tell() == stream.plaintext_bytes == size
    assert stream.ciphertext_bytes == path.stat().st_size
    if compression == "none":
        assert path.stat().st_size == shard_size(size)
        assert plaintext_size(path.stat().st_size) == size
    elif size > CHUNK:
        assert path.stat().st_size < size
    for read in READS:
        out = bytearray()
        with open_shard(path, key=key, context=CONTEXT) as stream:
            read(stream, out)
        assert out == data
    assert names(path.parent) == sorted([path.name, key_file_name(path.name)])


@pytest.mark.parametrize("piece", [1, 7, 4096, CHUNK, 3 * CHUNK + 1, 17 * CHUNK])
def test_how_it_was_cut_into_writes_makes_no_difference(path, key, piece):
    data = rows(40 * piece if piece < CHUNK else 300_000)
    with create_shard(path, key=key) as stream:
        for start in range(0, len(data), piece):
            stream.write(data[start : start + piece])
    assert path.stat().st_size == shard_size(len(data))
    with open_shard(path, key=key) as stream:
        assert stream.read() == data


def test_any_buffer_can_be_written(path, key):
    with create_shard(path, key=key) as stream:
        assert stream.write(b"") == 0
        assert stream.write(bytearray(b"ab")) == 2
        assert stream.write(memoryview(b"xcdx")[1:3]) == 2
        assert stream.write(memoryview(b"\1\0\2\0").cast("H")) == 4
        with pytest.raises(TypeError):
            stream.write("text")
        with pytest.raises(TypeError):
            stream.write(memoryview(b"abcd")[::2])
        stream.writelines([b"e", b"f"])
    with open_shard(path, key=key) as stream:
        assert stream.read() == b"abcd\1\0\2\0ef"


def test_nothing_of_the_plaintext_is_on_the_disk(path, key):
    canary = b"CANARY-c8d1b7 4111 1111 1111 1111"
    with create_shard(path, key=key, context=CONTEXT) as stream:
        stream.write(canary * 1000)
        assert find_plaintext(path.parent, canary) == []  # nor meanwhile
    assert find_plaintext(path.parent, canary) == []


def test_two_shards_of_the_same_bytes_have_nothing_in_common(key):
    one, other = Sealed(rows(100), key), Sealed(rows(100), key)
    assert one.shard[:24] != other.shard[:24]
    assert one.shard[HEADER : HEADER + 16] != other.shard[HEADER : HEADER + 16]


def test_the_key_file_says_what_was_written(path, key):
    with create_shard(path, key=key, context={"b": "2", "a": "1"}, compression="zstd") as stream:
        stream.write(b"data")
    key_file = KeyFile.from_bytes((path.parent / key_file_name(path.name)).read_bytes(), "k")
    assert key_file == stream.key_file
    assert (key_file.context, key_file.compression, key_file.name) == ({"a": "1", "b": "2"}, "zstd", "part-0.csv")


# Other software


@pytest.mark.parametrize("size", [0, 1, CHUNK, 3 * CHUNK + 7])
def test_cobblestone_of_pyca_reads_our_shards(key, size):
    sealed = Sealed(rows(size), key)
    decryptor = Cobblestone256Decryptor(sealed.data_key(), KeyFile.from_bytes(sealed.key_file, "k").binding())
    assert decryptor.update(sealed.shard) + decryptor.finalize() == sealed.plaintext


@pytest.mark.parametrize("size", [0, 1, CHUNK, 3 * CHUNK + 7])
def test_we_read_what_cobblestone_of_pyca_wrote(key, size):
    with key.generate_data_key(CONTEXT) as data_key:
        key_file = KeyFile(data_keys=(WrappedDataKey.of(data_key),), context=CONTEXT)
        encryptor = Cobblestone256Encryptor(data_key.material, key_file.binding())
        shard = encryptor.update(rows(size)) + encryptor.finalize()
    with open_sealed(io.BytesIO(shard), key_file.to_bytes(), [key], CONTEXT, "theirs") as stream:
        assert stream.read() == rows(size)


TABLE = pa.table({"id": range(3000), "name": [f"name {number}" for number in range(3000)]})


def write_csv(stream):
    pyarrow.csv.write_csv(TABLE, stream)


def write_json(stream):
    stream.write(pd.DataFrame(TABLE.to_pydict()).to_json(orient="records", lines=True).encode())


def write_parquet(stream):
    pq.write_table(TABLE, stream, row_group_size=500)


def write_zip(stream):
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", rows(40_000))
        archive.writestr("b.txt", rows(100))


def write_gzip(stream):
    with gzip.GzipFile(fileobj=stream, mode="wb") as inner:
        inner.write(rows(100_000))


def write_text(stream):
    with io.TextIOWrapper(stream, "utf-8", newline="") as text:
        csv.writer(text).writerows([[number, f"zeile ü {number}"] for number in range(3000)])


def read_with_pyarrow_csv(stream):
    assert pyarrow.csv.read_csv(stream).equals(TABLE)


def read_with_pyarrow_json(stream):
    assert pyarrow.json.read_json(stream).equals(TABLE)


def read_with_pyarrow_parquet(stream):
    file = pq.ParquetFile(stream)
    assert file.read_row_group(4).equals(TABLE.slice(2000, 500))
    assert file.read().equals(TABLE)


def read_with_pandas_csv(stream):
    assert pd.read_csv(stream).equals(pd.DataFrame(TABLE.to_pydict()))


def read_with_pandas_parquet(stream):
    assert pd.read_parquet(stream).equals(pd.DataFrame(TABLE.to_pydict()))


def read_with_zipfile(stream):
    with zipfile.ZipFile(stream) as archive:
        assert archive.testzip() is None
        assert archive.read("b.txt") == rows(100)


def read_with_gzip(stream):
    with gzip.open(stream) as inner:
        inner.seek(50_000)
        assert inner.read() == rows(100_000)[50_000:]


def read_with_csv(stream):
    text = io.TextIOWrapper(stream, "utf-8", newline="")
    assert list(csv.reader(text)) == [[str(number), f"zeile ü {number}"] for number in range(3000)]


def read_lines(stream):
    assert sum(1 for _ in stream) == 3000


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    ("write", "read"),
    [
        (write_csv, read_with_pyarrow_csv),
        (write_csv, read_with_pandas_csv),
        (write_json, read_with_pyarrow_json),
        (write_parquet, read_with_pyarrow_parquet),
        (write_parquet, read_with_pandas_parquet),
        (write_zip, read_with_zipfile),
        (write_gzip, read_with_gzip),
        (write_text, read_with_csv),
        (write_text, read_lines),
    ],
)
def test_other_libraries_take_it_for_a_file(path, key, write, read, compression):
    with create_shard(path, key=key, compression=compression) as stream:
        write(stream)
    with open_shard(path, key=key) as stream:
        read(stream)


def test_a_reader_says_what_it_is(three_chunks):
    with three_chunks.open() as stream:
        assert (stream.readable(), stream.seekable(), stream.writable(), stream.closed) == (True, True, False, False)
        assert (stream.name, stream.mode) == ("the shard", "rb")
        with pytest.raises(io.UnsupportedOperation):
            stream.write(b"x")
    assert stream.closed


def test_a_writer_says_what_it_is(path, key):
    with create_shard(path, key=key) as stream:
        assert (stream.readable(), stream.seekable(), stream.writable(), stream.closed) == (False, False, True, False)
        assert (stream.name, stream.mode) == (str(path), "wb")
        with pytest.raises(io.UnsupportedOperation):
            stream.read()
    assert stream.closed
    stream.close()  # again does no harm
    with pytest.raises(ValueError, match=r"part-0\.csv is closed$"):
        stream.write(b"x")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_closing_a_reader_closes_its_file(path, key, compression):
    create_shard(path, key=key, compression=compression).close()
    stream = open_shard(path, key=key)
    file = (stream if compression == "none" else stream.raw._shard).raw._stream
    assert (file.name, file.closed) == (str(path), False)
    stream.close()
    assert file.closed


# Contexts and keys


def test_the_context_must_be_the_one_that_was_written(path, key):
    create_shard(path, key=key, context=CONTEXT).close()
    for context in (None, {}, {"dataset": "other"}, {**CONTEXT, "more": "x"}):
        with pytest.raises(ContextMismatchError, match=f"^{path} was written with another encryption context"):
            open_shard(path, key=key, context=context)
    open_shard(path, key=key, context=ANY_CONTEXT).close()
    open_shard(path, key=str(key), context=CONTEXT).close()


def test_no_kms_is_asked_for_another_context(path, fake_kms):
    fake_kms.create_key("etl")
    create_shard(path, key="aws-kms://alias/etl", context=CONTEXT).close()
    with pytest.raises(ContextMismatchError):
        open_shard(path, key="aws-kms://alias/etl", context={})
    assert fake_kms.calls == {"GenerateDataKey": 1}


def test_one_kms_call_writes_a_shard_and_one_reads_it_however_often(path, fake_kms):
    fake_kms.create_key("etl")
    with create_shard(path, key="aws-kms://alias/etl", context=CONTEXT) as stream:
        stream.write(rows(5 * CHUNK))
    for _ in range(3):
        with open_shard(path, key="aws-kms://alias/etl", context=CONTEXT) as stream:
            assert stream.read() == rows(5 * CHUNK)
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 1}


def test_any_of_the_keys_that_it_was_written_under_opens_it(path, key, fake_kms, tmp_path):
    fake_kms.create_key("etl")
    lost = LocalKms(tmp_path / "keyring" / "lost.json")
    generate_local_key(lost)
    keys = [lost, key, "aws-kms://alias/etl"]
    with create_shard(path, key=keys, context=CONTEXT) as stream:
        stream.write(b"data")
    assert fake_kms.calls == {"Encrypt": 1}
    os.unlink(lost.path)
    for allowed in ([key], ["aws-kms://alias/etl"], keys):
        clear_caches()
        with open_shard(path, key=allowed, context=CONTEXT) as stream:
            assert stream.read() == b"data"
    with pytest.raises(KeyAccessError, match=f"^{path} cannot be opened: there is no keyring"):
        open_shard(path, key=lost, context=CONTEXT)


def test_another_key_does_not_open_it(path, key, tmp_path):
    create_shard(path, key=key).close()
    other = LocalKms(tmp_path / "keyring" / "other.json")
    generate_local_key(other)
    with pytest.raises(
        WrongKeyError, match=rf"^{path} is encrypted under default/\w+; the keys allowed here are {other}\."
    ):
        open_shard(path, key=other)


def test_after_a_rotation_the_shard_opens_under_the_new_key_only(path, key, tmp_path):
    with create_shard(path, key=key, context=CONTEXT) as stream:
        stream.write(b"data")
    new = LocalKms(key.path, "new-for-rotation")
    generate_local_key(new)
    key_path = path.parent / key_file_name(path.name)
    old = KeyFile.from_bytes(key_path.read_bytes(), "k")
    form = key.rewrap(old.data_keys[0].wrapped_keys[0], CONTEXT, new)
    key_path.write_bytes(old.with_wrapped_keys([replace(old.data_keys[0], wrapped_keys=(form,))]).to_bytes())
    with open_shard(path, key=new, context=CONTEXT) as stream:
        assert stream.read() == b"data"
    with pytest.raises(WrongKeyError):
        open_shard(path, key=key, context=CONTEXT)


def test_a_key_that_may_not_be_used_leaves_no_file(path, fake_kms):
    fake_kms.create_key("etl")
    fake_kms.deny("GenerateDataKey")
    with pytest.raises(KeyAccessError):
        create_shard(path, key="aws-kms://alias/etl")
    assert names(path.parent) == []


# Streams, and arguments that are wrong


def test_streams_stay_open(key):
    shard, key_file = io.BytesIO(), io.BytesIO()
    with create_shard(shard, key=key, key_file=key_file) as stream:
        assert key_file.getvalue()  # before the first byte of the shard
        assert not shard.getvalue()
        stream.write(b"data")
    assert not shard.closed
    with open_shard(shard, key=key, key_file=key_file.getvalue()) as stream:
        assert stream.read() == b"data"
    assert not shard.closed


def test_a_stream_that_was_not_finished_does_not_open(key):
    shard, key_file = io.BytesIO(), io.BytesIO()
    with pytest.raises(KeyError), create_shard(shard, key=key, key_file=key_file) as stream:  # noqa: PT012  # writing, then failing
        stream.write(rows(40 * CHUNK))
        raise KeyError
    assert shard.getvalue()
    with pytest.raises((TruncatedError, TamperedError)):
        open_shard(shard, key=key, key_file=key_file.getvalue()).read()


def test_a_key_file_may_be_a_path_bytes_or_a_stream(tmp_path, key):
    shard, key_path = io.BytesIO(), tmp_path / "any name"
    with create_shard(shard, key=key, key_file=key_path) as stream:
        stream.write(b"data")
    raw = key_path.read_bytes()
    for source in (key_path, str(key_path), raw, io.BytesIO(raw)):
        assert open_shard(shard, key=key, key_file=source).read() == b"data"
    (tmp_path / "shard").write_bytes(shard.getvalue())
    assert open_shard(tmp_path / "shard", key=key, key_file=key_path).read() == b"data"
    assert names(tmp_path) == ["any name", "shard"]


def test_a_stream_needs_a_key_file(key):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        create_shard(io.BytesIO(), key=key)
    assert str(caught.value) == (
        "a stream has no name beside which a key file could be written; pass key_file= (a path or a stream)"
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        open_shard(io.BytesIO(), key=key)
    assert str(caught.value) == (
        "a stream has no name beside which a key file could be; pass key_file= (a path, bytes or a stream)"
    )


@pytest.mark.parametrize("uri", ["s3://bucket/a", "gs://bucket/a", "file:///folder/a"])
def test_remote_paths_are_for_beam(key, uri):
    for function in (create_shard, open_shard):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
            function(uri, key=key)
        assert str(caught.value) == (
            f"{function.__name__} takes local paths and open streams, not {uri!r}. Use EncryptFiles or DecryptFiles, "
            "or open a stream yourself and pass key_file= as well"
        )


def test_wrong_arguments_are_refused_and_leave_no_file(path, key):
    with pytest.raises(ValueError, match="compression is one of none, zstd, not 'gzip'"):
        create_shard(path, key=key, compression="gzip")
    with pytest.raises(
        ValueError, match="key_file goes with a stream; the key file of a path has a fixed name beside it"
    ):
        create_shard(path, key=key, key_file=path.parent / "k")
    with pytest.raises(ValueError, match="empty key or value"):
        create_shard(path, key=key, context={"a": ""})
    with pytest.raises(FormatError, match="does not start with a scheme"):
        create_shard(path, key="alias/etl")
    with pytest.raises(ValueError, match="no key was given"):
        create_shard(path, key=[])
    assert names(path.parent) == []


# Files that are no shards


def test_a_plain_file_is_told_from_a_shard_that_lost_its_key_file(path, key):
    with create_shard(path, key=key) as stream:
        stream.write(rows(1000))
    os.unlink(path.parent / key_file_name(path.name))
    with pytest.raises(KeyFileMissingError) as caught:
        open_shard(path, key=key)
    assert str(caught.value) == (
        f"there is no key file {key_file_name(path.name)} beside {path}; without it nobody can open the shard. "
        "Restore it from a copy"
    )
    path.write_bytes(rows(1000))
    with pytest.raises(NotEncryptedError) as caught:
        open_shard(path, key=key)
    assert str(caught.value) == (
        f"{path} is plain data: it has no key file ({key_file_name(path.name)}) and does not look like a shard"
    )


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"short",
        b"a,b\r\n1,2\t\r\n" * 7,
        "Größe,Zahl äöü\n".encode() * 4,
        "名前,金額\n".encode() * 4,
        "\ufeffΔelta,Ωmega\n".encode() * 4,
        b"PAR1\xff" + bytes(60),
        b"\x1f\x8b" + bytes(60),
    ],
    ids=range(8),
)
def test_text_and_well_known_formats_are_plain(head):
    assert isinstance(missing_key_file("dir/a", head[:HEADER]), NotEncryptedError)


def test_the_head_of_a_shard_is_not_plain():
    chance = random.Random(1)
    for _ in range(1000):
        assert isinstance(missing_key_file("dir/a", chance.randbytes(HEADER)), KeyFileMissingError)


def test_missing_files_and_folders_are_told_as_ever(tmp_path, key):
    with pytest.raises(FileNotFoundError):
        open_shard(tmp_path / "none", key=key)
    with pytest.raises(IsADirectoryError):
        open_shard(tmp_path, key=key)


def test_our_own_files_are_not_encrypted_again():
    refuse_encrypted("dir/a.csv", has_key_file=False)
    with pytest.raises(AlreadyEncryptedError) as caught:
        refuse_encrypted("dir/a.csv", has_key_file=True)
    assert str(caught.value) == (
        "dir/a.csv is encrypted already (a key file lies beside it). Leave it out of the input pattern, or decrypt it "
        "first"
    )
    for name in ("dir/_KEY_FOR_a.csv.json", "dir/_TMP_1234", "_MANIFEST.json"):
        with pytest.raises(AlreadyEncryptedError, match="is one of our own helper files"):
            refuse_encrypted(name, has_key_file=False)


def test_a_failed_open_closes_the_file(path, key):
    create_shard(path, key=key).close()
    for break_it in (
        lambda: os.truncate(path, 60),
        lambda: (path.parent / key_file_name(path.name)).write_bytes(b"{}"),
    ):
        break_it()
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        with pytest.raises(EnvelopeError):
            open_shard(path, key=key)
        gc.collect()
        assert not before or len(os.listdir("/proc/self/fd")) == before


# Memory


MEMORY = """
import resource, sys
from beam_envelope.formats.shard import create_shard, open_shard
path, key, compression = sys.argv[1:]
block, buffer = bytes(range(256)) * 4096, bytearray(1 << 20)
for megabytes in (16, 256):
    with create_shard(path, key="local-kms://" + key, overwrite=True, compression=compression) as stream:
        for _ in range(megabytes):
            stream.write(block)
    total = 0
    with open_shard(path, key="local-kms://" + key) as stream:
        while count := stream.readinto(buffer):
            total += count
    assert total == megabytes << 20
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_memory_does_not_grow_with_the_file(path, key, compression):
    program = [sys.executable, "-c", MEMORY, path, key.path, compression]
    small, large = map(int, subprocess.run(program, capture_output=True, text=True, check=True).stdout.split())
    assert large - small < 16 * 1024  # KiB


def test_an_authentic_shard_that_is_no_zstd_after_all_is_a_named_error(path, key):
    """Only a faulty writer can make one, since the bytes are authentic; it is not for a reader to meet a ZstdError."""
    with create_shard(path, key=key, compression="zstd") as stream:
        stream._compressor = type("Faulty", (), {"compress": bytes, "flush": lambda self: b""})()
        stream.write(b"no frame of zstd")
    with open_shard(path, key=key) as stream, pytest.raises(FormatError, match="holds something else"):
        stream.read()


@pytest.mark.parametrize("name", ["_TMP_0", "_MANIFEST.json", "_KEY_FOR_a.json"])
def test_a_shard_cannot_take_the_name_of_a_helper_file(tmp_path, key, name):
    with pytest.raises(ValueError, match="is a name that key files, manifests and unfinished files have"):
        create_shard(tmp_path / name, key=key)


def test_a_key_file_that_is_named_and_missing_is_a_named_error(path, key, tmp_path):
    create_shard(path, key=key).close()
    with pytest.raises(KeyFileMissingError, match=r"there is no key file at .*gone\.json\. Restore it from a copy"):
        open_shard(path, key=key, key_file=tmp_path / "gone.json")


def test_a_shard_of_more_chunks_than_the_standard_allows_is_refused():
    with pytest.raises(FormatError, match="over the 4 PiB that a shard can have"):
        plaintext_size(shard_size(2**38 * CHUNK))
    assert plaintext_size(shard_size(2**38 * CHUNK - 1)) == 2**38 * CHUNK - 1
