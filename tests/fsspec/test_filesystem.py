"""The filesystem `envelope::`: what it shows, reads, writes, moves and leaves behind."""

import gc
import io
import pickle
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from beam_envelope import (
    ANY_CONTEXT,
    ContextMismatchError,
    EnvelopeError,
    FormatError,
    KeyFileMissingError,
    LocalKms,
    NotEncryptedError,
    TamperedError,
    create_shard,
    open_shard,
)
from beam_envelope.formats.keyfile import TEMPORARY_PREFIX, is_internal
from beam_envelope.formats.shard_layout import CHUNK_BYTES, plaintext_size, shard_size
from beam_envelope.fsspec import EnvelopeFsspecFileSystem, output
from tests.fsspec.conftest import CANARY, CONTEXT, everything
from tests.test_imports import loaded_by

DATA = bytes(range(251)) * 400  # six chunks and a bit


def write_and_fail(f, data):
    with f:
        f.write(data)
        raise RuntimeError("planned")


def shards_of(inner, folder):
    return sorted(name for name in everything(inner, folder) if not is_internal(name))


class TestUrls:
    def test_a_chained_url_names_a_shard(self, tmp_path, options):
        with fsspec.open(f"envelope::file://{tmp_path}/a.bin", "wb", **options) as f:
            f.write(DATA)
        with open_shard(tmp_path / "a.bin", **options) as f:
            assert f.read() == DATA

    def test_memory_is_chained_too(self, options):
        with fsspec.open("envelope::memory://x/a.bin", "wb", **options) as f:
            f.write(DATA)
        assert fsspec.open("envelope::memory://x/a.bin", **options).open().read() == DATA

    def test_options_of_the_filesystem_inside_go_to_it(self, tmp_path, options):
        fs, _ = fsspec.url_to_fs(f"envelope::file://{tmp_path}/a", file={"auto_mkdir": True}, **options)
        assert fs.fs.auto_mkdir is True

    @pytest.mark.parametrize("cache", ["filecache", "simplecache"])
    def test_a_cache_below_holds_ciphertext(self, tmp_path, options, cache):
        data = CANARY.encode() * 10_000
        with fsspec.open("envelope::memory://x/a.txt", "wb", **options) as f:
            f.write(data)
        where = {cache: {"cache_storage": str(tmp_path / "cache")}}
        for _ in range(2):
            with fsspec.open(f"envelope::{cache}::memory://x/a.txt", **where, **options) as f:
                assert f.read() == data
        cached = b"".join(path.read_bytes() for path in (tmp_path / "cache").iterdir())
        assert len(cached) > len(data)
        assert CANARY.encode() not in cached

    def test_without_a_chain_the_local_disk_is_inside(self, tmp_path, options):
        fsspec.filesystem("envelope", **options).pipe_file(f"envelope://{tmp_path}/a.bin", DATA)
        assert plaintext_size((tmp_path / "a.bin").stat().st_size) == len(DATA)

    def test_paths_become_urls_and_back(self, fs, folder):
        assert fs.unstrip_protocol(f"{folder}/a.bin") == f"envelope://{folder}/a.bin"
        for url in (f"envelope://{folder}/a.bin", f"envelope::{fs.fs.unstrip_protocol(folder)}/a.bin"):
            assert fs._strip_protocol(url) == f"{folder}/a.bin"

    def test_the_root_is_the_root(self, options):
        fs = EnvelopeFsspecFileSystem(fs=fsspec.filesystem("file"), **options)
        assert fs._strip_protocol("envelope:///") == "/"

    def test_the_entry_point_names_the_class(self):
        (entry,) = metadata.entry_points(group="fsspec.specs", name="envelope")
        assert entry.load() is EnvelopeFsspecFileSystem

    def test_instances_are_cached_by_their_options_and_not_by_their_paths(self, tmp_path, options):
        one, _ = fsspec.url_to_fs(f"envelope::file://{tmp_path}/a", **options)
        same, _ = fsspec.url_to_fs(f"envelope::file://{tmp_path}/b", **options)
        other, _ = fsspec.url_to_fs(f"envelope::file://{tmp_path}/a", **{**options, "context": {"dataset": "b"}})
        assert one is same
        assert one is not other

    def test_it_pickles_and_says_its_options_as_json(self, tmp_path, options):
        fs, path = fsspec.url_to_fs(f"envelope::file://{tmp_path}/a.bin", **options)
        fs.pipe_file(path, DATA)
        EnvelopeFsspecFileSystem.clear_instance_cache()
        assert pickle.loads(pickle.dumps(fs)).cat_file(path) == DATA
        assert fsspec.AbstractFileSystem.from_json(fs.to_json()).cat_file(path) == DATA

    def test_no_key_material_is_in_a_pickle(self, tmp_path, options):
        fs, path = fsspec.url_to_fs(f"envelope::file://{tmp_path}/a.bin", **options)
        fs.pipe_file(path, DATA)
        (secret,) = re.findall('"key": "([^"]+)"', Path(LocalKms.from_uri(options["key"]).path).read_text())
        state = pickle.dumps(fs) + fs.to_json().encode() + repr(fs.storage_options).encode()
        assert secret.encode() not in state
        assert options["key"].encode() in state


