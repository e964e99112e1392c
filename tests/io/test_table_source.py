"""Tables of text and Parquet as batches: types, row groups, and errors that name the place and show no value."""

import bz2
import gzip
import io
import json
import traceback

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_envelope import AlreadyEncryptedError, FormatError, TruncatedError, create_parquet
from beam_envelope.formats.output import LocalOutput
from beam_envelope.io import table_source, table_text
from beam_envelope.io.table_parquet import ParquetSource, PlainParquetWriter
from beam_envelope.io.table_source import Name, TextTypes, batch_rows, cut, parse_name, parse_type
from beam_envelope.io.table_text import open_text
from tests.formats.parquets import PEOPLE
from tests.running import listing

SECRET = "SECRET-4111"


def read_text(path, content, csv="text", columns=None):
    """Write a file of text and read it as a table."""
    path.write_bytes(content)
    with open_text(str(path), len(content), TextTypes.of(csv, columns)) as source:
        tables = list(cut(source.groups(), None, 1 << 26))
        return pa.concat_tables(tables) if tables else source.schema.empty_table()


def refused(path, content, **types):
    """Return what a file of text that cannot be read is refused with, without its path."""
    with pytest.raises(FormatError) as caught:
        read_text(path, content, **types)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.fixture
def small_blocks(monkeypatch):
    """Read 64 bytes at a time."""
    monkeypatch.setattr(table_text, "BATCH_BYTES", 64)


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b.parquet", Name("parquet", ".parquet", None, "a/b.parquet")),
        ("a/b.snappy.PARQUET", Name("parquet", ".parquet", None, "a/b.snappy.PARQUET")),
        ("a/dt=1.csv/b.csv", Name("csv", ".csv", None, "a/dt=1.csv/b.parquet")),
        ("b.tsv.gz", Name("csv", ".tsv", "gzip", "b.parquet")),
        ("s3://x/b.jsonl.bz2", Name("json", ".jsonl", "bz2", "s3://x/b.parquet")),
        ("b.json.zst", Name("json", ".json", "zstd", "b.parquet")),
        ("b.ndjson", Name("json", ".ndjson", None, "b.parquet")),
    ],
)
def test_a_name_says_what_is_in_a_file_and_what_it_becomes(path, name):
    assert parse_name(path) == name


@pytest.mark.parametrize("path", ["a/b", "b.txt", "b.parquet.gz", "csv", "b.gz"])
def test_other_names_are_refused(path):
    with pytest.raises(ValueError, match=r"is no table: the names of those end in \.parquet, .*--format=shard"):
        parse_name(path)


def test_types_are_named_as_arrow_names_them():
    texts = {
        "int64": pa.int64(),
        "timestamp[us]": pa.timestamp("us"),
        "timestamp[us, UTC]": pa.timestamp("us", "UTC"),
        "timestamp[ms, tz=Europe/Berlin]": pa.timestamp("ms", "Europe/Berlin"),
        "decimal128(12, 2)": pa.decimal128(12, 2),
        "decimal256(50,-2)": pa.decimal256(50, -2),
        "decimal(5,0)": pa.decimal128(5, 0),
    }
    assert {text: parse_type(text) for text in texts} == texts
    for text in ("integer", "decimal128(99, 2)", "timestamp[us"):
        with pytest.raises(ValueError, match="is no type; write one of Arrow's"):
            parse_type(text)


# ------------------------------------------------------------------------------------------------------ CSV


def test_csv_is_text_and_nothing_of_it_changes(tmp_path):
    table = read_text(tmp_path / "a.csv", b'zip,note,"a ""b"""\n007,NA,\n,null,"x\ny, z"\n1e5,nan, s \n')
    assert table.to_pylist() == [
        {"zip": "007", "note": "NA", 'a "b"': ""},
        {"zip": "", "note": "null", 'a "b"': "x\ny, z"},
        {"zip": "1e5", "note": "nan", 'a "b"': " s "},
    ]
    assert set(table.schema.types) == {pa.string()}


