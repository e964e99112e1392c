"""What every envelope filesystem must do, whatever lies inside: subclass it with a `root` and run it with pytest.

class TestMine(FileSystemConformance):
@pytest.fixture
def root(self, tmp_path):
FileSystems.set_options(PipelineOptions(["--envelope_key=local-kms://keyring.json"]))
return f"envelope+file://{tmp_path}/"
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from beam_envelope.formats.keyfile import is_internal
from beam_envelope.io.filesystem import inner_path
from beam_envelope.io.store import split_path, store_of

CANARY = b"CANARY of the filesystem "
TEXT = CANARY * 2000


def write(path: str, data: bytes = TEXT, **arguments: Any) -> None:
    """Write a file through Beam."""
    with FileSystems.create(path, **arguments) as stream:
        stream.write(data)


def read(path: str, **arguments: Any) -> bytes:
    """Read a file through Beam."""
    with FileSystems.open(path, **arguments) as stream:
        data: bytes = stream.read()
        return data


def names_below(root: str) -> list[str]:
    """Return the names of all files inside, key files too, and no unfinished ones are expected."""
    return sorted(
        metadata.path.removeprefix(inner_path(root))
        for metadata in store_of(inner_path(root)).match(f"{inner_path(root)}**")
    )


class FileSystemConformance:
    """Tests of Beam's FileSystem contract, and of ours. A subclass has the fixture `root`, a folder with a slash."""

    def test_what_is_written_is_read(self, root: str) -> None:
        write(f"{root}a.bin")
        assert read(f"{root}a.bin") == TEXT

    def test_nothing_inside_is_plaintext(self, root: str) -> None:
        write(f"{root}a.bin")
        inner = inner_path(root)
        for name in names_below(root):
            with store_of(inner).open(inner + name) as stream:
                assert CANARY not in stream.read()

    def test_each_file_has_a_key_file_that_no_match_shows(self, root: str) -> None:
        write(f"{root}a.bin")
        write(f"{root}b.bin")
        assert names_below(root) == ["_KEY_FOR_a.bin.json", "_KEY_FOR_b.bin.json", "a.bin", "b.bin"]
        found = FileSystems.match([f"{root}*"])[0].metadata_list
        assert sorted(metadata.path for metadata in found) == [f"{root}a.bin", f"{root}b.bin"]

    @pytest.mark.parametrize("size", [0, 1, 16383, 16384, 16385])
    def test_sizes_are_those_of_the_plaintext(self, root: str, size: int) -> None:
        write(f"{root}a.bin", b"x" * size)
        (metadata,) = FileSystems.match([f"{root}a*"])[0].metadata_list
        (exact,) = FileSystems.match([f"{root}a.bin"])[0].metadata_list
        filesystem = FileSystems.get_filesystem(root)
        assert metadata.size_in_bytes == exact.size_in_bytes == filesystem.size(f"{root}a.bin") == size
        assert filesystem.metadata(f"{root}a.bin").size_in_bytes == size

    def test_globs_match_within_a_folder_and_below(self, root: str) -> None:
        for name in ("a.csv", "b.csv", "b.txt", "sub/c.csv"):
            write(root + name, b"x")
        found = {
            pattern: sorted(metadata.path for metadata in FileSystems.match([root + pattern])[0].metadata_list)
            for pattern in ("*.csv", "**.csv", "b.*", "nothing*")
        }
        assert found == {
            "*.csv": [f"{root}a.csv", f"{root}b.csv"],
            "**.csv": [f"{root}a.csv", f"{root}b.csv", f"{root}sub/c.csv"],
            "b.*": [f"{root}b.csv", f"{root}b.txt"],
            "nothing*": [],
        }

    def test_a_reader_seeks(self, root: str) -> None:
        data = bytes(range(256)) * 400
        write(f"{root}a.bin", data)
        with FileSystems.open(f"{root}a.bin") as stream:
            for position in (70_000, 3, 16_384, 102_399):
                stream.seek(position)
                assert (stream.read(10), stream.tell()) == (
                    data[position : position + 10],
                    min(position + 10, len(data)),
                )
            assert stream.seek(0, 2) == len(data)

    def test_a_file_is_not_there_before_it_is_closed(self, root: str) -> None:
        stream = FileSystems.create(f"{root}a.bin")
        stream.write(TEXT)
        assert not FileSystems.exists(f"{root}a.bin")
        assert FileSystems.match([f"{root}*"])[0].metadata_list == []
        stream.close()
        assert FileSystems.exists(f"{root}a.bin")

    @pytest.mark.parametrize("name", ["a.bin", "a.txt.gz"])
    def test_an_exception_or_a_forgotten_writer_leaves_nothing(self, root: str, name: str) -> None:
        with contextlib.suppress(ZeroDivisionError), FileSystems.create(root + name) as stream:
            stream.write(TEXT)
            raise ZeroDivisionError
        stream = FileSystems.create(root + name)
        stream.write(TEXT)
        del stream
        assert names_below(root) == []

    def test_a_rename_takes_the_key_file_along_and_replaces(self, root: str) -> None:
        write(f"{root}a.bin", b"old")
        write(f"{root}tmp/b.bin", b"new")
        FileSystems.rename([f"{root}tmp/b.bin"], [f"{root}a.bin"])
        assert names_below(root) == ["_KEY_FOR_a.bin.json", "a.bin"]
        assert read(f"{root}a.bin") == b"new"

    def test_a_copy_opens_too(self, root: str) -> None:
        write(f"{root}a.bin")
        FileSystems.copy([f"{root}a.bin"], [f"{root}b.bin"])
        assert (read(f"{root}a.bin"), read(f"{root}b.bin")) == (TEXT, TEXT)

    def test_a_rename_of_what_is_missing_is_an_error(self, root: str) -> None:
        with pytest.raises(BeamIOError, match="Rename operation failed"):
            FileSystems.rename([f"{root}gone"], [f"{root}b.bin"])
        assert names_below(root) == []

    def test_delete_takes_the_key_file_along(self, root: str) -> None:
        write(f"{root}a.bin")
        write(f"{root}b.bin")
        FileSystems.delete([f"{root}a.*"])
        assert names_below(root) == ["_KEY_FOR_b.bin.json", "b.bin"]
        with pytest.raises(BeamIOError, match="Delete operation failed"):
            FileSystems.delete([f"{root}a.bin"])

    def test_a_name_that_ends_in_gz_is_packed_once_and_then_encrypted(self, root: str) -> None:
        write(f"{root}a.txt.gz")
        assert read(f"{root}a.txt.gz") == TEXT
        packed = read(f"{root}a.txt.gz", compression_type=CompressionTypes.UNCOMPRESSED)
        assert packed.startswith(b"\x1f\x8b")
        assert len(packed) == FileSystems.get_filesystem(root).size(f"{root}a.txt.gz") < len(TEXT)

    def test_paths_are_joined_and_split_within_the_scheme(self, root: str) -> None:
        folder = FileSystems.join(root, "sub")
        assert FileSystems.split(FileSystems.join(folder, "a.bin")) == (folder, "a.bin")
        assert FileSystems.get_scheme(folder) == FileSystems.get_scheme(root)

    def test_times_and_checksums_come_from_inside(self, root: str) -> None:
        write(f"{root}a.bin")
        assert FileSystems.last_updated(f"{root}a.bin") > 1.7e9
        before = FileSystems.checksum(f"{root}a.bin")
        FileSystems.rename([f"{root}a.bin"], [f"{root}b.bin"])
        assert FileSystems.checksum(f"{root}b.bin") == before

    def test_a_listing_reads_no_file(self, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
        write(f"{root}a.bin")
        store = type(store_of(inner_path(root)))
        monkeypatch.setattr(store, "open", lambda *_: pytest.fail("a file was read"))
        (metadata,) = FileSystems.match([f"{root}*"])[0].metadata_list
        assert metadata.size_in_bytes == len(TEXT)

    def test_no_unfinished_file_is_left(self, root: str) -> None:
        write(f"{root}a.bin")
        FileSystems.rename([f"{root}a.bin"], [f"{root}b.bin"])
        assert [name for name in names_below(root) if is_internal(split_path(name)[1])] == ["_KEY_FOR_b.bin.json"]