class TestSettings:
    def test_the_environment_gives_what_options_do_not(self, fs, inner, folder, key, monkeypatch):
        fs.pipe_file(f"{folder}/a.bin", DATA)
        bare = EnvelopeFsspecFileSystem(fs=inner)
        with pytest.raises(ValueError, match=r"^no key is set for envelope:: paths: give key='aws-kms://alias/NAME'"):
            bare.cat_file(f"{folder}/a.bin")
        monkeypatch.setenv("BEAM_ENVELOPE_KEY", key)
        with pytest.raises(ContextMismatchError):
            bare.cat_file(f"{folder}/a.bin")
        monkeypatch.setenv("BEAM_ENVELOPE_CONTEXT", "dataset=flights")
        assert bare.cat_file(f"{folder}/a.bin") == DATA

    def test_options_win_over_the_environment(self, fs, folder, monkeypatch):
        monkeypatch.setenv("BEAM_ENVELOPE_KEY", "local-kms:///nowhere.json")
        monkeypatch.setenv("BEAM_ENVELOPE_CONTEXT", "dataset=other")
        fs.pipe_file(f"{folder}/a.bin", DATA)
        assert fs.cat_file(f"{folder}/a.bin") == DATA

    def test_an_empty_context_is_one(self, inner, folder, key, monkeypatch):
        monkeypatch.setenv("BEAM_ENVELOPE_CONTEXT", "dataset=flights")
        fs = EnvelopeFsspecFileSystem(fs=inner, key=key, context={})
        fs.pipe_file(f"{folder}/a.bin", DATA)
        assert EnvelopeFsspecFileSystem(fs=inner, key=key, context={}).cat_file(f"{folder}/a.bin") == DATA

    @pytest.mark.parametrize("options", [{"any_context": True}, {"context": ANY_CONTEXT}])
    def test_any_context_reads_all(self, inner, folder, key, options):
        written = EnvelopeFsspecFileSystem(fs=inner, key=key, context=CONTEXT)
        written.pipe_file(f"{folder}/a.bin", DATA)
        assert EnvelopeFsspecFileSystem(fs=inner, key=key, **options).cat_file(f"{folder}/a.bin") == DATA

    def test_any_of_several_keys_opens(self, inner, folder, key, local_key):
        both = EnvelopeFsspecFileSystem(fs=inner, key=[key, local_key])
        both.pipe_file(f"{folder}/a.bin", DATA)
        for one in (key, local_key):
            assert EnvelopeFsspecFileSystem(fs=inner, key=one).cat_file(f"{folder}/a.bin") == DATA

    def test_listing_needs_no_key(self, fs, inner, folder):
        fs.pipe_file(f"{folder}/a.bin", DATA)
        assert EnvelopeFsspecFileSystem(fs=inner).size(f"{folder}/a.bin") == len(DATA)