@pytest.mark.parametrize("ending", [".csv.gz", ".csv.bz2"])
def test_packed_csv_is_unpacked(tmp_path, ending):
    pack = gzip.compress if ending.endswith("gz") else bz2.compress
    assert read_text(tmp_path / f"a{ending}", pack(b"a\n1\n")).to_pylist() == [{"a": "1"}]


def test_tabs_part_the_columns_of_tsv(tmp_path):
    assert read_text(tmp_path / "a.tsv", b"a\tb,c\n1\t2\n").to_pylist() == [{"a": "1", "b,c": "2"}]


def test_blank_lines_are_rows_of_a_single_column_and_nothing_elsewhere(tmp_path):
    assert read_text(tmp_path / "a.csv", b"a\n1\n\n3\n").column("a").to_pylist() == ["1", "", "3"]
    assert read_text(tmp_path / "b.csv", b"a,b\n1,2\n\n3,4\n").num_rows == 2


def test_a_csv_of_a_header_only_has_columns_and_no_rows(tmp_path):
    table = read_text(tmp_path / "a.csv", b"\xef\xbb\xbfa,b\r\n")
    assert (table.num_rows, table.schema.names, table.schema.types) == (0, ["a", "b"], [pa.string()] * 2)


def test_types_are_inferred_or_given_on_demand(tmp_path):
    content = b"id,day,price\n007,2026-01-01,1.10\n"
    assert read_text(tmp_path / "a.csv", content, "inferred").schema.types == [pa.int64(), pa.date32(), pa.float64()]
    columns = {"price": "decimal128(9, 2)", "day": "date32"}
    assert read_text(tmp_path / "a.csv", content, columns=columns).schema.types == [
        pa.string(), pa.date32(), pa.decimal128(9, 2),
    ]  # fmt: skip
    mixed = read_text(tmp_path / "a.csv", content, "inferred", {"id": "string"})
    assert mixed.column("id").to_pylist() == ["007"]


def test_a_value_of_another_type_is_named_by_row_and_column_and_not_shown(tmp_path, small_blocks):
    content = b"id,n\n" + b"1,2\n" * 40 + f"1,{SECRET}\n".encode()
    message = ", row 42: a value of the column 'n' is not of the type int64. Give its type (--column-type n=string, "
    assert refused(tmp_path / "a.csv", content, csv="inferred").startswith(message)
    assert refused(tmp_path / "a.csv", content, columns={"n": "int64"}).startswith(message)
    assert refused(tmp_path / "a.csv", content, columns={"n": "decimal128(9, 2)"}).startswith(", row 42: a value of ")
    assert read_text(tmp_path / "a.csv", content).num_rows == 41


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " is empty: without a header it has no columns. Leave it out"),
        (b"\n\n", " has no header, so no columns. Leave it out"),
        (b"a,b\n1,2\n%s\n", ", row 3: it has 1 columns; the header, row 1, has 2. Mend the file"),
        (b"a,b\n%s,2,3\n", ", row 2: it has 3 columns; the header, row 1, has 2. Mend the file"),
        (b"a,b\n1,%s\xff\n", ", row 2: the column 'b' holds bytes that are not UTF-8. Convert the file to UTF-8 first"),
        (b"a,\xff\n1,%s\n", ": its header is not one of CSV in UTF-8. Mend the file"),
    ],
)
def test_csv_that_cannot_be_read_is_refused(tmp_path, content, message):
    assert refused(tmp_path / "a.csv", content.replace(b"%s", SECRET.encode())) == message


def test_a_row_without_end_is_refused(tmp_path, small_blocks):
    message = refused(tmp_path / "a.csv", b'a,b\n1,"' + SECRET.encode() * 100 + b"\n1,2\n")
    assert message.endswith("a quotation mark is not closed. Mend the file")


def test_a_type_for_no_column_is_refused(tmp_path):
    assert refused(tmp_path / "a.csv", b"a,b\n", columns={"c": "int64"}) == (
        " has no column 'c', whose type was given; there are a, b"
    )
    assert refused(tmp_path / "a.jsonl", b'{"a":1}', columns={"c": "int64"}).startswith(" has no column 'c'")


