"""Cutting files at line ends: whatever the data and the size, the parts put together are the file."""

import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from beam_envelope import open_shard
from beam_envelope.transforms import lines
from beam_envelope.transforms.lines import blocks, line_bounds, parse_size, parts, read_header
from tests.running import decrypt, encrypt, fails, listing, read_files, with_manifest, write_files

texts = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from([b"\n", b"\r\n", b"a", b"bcd", b"\xff" * 9]), max_size=60).map(b"".join),
)


def cut(text, part_bytes):
    """Return the parts of a text."""
    stream = io.BytesIO(text)
    bounds = [line_bounds(stream, start, end) for start, end in parts(len(text), part_bytes)]
    return [text[begin:end] for begin, end in bounds]


@given(texts, st.integers(1, 50))
@example(b"", 1)
@example(b"\n", 1)
@example(b"no newline at the end", 5)
@example(b"a\r\nb\r\n", 2)
@example(b"a line longer than a part\nb\n", 4)
def test_parts_put_together_are_the_text_and_each_ends_at_a_lines_end(text, part_bytes):
    found = cut(text, part_bytes)
    assert b"".join(found) == text
    assert all(part.endswith(b"\n") for part in list(filter(None, found))[:-1])
    assert len(found) == max(1, -(-len(text) // part_bytes))


@given(texts, st.integers(1, 50))
def test_a_line_is_in_the_part_in_which_it_starts(text, part_bytes):
    start = 0
    expected = [b"" for _ in parts(len(text), part_bytes)]
    for line in io.BytesIO(text):
        expected[start // part_bytes] += line
        start += len(line)
    assert cut(text, part_bytes) == expected


@given(texts, st.integers(1, 9), st.integers(1, 300))
def test_the_size_of_the_blocks_that_are_searched_makes_no_difference(text, search_bytes, part_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_SEARCH_BYTES", search_bytes)
        small = cut(text, part_bytes)
    assert small == cut(text, part_bytes)


@given(texts, st.integers(0, 4), st.integers(1, 250))
def test_a_header_is_the_first_lines_to_the_byte(text, count, part_start):
    expected = b"".join(io.BytesIO(text).readlines()[:count])
    if len(expected) <= part_start and expected.count(b"\n") == count:
        assert read_header(io.BytesIO(text), count, part_start) == expected
    else:
        with pytest.raises(ValueError, match=f"header of {count} lines does not end in the first {part_start} bytes"):
            read_header(io.BytesIO(text), count, part_start)


def test_a_header_of_over_a_mebibyte_is_refused():
    with pytest.raises(ValueError, match=r"the header of 1 lines does not end in the first 1048576 bytes"):
        read_header(io.BytesIO(b"h" * (1 << 20) + b"\n"), 1, 1 << 30)


@given(st.binary(max_size=100), st.integers(0, 120), st.integers(0, 120), st.integers(1, 9))
def test_blocks_put_together_are_what_lies_between_two_positions(data, start, end, block_bytes):
    found = [bytes(block) for block in blocks(io.BytesIO(data), start, end, block_bytes)]
    assert b"".join(found) == data[start:end]
    assert all(0 < len(block) <= block_bytes for block in found)


class Hesitant(io.BytesIO):
    """A stream that returns less than it was asked for, as raw files and sockets do."""

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[:3])


def test_a_stream_that_returns_little_at_a_time_gives_the_same_parts():
    text = b"one\ntwo two two\n\nthree"
    bounds = [line_bounds(Hesitant(text), start, end) for start, end in parts(len(text), 6)]
    assert bounds == [line_bounds(io.BytesIO(text), start, end) for start, end in parts(len(text), 6)]
    assert b"".join(bytes(block) for block in blocks(Hesitant(text), 2, 11, 5)) == text[2:11]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1, 1),
        (1048576, 1 << 20),
        ("1048576", 1 << 20),
        ("10B", 10),
        ("256MiB", 256 << 20),
        ("256 MiB", 256 << 20),
        ("256m", 256 << 20),
        ("256M", 256 << 20),
        ("1GB", 10**9),
        ("1.5kB", 1500),
        ("2TiB", 2 << 40),
        ("0.1", 1),
    ],
)
def test_sizes_are_numbers_of_bytes_with_or_without_a_unit(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "0", 0, "-1", -1, "MiB", "1 QiB", "1e3", "1,5MB", "nan", "12 M i B", "1\n2"])
def test_what_is_no_size_is_refused_with_examples(text):
    with pytest.raises(ValueError, match=r"is not a size; write a number of bytes, or 256MiB, 1GB and the like"):
        parse_size(text)


# ----------------------------------------------------------------------------------- through the transform

HEADER = b"id,name\n"
ROWS = b"".join(b"%d,%s\n" % (number, b"x" * (number % 60)) for number in range(120))