class TestListings:
    @pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
    def test_sizes_are_those_of_the_plaintext(self, fs, folder, size):
        path = f"{folder}/a.bin"
        fs.pipe_file(path, bytes(size))
        assert fs.info(path)["size"] == fs.size(path) == fs.du(folder) == size
        assert [entry["size"] for entry in fs.ls(folder)] == [size]
        assert fs.find(folder, detail=True)[path]["size"] == size
        assert fs.glob(f"{folder}/*", detail=True)[path]["size"] == size
        assert next(iter(fs.walk(folder, detail=True)))[2]["a.bin"]["size"] == size
        assert fs.du(folder, total=False) == {path: size}
        with fs.open(path) as f:
            assert f.size == size

    def test_our_own_files_are_hidden(self, fs, inner, folder):
        fs.pipe_file(f"{folder}/sub/a.bin", DATA)
        inner.pipe_file(f"{folder}/sub/{TEMPORARY_PREFIX}1", b"x")
        inner.pipe_file(f"{folder}/sub/{TEMPORARY_PREFIX}2/part", b"x")
        inner.pipe_file(f"{folder}/sub/_MANIFEST.json", b"x")
        shard = f"{folder}/sub/a.bin"
        assert fs.find(folder) == fs.glob(f"{folder}/**/*.bin") == [shard]
        assert fs.ls(f"{folder}/sub", detail=False) == [shard]
        assert fs.glob(f"{folder}/sub/*") == [shard]
        assert fs.glob(f"{folder}/sub/_*") == []
        assert list(fs.walk(folder))[-1] == (f"{folder}/sub", [], ["a.bin"])
        for hidden in ("_KEY_FOR_a.bin.json", f"{TEMPORARY_PREFIX}1", "_MANIFEST.json"):
            assert inner.exists(f"{folder}/sub/{hidden}")
            assert not fs.exists(f"{folder}/sub/{hidden}")
            assert not fs.isfile(f"{folder}/sub/{hidden}")
            for refused in (fs.info, fs.open, fs.rm_file, fs.ls, fs.modified, fs.cat_file):
                with pytest.raises(FileNotFoundError, match="cannot be seen from here"):
                    refused(f"{folder}/sub/{hidden}")

    def test_a_file_that_cannot_be_a_shard_is_listed_as_it_is(self, fs, inner, folder):
        inner.pipe_file(f"{folder}/a.txt", b"plain")
        assert fs.size(f"{folder}/a.txt") == 5
        with pytest.raises(NotEncryptedError, match=re.escape(f"{folder}/a.txt is plain data")):
            fs.open(f"{folder}/a.txt")

    def test_a_listing_of_1000_shards_reads_nothing(self, fs, inner, folder, monkeypatch):
        fs.pipe_file(f"{folder}/00/0.bin", DATA)
        shard, key_file = everything(inner, folder)["00/0.bin"], everything(inner, folder)["00/_KEY_FOR_0.bin.json"]
        for number in range(1, 1000):
            part = f"{folder}/{number % 10:02}"
            inner.makedirs(part, exist_ok=True)
            inner.pipe_file(f"{part}/{number}.bin", shard)
            inner.pipe_file(f"{part}/_KEY_FOR_{number}.bin.json", key_file)

        def refuse(*arguments, **options):
            pytest.fail("a listing has read")

        for name in ("open", "_open", "cat_file", "cat"):
            monkeypatch.setattr(type(inner), name, refuse)
        found = fs.find(folder, detail=True)
        assert [info["size"] for info in found.values()] == [len(DATA)] * 1000
        assert len(fs.glob(f"{folder}/*/*.bin")) == 1000
        assert sum(len(files) for _, _, files in fs.walk(folder)) == 1000
        assert fs.du(folder) == 1000 * len(DATA)
        assert len(fs.ls(f"{folder}/07")) == 100
        assert fs.size(f"{folder}/00/0.bin") == len(DATA)

    def test_a_whole_tree_is_one_call_of_the_filesystem_inside(self, fs, inner, folder, monkeypatch):
        for name in ("a", "b/c", "b/d/e"):
            fs.pipe_file(f"{folder}/{name}", b"x")
        calls = []
        find = type(inner).find
        monkeypatch.setattr(type(inner), "find", lambda self, *a, **k: calls.append(1) or find(self, *a, **k))
        assert len(fs.find(folder)) == 3
        assert fs.du(folder) == 3
        assert len(calls) == 2

    def test_times_and_checksums_are_those_of_the_file_inside(self, fs, inner, folder):
        path = f"{folder}/a.bin"
        fs.pipe_file(path, DATA)
        assert fs.modified(path) == inner.modified(path)
        assert fs.created(path) == inner.created(path)
        assert fs.checksum(path) == inner.checksum(path)
        before = fs.ukey(path)
        assert fs.ukey(path) == before
        fs.pipe_file(path, DATA + b"x")
        assert fs.ukey(path) != before

    def test_folders_are_made_seen_and_removed(self, fs, inner, folder):
        fs.mkdir(f"{folder}/a")
        fs.makedirs(f"{folder}/b/c")
        assert fs.isdir(f"{folder}/a")
        assert fs.isdir(f"{folder}/b/c")
        assert not fs.isfile(f"{folder}/a")
        assert fs.info(f"{folder}/a")["type"] == "directory"
        fs.rmdir(f"{folder}/a")
        assert not fs.exists(f"{folder}/a")