def test_packed_text_that_was_cut_is_truncated(tmp_path):
    packed = gzip.compress(b"a,b\n" + b"1,2\n" * 9999)
    for name in ("a.csv.gz", "a.jsonl.gz"):
        with pytest.raises(TruncatedError, match="was cut short: its packed end is missing"):
            read_text(tmp_path / name, packed[:-20])


# ----------------------------------------------------------------------------------------------- JSON lines


def test_the_types_of_json_are_those_of_all_its_lines(tmp_path, small_blocks):
    lines = [{"n": None, "x": {"a": 1}}, *[{"n": i, "x": None} for i in range(30)], {"n": 0.5, "x": {"a": 1, "b": "c"}}]
    content = "\n".join(map(json.dumps, lines)).encode()
    table = read_text(tmp_path / "a.jsonl", content)
    assert table.schema.types == [pa.float64(), pa.struct([("a", pa.int64()), ("b", pa.string())])]
    assert table.column("n").to_pylist() == [None, *map(float, range(30)), 0.5]
    assert table.column("x").to_pylist()[-1] == {"a": 1, "b": "c"}


def test_text_of_json_that_looks_like_a_time_stays_text(tmp_path):
    line = {"t": "2026-01-01", "l": ["2026-01-01T00:00:00Z"], "s": {"d": "2026-01-01 10:00:00"}}
    table = read_text(tmp_path / "a.json", json.dumps(line).encode() + b"\n\n")
    assert table.to_pylist() == [line]
    timed = read_text(tmp_path / "a.json", json.dumps(line).encode(), columns={"t": "timestamp[us]"})
    assert timed.schema.field("t").type == pa.timestamp("us")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " has no lines, so no columns are known. Leave it out"),
        (b"\n \n", " has no lines, so no columns are known. Leave it out"),
        (b'{"a":1}\n\n{"a":"%s"}\n', ", line 3: the column 'a' was number and is string here. Mend the file"),
        (b'{"a":1}\n' * 9 + b'{"a":"%s', ", line 10: this is not one JSON object a line. Mend the file"),
        (b'[{"a":"%s"}]\n', ", line 1: this is not one JSON object a line. Mend the file"),
        (b'{"a":1,"a":"%s"}\n', ", line 1: the column 'a' is there twice. Mend the file"),
    ],
)
def test_json_that_cannot_be_read_is_refused(tmp_path, content, message):
    assert refused(tmp_path / "a.jsonl", content.replace(b"%s", SECRET.encode())) == message


def test_two_types_in_distant_lines_are_refused(tmp_path, small_blocks):
    content = b'{"a":1}\n' * 40 + b'{"a":"%s"}\n' % SECRET.encode()
    assert refused(tmp_path / "a.jsonl", content) == (
        ": the column 'a' is int64 in some lines and string in others, which no column of a table can be"
    )


def test_a_type_that_json_does_not_have_is_refused(tmp_path):
    message = refused(tmp_path / "a.jsonl", b'{"a":1}\n{"a":4111.5}\n', columns={"a": "int64"})
    assert message.startswith(", lines 1 to 2: a value is not of the type")
    assert "4111.5" not in message


# -------------------------------------------------------------------------------------------------- Parquet


def write_parquet(path, table, **options):
    """Write a Parquet file; return its path and size."""
    pq.write_table(table, path, **options)
    return str(path), path.stat().st_size


def test_parquet_comes_row_group_by_row_group_with_all_metadata(tmp_path):
    place = write_parquet(tmp_path / "a.parquet", PEOPLE, row_group_size=4, compression="gzip")
    with ParquetSource(*place) as source:
        assert source.schema.equals(pq.read_schema(place[0]), check_metadata=True)
        tables = list(cut(source.groups(), None, 1 << 26))
        assert [table.num_rows for table in tables] == [4, 4, 2]
        assert pa.concat_tables(tables).equals(pq.read_table(place[0]))
        assert set(source.compression()) == {"GZIP"}
        assert source.done_bytes() == place[1]