def opened(folder, key):
    """Return the plaintext of the shards of a folder, by name."""
    shards = {}
    for name in listing(folder):
        if not name.startswith("_"):
            with open_shard(folder / name, key=key) as shard:
                shards[name] = shard.read()
    return shards


def test_a_split_file_becomes_shards_that_end_at_line_ends(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"rows.v1.csv": ROWS})
    results, counters = encrypt(data, tmp_path / "sealed", local_key, split_lines="1000B")
    count = -(-len(ROWS) // 1000)
    names = [f"rows-{number:05}-of-{count:05}.v1.csv" for number in range(count)]
    assert listing(tmp_path / "sealed") == with_manifest(*names)
    shards = opened(tmp_path / "sealed", local_key)
    assert b"".join(shards[name] for name in names) == ROWS
    assert all(shard.endswith(b"\n") for shard in shards.values() if shard)
    assert [result.plaintext_bytes for result in results] == [len(shards[name]) for name in names]
    assert (counters["bytes_plaintext"], counters["files"]) == (len(ROWS), count)


def test_the_header_is_repeated_in_each_part_exactly(tmp_path, local_key):
    # 1000 bytes a part, and one byte more than three parts hold: the last part is shorter than the header.
    text = (HEADER + ROWS)[:3000] + b"\n"
    data = write_files(tmp_path / "data", {"rows.csv": text})
    results, _ = encrypt(data, tmp_path / "sealed", local_key, split_lines=1000, header_lines=1)
    shards = opened(tmp_path / "sealed", local_key)
    assert len(shards) == 4
    bodies = [shard.removeprefix(HEADER) for shard in shards.values()]
    assert [len(shard) - len(body) for shard, body in zip(shards.values(), bodies, strict=True)] == [len(HEADER)] * 4
    assert HEADER + b"".join(bodies) == text
    assert [result.plaintext_bytes for result in results] == [len(shard) for shard in shards.values()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", [b""]),
        (HEADER, [HEADER]),
        (HEADER + b"1,a", [HEADER, HEADER + b"1,a"]),
        (HEADER + b"1,a\r\n2,b\r\n", [HEADER, HEADER + b"1,a\r\n2,b\r\n", HEADER]),
        (
            HEADER + b"1,a line that is longer than a part\n2\n",
            [HEADER, HEADER + b"1,a line that is longer than a part\n"],
        ),
    ],
)
def test_short_and_odd_files_are_split_too(tmp_path, local_key, text, expected):
    data = write_files(tmp_path / "data", {"rows.csv": text})
    encrypt(data, tmp_path / "sealed", local_key, split_lines=len(HEADER), header_lines=1)
    shards = list(opened(tmp_path / "sealed", local_key).values())
    assert shards[: len(expected)] == expected
    assert text == HEADER * text.startswith(HEADER) + b"".join(shard.removeprefix(HEADER) for shard in shards)


def test_a_header_longer_than_a_part_is_refused_and_nothing_is_written_of_it(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"rows.csv": HEADER + ROWS})
    with pytest.raises(ValueError, match=r"the header of 2 lines does not end in the first 9 bytes. Split into larger"):
        encrypt(data, tmp_path / "sealed", local_key, split_lines=9, header_lines=2)
    assert not [name for name in listing(tmp_path / "sealed") if "_TMP_" in name]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.JSON.ZST", "a.parquet"])
def test_a_file_without_lines_is_refused_by_its_name(tmp_path, local_key, name):
    from beam_envelope import EncryptFiles

    data = write_files(tmp_path / "data", {name: b"\x1f\x8b"})
    error = fails(EncryptFiles(str(tmp_path / "sealed"), key=local_key, split_lines="1MiB"), str(data))
    assert error == (
        "ValueError",
        f"split_lines cannot split {data}/{name}: it has no lines. Leave split_lines out, or unpack it first",
    )
    assert listing(tmp_path / "sealed") == []


def test_parts_are_compressed_one_by_one(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"rows.csv": ROWS})
    encrypt(data, tmp_path / "sealed", local_key, split_lines=1000, compression="zstd")
    assert b"".join(opened(tmp_path / "sealed", local_key).values()) == ROWS


def test_decrypted_parts_put_together_are_the_file(tmp_path, local_key):
    data = write_files(tmp_path / "data", {"rows.csv": ROWS})
    encrypt(data, tmp_path / "sealed", local_key, split_lines=500)
    decrypt(tmp_path / "sealed", tmp_path / "opened", local_key)
    assert b"".join(read_files(tmp_path / "opened").values()) == ROWS


def test_header_lines_need_split_lines():
    from beam_envelope import EncryptFiles

    for settings in ({"header_lines": 1}, {"header_lines": -1, "split_lines": "1MiB"}):
        with pytest.raises(ValueError, match="header_lines is a number of lines that split_lines repeats in each part"):
            EncryptFiles("sealed", key="local-kms://k.json", **settings)