class TestReading:
    @pytest.fixture
    def path(self, fs, folder):
        fs.pipe_file(f"{folder}/a.bin", DATA)
        return f"{folder}/a.bin"

    @pytest.mark.parametrize(
        "span",
        [(0, 10), (None, 10), (20, None), (-10, None), (5, -5), (CHUNK_BYTES - 1, CHUNK_BYTES + 1), (None, None)],
    )
    def test_a_range_is_that_of_the_plaintext(self, fs, path, span):
        start, end = span
        assert fs.cat_file(path, start, end) == fs.read_bytes(path, start, end) == DATA[start:end]

    def test_a_range_decrypts_only_the_chunks_that_it_touches(self, fs, path):
        with fs.open(path) as f:
            f.seek(2 * CHUNK_BYTES + 5)
            assert f.read(10) == DATA[2 * CHUNK_BYTES + 5 :][:10]
            assert f.raw.chunks_decrypted == 1

    def test_fsspec_reads_it_in_all_its_ways(self, fs, path, folder):
        assert fs.head(path, 5) == DATA[:5]
        assert fs.tail(path, 5) == DATA[-5:]
        assert fs.cat([path]) == {path: DATA}
        assert fs.cat_ranges([path, path], [0, 9], [5, 12]) == [DATA[:5], DATA[9:12]]
        assert fs.read_block(path, 7, 10) == DATA[7:17]
        assert fs.get_mapper(folder)["a.bin"] == DATA
        with fs.open(path) as f:
            assert f.readable()
            assert f.seekable()
            assert f.seek(0, io.SEEK_END) == len(DATA)

    def test_open_files_of_one_shard_do_not_disturb_each_other(self, fs, path):
        with fs.open(path) as one, fs.open(path) as other:
            for start in range(0, len(DATA), 10_000):
                assert one.read(10_000) == DATA[start : start + 10_000]
                assert other.read(10_000) == DATA[start : start + 10_000]

    def test_options_go_to_the_file_inside_but_for_the_size_which_is_not_its_own(self, fs, path, inner, monkeypatch):
        given = []
        opened = inner.open
        monkeypatch.setattr(inner, "open", lambda *a, **options: given.append(options) or opened(*a, **options))
        with fs.open(path, size=len(DATA), block_size=1000, cache_type="none") as f:
            assert f.read() == DATA
        assert given[-1] == {"block_size": 1000, "cache_type": "none"}

    def test_the_file_inside_is_closed_with_the_shard(self, folder, options):
        fs = EnvelopeFsspecFileSystem(fs=fsspec.filesystem("file", auto_mkdir=True), **options)
        fs.pipe_file(f"{folder}/a", DATA)
        f = fs.open(f"{folder}/a")
        stream = f.raw._stream
        f.close()
        assert stream.closed

    def test_a_shard_without_key_file_says_so(self, fs, inner, path, folder):
        inner.rm_file(f"{folder}/_KEY_FOR_a.bin.json")
        with pytest.raises(KeyFileMissingError, match=r"there is no key file _KEY_FOR_a\.bin\.json beside"):
            fs.open(path)

    def test_a_shard_that_is_not_there_is_not_found(self, fs, inner, path, folder):
        with pytest.raises(FileNotFoundError):
            fs.open(f"{folder}/b.bin")
        inner.rm_file(path)  # its key file stays
        with pytest.raises(FileNotFoundError):
            fs.open(path)

    def test_a_changed_shard_is_refused(self, fs, inner, path):
        shard = bytearray(inner.cat_file(path))
        shard[100] ^= 1
        inner.pipe_file(path, bytes(shard))
        with pytest.raises(TamperedError):
            fs.cat_file(path, 0, 10)

    @pytest.mark.parametrize("chunks", [0, 1, 3])
    def test_who_reads_as_much_as_a_cut_shard_lists_is_warned(self, fs, inner, path, chunks):
        cut = inner.cat_file(path)[: shard_size(chunks * CHUNK_BYTES)]
        inner.pipe_file(path, cut)
        size = fs.size(path)
        assert size == chunks * CHUNK_BYTES  # the listing is taken in
        with pytest.raises(TamperedError), fs.open(path) as f:
            f.read(size)
        with pytest.raises(TamperedError):
            fs.cat_file(path, 0, size)


class TestCompressed:
    @pytest.fixture
    def zstd(self, inner, options):
        return EnvelopeFsspecFileSystem(fs=inner, zstd=True, **options)

    def test_it_is_refused_where_sizes_are_listed(self, zstd, fs, folder):
        zstd.pipe_file(f"{folder}/a.csv", b"1,2\n" * 100_000)
        with pytest.raises(FormatError, match=r"a\.csv was compressed before it was encrypted.*zstd=True"):
            fs.open(f"{folder}/a.csv")

    def test_with_zstd_it_is_read_and_no_size_is_known(self, zstd, inner, folder):
        data = b"1,2\n" * 100_000
        zstd.pipe_file(f"{folder}/a.csv", data)
        assert inner.size(f"{folder}/a.csv") < 2000
        assert zstd.cat_file(f"{folder}/a.csv") == data
        assert zstd.cat_file(f"{folder}/a.csv", 4, 8) == b"1,2\n"
        assert zstd.size(f"{folder}/a.csv") is None
        assert [entry["size"] for entry in zstd.ls(folder)] == [None]
        with zstd.open(f"{folder}/a.csv") as f:
            assert f.size is None

    def test_with_zstd_other_shards_are_read_too(self, zstd, fs, folder):
        fs.pipe_file(f"{folder}/a.bin", DATA)
        assert zstd.cat_file(f"{folder}/a.bin") == DATA