def test_what_is_no_whole_parquet_is_refused(tmp_path):
    _, size = write_parquet(tmp_path / "a.parquet", PEOPLE)
    for content in (b"", b"a,b\n1,2\n", (tmp_path / "a.parquet").read_bytes()[:-9]):
        (tmp_path / "b.parquet").write_bytes(content)
        with pytest.raises(FormatError, match=r"b\.parquet is no Parquet file that pyarrow can read: "):
            ParquetSource(f"{tmp_path}/b.parquet", len(content))
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    damaged[4:200] = bytes(196)
    (tmp_path / "b.parquet").write_bytes(damaged)
    with ParquetSource(f"{tmp_path}/b.parquet", size) as source, pytest.raises(FormatError, match="pyarrow can read"):
        list(cut(source.groups(), None, 1 << 26))


def test_encrypted_parquet_is_refused_without_its_key_file_too(tmp_path, local_key):
    stream = io.BytesIO()
    with create_parquet(stream, PEOPLE.schema, key=local_key, key_file=io.BytesIO()) as writer:
        writer.write_table(PEOPLE)
    (tmp_path / "a.parquet").write_bytes(stream.getvalue())
    with pytest.raises(AlreadyEncryptedError, match="is encrypted Parquet already"):
        ParquetSource(f"{tmp_path}/a.parquet", len(stream.getvalue()))


def test_years_that_spark_writes_do_not_wrap_around(tmp_path):
    table = pa.table({"t": pa.array([253402214400_000000], pa.timestamp("us"))})  # 9999-12-31
    table = table.replace_schema_metadata({"org.apache.spark.version": "4.0.0"})
    place = write_parquet(tmp_path / "a.parquet", table, use_deprecated_int96_timestamps=True)
    with ParquetSource(*place) as source:
        (read,) = cut(source.groups(), None, 1 << 26)
    assert read.column("t").to_pylist()[0].year == 9999


def test_row_groups_are_cut_by_rows_and_by_size():
    batches = [pa.record_batch({"a": pa.array(range(start, start + 10))}) for start in range(0, 40, 10)]
    groups = [batches[:3], batches[3:]]
    sizes = [table.num_rows for table in cut(groups, None, 1 << 20)]
    assert sizes == [30, 10]
    assert [table.num_rows for table in cut(groups, 16, 1 << 20)] == [16, 16, 8]
    assert [table.num_rows for table in cut(groups, None, 100)] == [20, 10, 10]
    assert pa.concat_tables(cut(groups, 7, 1 << 20)).column("a").to_pylist() == list(range(40))


def test_a_dictionary_counts_once_though_each_batch_holds_it():
    values = pa.array([f"{number}" * 100 for number in range(100)])
    batch = pa.record_batch({"a": pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), values)})
    assert [table.num_rows for table in cut([[batch] * 50], None, 10_000)] == [100]


def test_batches_of_wide_rows_are_short():
    assert batch_rows(0, 0) == 1
    assert batch_rows(1 << 30, 1 << 30) == 65536
    assert batch_rows(1 << 30, 1 << 10) == table_source.BATCH_BYTES >> 20


# -------------------------------------------------------------------------------------------------- writing


def test_a_plain_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "a.parquet"
    with PlainParquetWriter(LocalOutput(path), PEOPLE.schema, {}) as writer:
        writer.write_table(PEOPLE)
        assert "a.parquet" not in listing(tmp_path)
    assert pq.read_table(path).equals(PEOPLE)
    assert (listing(tmp_path), writer.num_rows) == (["a.parquet"], 10)


def test_a_plain_file_that_fails_or_is_forgotten_leaves_nothing(tmp_path):
    def fail(_table):
        raise ZeroDivisionError

    writer = PlainParquetWriter(LocalOutput(tmp_path / "a"), PEOPLE.schema, {})
    writer.write_table(PEOPLE)
    with pytest.raises(ZeroDivisionError), writer:
        fail(PEOPLE)
    writer = PlainParquetWriter(LocalOutput(tmp_path / "a"), PEOPLE.schema, {})
    writer.write_table(PEOPLE)
    del writer
    assert listing(tmp_path) == []