class TestWriting:
    def test_the_shard_opens_with_open_shard(self, tmp_path, options):
        with fsspec.open(f"envelope::file://{tmp_path}/deep/er/a.bin", "wb", **options) as f:
            f.write(DATA)
        with open_shard(tmp_path / "deep/er/a.bin", **options) as f:
            assert f.read() == DATA

    def test_a_shard_of_create_shard_is_read(self, tmp_path, options):
        with create_shard(tmp_path / "a.bin", **options) as f:
            f.write(DATA)
        assert fsspec.open(f"envelope::file://{tmp_path}/a.bin", **options).open().read() == DATA

    def test_text_is_written_and_read(self, fs, folder):
        fs.write_text(f"{folder}/a.txt", "grüße\n")
        assert fs.read_text(f"{folder}/a.txt") == "grüße\n"

    def test_no_plaintext_is_stored_anywhere(self, fs, inner, folder, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        for writing in range(3):
            fs.pipe_file(f"{folder}/{writing}.txt", CANARY.encode() * 10_000)
        with pytest.raises(RuntimeError, match="planned"):
            write_and_fail(fs.open(f"{folder}/x.txt", "wb"), CANARY.encode() * 100_000)
        files = [*everything(inner, folder).values(), *(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())]
        assert len(files) >= 6
        assert not any(CANARY.encode() in data for data in files)

    def test_nothing_is_seen_before_close(self, fs, inner, folder):
        f = fs.open(f"{folder}/a.bin", "wb")
        f.write(DATA)
        assert fs.find(folder) == []
        assert shards_of(inner, folder) == []
        f.close()
        assert fs.find(folder) == [f"{folder}/a.bin"]
        assert sorted(everything(inner, folder)) == ["_KEY_FOR_a.bin.json", "a.bin"]

    def test_the_key_file_comes_before_the_shard(self, fs, inner, folder, monkeypatch):
        if not isinstance(inner, MemoryFileSystem):
            pytest.skip("tests/formats/test_output.py has this for a local disk")
        seen = []
        rename = type(inner).mv

        def mv(self, source, target, **options):
            seen.append(sorted(everything(inner, folder)))
            return rename(self, source, target, **options)

        monkeypatch.setattr(type(inner), "mv", mv)
        fs.pipe_file(f"{folder}/a.bin", DATA)
        (names,) = seen
        assert "_KEY_FOR_a.bin.json" in names
        assert "a.bin" not in names

    @pytest.mark.parametrize("how", ["exception", "collected", "text", "buffered", "closed while handling"])
    def test_a_dropped_writer_leaves_nothing(self, fs, inner, folder, how):
        path = f"{folder}/a.bin"
        if how == "exception":
            with pytest.raises(RuntimeError, match="planned"):
                write_and_fail(fs.open(path, "wb"), DATA)
        elif how == "text":
            with pytest.raises(RuntimeError, match="planned"):
                write_and_fail(fs.open(path, "w"), "x" * 100_000)
        elif how == "closed while handling":
            f = fs.open(path, "wb")
            try:
                f.write(None)
            except TypeError:
                f.close()
        else:
            f = fs.open(path, "wb")
            f.write(DATA)
            if how == "buffered":
                f = io.BufferedWriter(f)
                f.write(b"x")
            del f
            gc.collect()
        assert everything(inner, folder) == {}

    def test_a_dropped_writer_leaves_what_was_there(self, fs, folder):
        fs.pipe_file(f"{folder}/a.bin", b"old")
        with pytest.raises(RuntimeError, match="planned"):
            write_and_fail(fs.open(f"{folder}/a.bin", "wb"), DATA)
        assert fs.cat_file(f"{folder}/a.bin") == b"old"

    def test_a_failure_at_the_end_leaves_nothing_that_reads(self, fs, inner, folder, monkeypatch):
        if not isinstance(inner, MemoryFileSystem):
            pytest.skip("tests/formats/test_output.py has this for a local disk")

        def mv(self, *arguments, **options):
            raise OSError("planned")

        with monkeypatch.context() as patch:
            patch.setattr(type(inner), "mv", mv)
            with pytest.raises(OSError, match="planned"):
                fs.pipe_file(f"{folder}/a.bin", DATA)
        assert sorted(everything(inner, folder)) == ["_KEY_FOR_a.bin.json"]
        fs.pipe_file(f"{folder}/a.bin", b"again")
        assert fs.cat_file(f"{folder}/a.bin") == b"again"

    def test_a_shard_is_replaced_with_its_key_file(self, fs, inner, folder):
        fs.pipe_file(f"{folder}/a.bin", b"old")
        before = everything(inner, folder)
        fs.pipe_file(f"{folder}/a.bin", b"new")
        after = everything(inner, folder)
        assert fs.cat_file(f"{folder}/a.bin") == b"new"
        assert before.keys() == after.keys()
        assert all(before[name] != after[name] for name in before)

    def test_two_writers_of_one_shard_see_each_other(self, fs, inner, folder, monkeypatch):
        if not isinstance(inner, MemoryFileSystem):
            pytest.skip("tests/formats/test_output.py has this for a local disk")
        with fs.open(f"{folder}/a.bin", "wb") as f:
            f.write(b"first")
            key_file, check = f"{folder}/_KEY_FOR_a.bin.json", type(inner).cat_file

            def other_writer(self, path, *arguments, **options):
                if path == key_file:
                    return b"another key file"
                return check(self, path, *arguments, **options)

            monkeypatch.setattr(type(inner), "cat_file", other_writer)
            with pytest.raises(EnvelopeError, match="another writer replaced"):
                f.close()

    @pytest.mark.parametrize("mode", ["xb", "x"])
    def test_exclusive_creation_leaves_what_is_there(self, fs, folder, mode):
        with fs.open(f"{folder}/a.bin", mode) as f:
            f.write("1" if mode == "x" else b"1")
        with pytest.raises(FileExistsError):
            fs.open(f"{folder}/a.bin", mode)
        assert fs.cat_file(f"{folder}/a.bin") == b"1"

    def test_exclusive_creation_looks_again_at_the_end(self, fs, folder):
        f = fs.open(f"{folder}/a.bin", "xb")
        f.write(b"late")
        fs.pipe_file(f"{folder}/a.bin", b"first")
        with pytest.raises(FileExistsError):
            f.close()
        assert fs.cat_file(f"{folder}/a.bin") == b"first"
        assert fs.find(folder) == [f"{folder}/a.bin"]

    @pytest.mark.parametrize("mode", ["ab", "r+b", "w+b", "a", "a+b"])
    def test_a_shard_is_not_changed_in_place(self, fs, folder, mode):
        fs.pipe_file(f"{folder}/a.bin", b"1")
        with pytest.raises(io.UnsupportedOperation, match=r"a shard is read \('rb'\) or written anew \('wb', 'xb'\)"):
            fs.open(f"{folder}/a.bin", mode)
        assert fs.cat_file(f"{folder}/a.bin") == b"1"

    @pytest.mark.parametrize("name", ["_KEY_FOR_a.json", "_MANIFEST.json", f"{TEMPORARY_PREFIX}a"])
    def test_our_own_names_are_kept(self, fs, inner, folder, name):
        with pytest.raises(ValueError, match="is a name that is kept for key files and unfinished files"):
            fs.pipe_file(f"{folder}/{name}", b"1")
        assert everything(inner, folder) == {}

    def test_a_folder_is_not_overwritten(self, fs, folder):
        fs.pipe_file(f"{folder}/sub/a.bin", b"1")
        with pytest.raises(OSError, match=r"(?i)director|folder"):
            fs.pipe_file(f"{folder}/sub", b"2")
        assert fs.cat_file(f"{folder}/sub/a.bin") == b"1"

    def test_a_compressor_that_would_leave_the_shard_open_is_refused(self, fs, inner, folder):
        with pytest.raises(ValueError, match=r"use fsspec\.open\('envelope::\.\.\.', compression=\.\.\.\)"):
            fs.open(f"{folder}/a.csv.gz", "wb", compression="infer")
        with fs.open(f"{folder}/a.csv", "wb", compression="infer") as f:
            f.write(b"1")
        assert fs.cat_file(f"{folder}/a.csv") == b"1"

    def test_fsspec_open_compresses_before_encryption(self, tmp_path, options):
        url = f"envelope::file://{tmp_path}/a.csv.gz"
        with fsspec.open(url, "wt", compression="infer", **options) as f:
            f.write("1,2\n")
        with open_shard(tmp_path / "a.csv.gz", **options) as f:
            assert f.read(2) == b"\x1f\x8b"
        with fsspec.open(url, "rt", compression="infer", **options) as f:
            assert f.read() == "1,2\n"

    def test_names_with_the_characters_of_globs_are_names(self, fs, inner, folder):
        path = f"{folder}/x[1]/a[2]*.bin"
        fs.pipe_file(path, DATA)
        assert sorted(everything(inner, folder)) == ["x[1]/_KEY_FOR_a[2]*.bin.json", "x[1]/a[2]*.bin"]
        assert fs.cat_file(path) == DATA
        fs.rm_file(path)
        assert everything(inner, folder) == {}

    def test_files_are_put_and_got(self, fs, inner, folder, tmp_path):
        (tmp_path / "plain").write_bytes(DATA)
        fs.put_file(str(tmp_path / "plain"), f"{folder}/new/a.bin")
        assert inner.size(f"{folder}/new/a.bin") == shard_size(len(DATA))
        fs.get_file(f"{folder}/new/a.bin", str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == DATA

    def test_an_existing_target_of_put_is_left_with_mode_create(self, fs, folder, tmp_path):
        (tmp_path / "plain").write_bytes(DATA)
        fs.pipe_file(f"{folder}/a.bin", b"old")
        with pytest.raises(FileExistsError):
            fs.put_file(str(tmp_path / "plain"), f"{folder}/a.bin", mode="create")
        assert fs.cat_file(f"{folder}/a.bin") == b"old"

    def test_touch_makes_an_empty_shard(self, fs, inner, folder):
        fs.touch(f"{folder}/a.bin")
        assert inner.size(f"{folder}/a.bin") == shard_size(0)
        assert fs.cat_file(f"{folder}/a.bin") == b""


class TestTransactions:
    def test_files_appear_together_at_the_end(self, fs, inner, folder):
        with fs.transaction:
            for name in "ab":
                with fs.open(f"{folder}/{name}", "wb") as f:
                    f.write(name.encode())
            assert shards_of(inner, folder) == []
        assert fs.cat_file(f"{folder}/a") == b"a"
        assert fs.cat_file(f"{folder}/b") == b"b"
        assert sorted(everything(inner, folder)) == ["_KEY_FOR_a.json", "_KEY_FOR_b.json", "a", "b"]

    def test_an_exception_drops_them_all(self, fs, inner, folder):
        def fail():
            with fs.transaction:
                fs.pipe_file(f"{folder}/a", b"a")
                open_files.append(fs.open(f"{folder}/b", "wb"))
                raise RuntimeError("planned")

        open_files = []
        with pytest.raises(RuntimeError, match="planned"):
            fail()
        assert everything(inner, folder) == {}
        assert open_files[0].closed

    def test_a_file_that_was_dropped_in_it_stays_so(self, fs, folder):
        with fs.transaction:
            fs.pipe_file(f"{folder}/a", b"a")
            with pytest.raises(RuntimeError, match="planned"):
                write_and_fail(fs.open(f"{folder}/b", "wb"), b"b")
        assert fs.find(folder) == [f"{folder}/a"]

    def test_a_file_that_is_still_open_at_its_end_is_an_error(self, fs, inner, folder):
        fs.start_transaction()
        f = fs.open(f"{folder}/a", "wb")
        f.write(b"a")
        with pytest.raises(ValueError, match="is still open at the end of its transaction"):
            fs.end_transaction()
        assert everything(inner, folder) == {}


class TestCopyMoveRemove:
    @pytest.fixture
    def path(self, fs, folder):
        fs.pipe_file(f"{folder}/a.bin", DATA)
        return f"{folder}/a.bin"

    def test_a_copy_has_a_key_file_of_its_own(self, fs, inner, folder, path):
        fs.cp_file(path, f"{folder}/sub/b.bin")
        files = everything(inner, folder)
        assert files["a.bin"] == files["sub/b.bin"]
        assert files["_KEY_FOR_a.bin.json"] == files["sub/_KEY_FOR_b.bin.json"]
        fs.rm_file(path)
        assert fs.cat_file(f"{folder}/sub/b.bin") == DATA

    @pytest.mark.parametrize("name", ["mv", "move", "rename"])
    def test_a_move_takes_the_key_file_along(self, fs, inner, folder, path, name):
        getattr(fs, name)(path, f"{folder}/b.bin")
        assert sorted(everything(inner, folder)) == ["_KEY_FOR_b.bin.json", "b.bin"]
        assert fs.cat_file(f"{folder}/b.bin") == DATA

    @pytest.mark.parametrize("name", ["cp_file", "mv"])
    def test_the_target_is_replaced_with_its_key_file(self, fs, folder, path, name):
        fs.pipe_file(f"{folder}/b.bin", b"old")
        getattr(fs, name)(path, f"{folder}/b.bin")
        assert fs.cat_file(f"{folder}/b.bin") == DATA

    @pytest.mark.parametrize("name", ["cp_file", "mv"])
    def test_no_shard_stands_beside_the_key_file_of_another(self, fs, inner, folder, path, name, monkeypatch):
        fs.pipe_file(f"{folder}/b.bin", b"old")
        there = []
        owner, attribute = (output, "write_atomically") if fs._local else (inner, "pipe_file")
        write = getattr(owner, attribute)

        def note(*arguments):
            there.append(inner.exists(f"{folder}/b.bin"))
            write(*arguments)

        monkeypatch.setattr(owner, attribute, note)
        getattr(fs, name)(path, f"{folder}/b.bin")
        assert there == [False]

    @pytest.mark.parametrize("name", ["cp_file", "mv"])
    def test_onto_itself_changes_nothing(self, fs, folder, path, name):
        getattr(fs, name)(path, path)
        if isinstance(fs.fs, LocalFileSystem):
            getattr(fs, name)(path, f"{folder}/../data/a.bin")
        assert fs.cat_file(path) == DATA

    def test_a_move_into_a_folder_keeps_the_name(self, fs, inner, folder, path):
        fs.makedirs(f"{folder}/sub")
        fs.mv(path, f"{folder}/sub/")
        assert sorted(everything(inner, folder)) == ["sub/_KEY_FOR_a.bin.json", "sub/a.bin"]

    def test_a_whole_folder_moves(self, fs, inner, folder, path):
        fs.pipe_file(f"{folder}/sub/b.bin", b"b")
        fs.mv(folder, f"{folder}2", recursive=True)
        assert fs.cat_file(f"{folder}2/a.bin") == DATA
        assert fs.cat_file(f"{folder}2/sub/b.bin") == b"b"
        assert not inner.exists(folder)

    @pytest.mark.parametrize("name", ["cp_file", "mv"])
    def test_what_has_no_key_file_does_not_go(self, fs, inner, folder, path, name):
        inner.rm_file(f"{folder}/_KEY_FOR_a.bin.json")
        fs.pipe_file(f"{folder}/b.bin", b"old")
        with pytest.raises(KeyFileMissingError):
            getattr(fs, name)(path, f"{folder}/b.bin")
        assert fs.cat_file(f"{folder}/b.bin") == b"old"

    def test_a_key_file_goes_with_its_shard(self, fs, inner, path, folder):
        fs.rm(path)
        assert everything(inner, folder) == {}

    def test_globs_and_lists_are_removed(self, fs, inner, folder, path):
        for name in "bcd":
            fs.pipe_file(f"{folder}/{name}.bin", b"x")
        fs.rm(f"{folder}/[ab].bin")
        assert shards_of(inner, folder) == ["c.bin", "d.bin"]
        fs.rm([f"{folder}/c.bin", f"{folder}/d.bin"])
        assert everything(inner, folder) == {}

    def test_a_folder_goes_with_all_that_is_in_it(self, fs, inner, folder, path):
        fs.pipe_file(f"{folder}/sub/b[1].bin", b"b")
        inner.pipe_file(f"{folder}/sub/{TEMPORARY_PREFIX}1", b"x")
        fs.rm(folder, recursive=True)
        assert not inner.exists(folder)

    def test_shards_go_before_their_key_files(self, fs, inner, folder, path, monkeypatch):
        monkeypatch.setattr(fs.fs, "rm", lambda *arguments, **options: removed.append(arguments[0]))
        removed = []
        fs.rm(folder, recursive=True)
        assert removed == [[path], folder]

    def test_what_lies_deeper_than_maxdepth_stays(self, fs, folder, path):
        fs.pipe_file(f"{folder}/sub/b.bin", b"b")
        fs.rm(folder, recursive=True, maxdepth=1)
        assert fs.find(folder) == [f"{folder}/sub/b.bin"]

    def test_a_folder_is_not_removed_by_accident(self, fs, folder, path):
        with pytest.raises((ValueError, OSError)):
            fs.rm(folder)
        assert fs.cat_file(path) == DATA


class TestImports:
    def test_no_beam_comes_with_it(self):
        modules = loaded_by("import fsspec, beam_envelope.fsspec\nfsspec.filesystem('envelope')")
        assert "beam_envelope.fsspec.filesystem" in modules
        assert modules.isdisjoint({"apache_beam", "pyarrow", "pandas", "rich"})

    def test_without_fsspec_it_says_what_to_install(self):
        script = "import sys; sys.modules['fsspec'] = None\nimport beam_envelope.fsspec"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.endswith(
            "ImportError: envelope:: paths need fsspec 2025.10 or newer: pip install 'beam-envelope[fsspec]'\n"
        )
