"""WriteEncryptedParquet and its readers, in memory and on a local disk."""

import datetime as dt
import decimal
import pickle
import re
import typing
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.test_stream import TestStream as Stream
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import FixedWindows, TimestampedValue

from beam_envelope import (
    ANY_CONTEXT,
    ReadAllEncryptedParquet,
    ReadAllEncryptedParquetBatched,
    ReadEncryptedParquet,
    ReadEncryptedParquetBatched,
    WriteEncryptedParquet,
)
from beam_envelope.errors import EnvelopeError
from beam_envelope.formats.keyfile import KeyFile
from beam_envelope.io import parquet_write
from beam_envelope.io.parquet_bundle import EncryptedParquetFile
from beam_envelope.io.parquet_names import named_alone, named_together, publish
from beam_envelope.io.parquet_read import find_parquet, open_parquet_at
from beam_envelope.io.parquet_rows import TableMaker
from beam_envelope.keys.cache import DataKeyPolicy
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.testing import find_plaintext
from tests.io.parquet_helpers import ROWS, SCHEMA, all_rows, collect, error_of, pipeline, rows_of, write
from tests.running import listing, with_manifest

CANARIES = (b"CANARY-NAME", b"CANARY-SSN")


@pytest.fixture
def pii_key(local_key):
    """A second key of the same keyring."""
    other = LocalKms(local_key.path, "pii")
    generate_local_key(other)
    return other


@pytest.fixture
def stranger(tmp_path):
    """A key of another keyring."""
    key = LocalKms(tmp_path / "elsewhere" / "keyring.json")
    generate_local_key(key)
    return key


class Address(typing.NamedTuple):
    street: str
    zip: typing.Optional[int]  # noqa: UP045  # as users write it


class Person(typing.NamedTuple):
    id: int
    name: str
    score: typing.Optional[float]  # noqa: UP045
    tags: typing.Sequence[str]
    ages: typing.Mapping[str, int]
    address: Address


PEOPLE = [
    Person(n, f"name-{n}", None if n % 2 else n / 2, [f"t{n}", "x"], {"a": n}, Address(f"street {n}", n or None))
    for n in range(20)
]


def test_dicts_come_back_and_are_nowhere_in_clear(tmp_path, local_key, pii_key):
    (file,) = write(tmp_path / "out" / "part", local_key, columns={"ssn": pii_key}, context={"dataset": "d"})
    assert listing(tmp_path / "out") == with_manifest("part-00000-of-00001.parquet")
    assert list((tmp_path / "out").glob("_TMP_*")) == []
    assert file.path == f"{tmp_path}/out/part-00000-of-00001.parquet"
    assert file.key_file == f"{tmp_path}/out/_KEY_FOR_part-00000-of-00001.parquet.json"
    assert (file.rows, file.stored_bytes, file.window) == (1000, Path(file.path).stat().st_size, "")
    key_file = KeyFile.from_bytes(Path(file.key_file).read_bytes(), "")
    assert (key_file.shard_id.hex, key_file.name) == (file.shard_id, ""), "a file that is renamed binds no name"
    read = ReadEncryptedParquet(f"{tmp_path}/out/*", key=[local_key, pii_key], context={"dataset": "d"})
    assert sorted(collect(read), key=lambda row: row["id"]) == ROWS
    assert find_plaintext([tmp_path], *CANARIES) == []
    assert Path(file.path).read_bytes()[:4] == b"PARE"


def test_rows_with_a_schema_need_no_other(tmp_path, local_key):
    write(tmp_path / "part", local_key, PEOPLE, None)
    with open_parquet_at(f"{tmp_path}/part-00000-of-00001.parquet", local_key, None) as reader:
        assert reader.schema.names == list(Person._fields)
        assert not reader.schema.field("id").nullable
        assert reader.schema.field("score").nullable
        assert not reader.schema.metadata, "Beam's schema id is random"
    rows = collect(ReadEncryptedParquet(f"{tmp_path}/part*", key=local_key))
    assert rows[3] == {
        "id": 3, "name": "name-3", "score": None, "tags": ["t3", "x"], "ages": [("a", 3)],
        "address": {"street": "street 3", "zip": 3},
    }  # fmt: skip


def test_rows_come_back_as_rows_and_go_on_as_such(tmp_path, local_key):
    write(tmp_path / "a", local_key, PEOPLE, None)
    read = ReadEncryptedParquet(f"{tmp_path}/a*", key=local_key, as_rows=True)
    (first, *_others) = rows = sorted(collect(read), key=lambda row: row.id)
    assert len(rows) == 20
    assert (first.id, first.tags, first.ages, first.address.street, first.address.zip) == (
        0, ["t0", "x"], {"a": 0}, "street 0", None
    )  # fmt: skip
    with pipeline() as p:
        rows = p | ReadEncryptedParquet(f"{tmp_path}/a*", key=local_key, as_rows=True)
        _ = rows | beam.Reshuffle() | WriteEncryptedParquet(f"{tmp_path}/b", key=local_key)
        sums = rows | beam.GroupBy().aggregate_field("id", sum, "total") | beam.Map(lambda row: row.total)
        assert_that(sums, equal_to([190]))
    assert all_rows(f"{tmp_path}/a*", local_key) == all_rows(f"{tmp_path}/b*", local_key)


def test_beam_rows_with_a_schema_given(tmp_path, local_key):
    rows = [beam.Row(**row) for row in ROWS]
    write(tmp_path / "part", local_key, rows)
    assert all_rows(f"{tmp_path}/part*", local_key) == ROWS


TABLE = pa.table(
    {
        "id": pa.array(range(300)),
        "when": pa.array(
            [dt.datetime(2026, 1, 1, 0, 0, n % 60, tzinfo=dt.timezone.utc) for n in range(300)],
            pa.timestamp("us", "UTC"),
        ),
        "price": pa.array([decimal.Decimal(n) / 4 for n in range(300)], pa.decimal128(10, 2)),
        "kind": pa.array([f"kind-{n % 3}" for n in range(300)]).dictionary_encode(),
        "list": pa.array([[n, None] if n % 3 else None for n in range(300)]),
        "map": pa.array([[("k", n)] for n in range(300)], pa.map_(pa.string(), pa.int32())),
        "struct": pa.array([{"a": {"b": f"CANARY-NAME-{n}"}, "c": [n]} for n in range(300)]),
        "small": pa.array([n % 100 for n in range(300)], pa.uint8()),
        "blob": pa.array([bytes([n % 256]) * 3 for n in range(300)]),
    }
)


@pytest.mark.parametrize("schema", [None, TABLE.schema])
@pytest.mark.parametrize("num_shards", [0, 2])
def test_tables_of_all_types_come_back(tmp_path, local_key, pii_key, schema, num_shards):
    batches = TABLE.to_batches(max_chunksize=40)
    tables = [batch if number % 2 else pa.Table.from_batches([batch]) for number, batch in enumerate(batches)]
    columns = {"struct.a": pii_key, "list": pii_key}
    files = write(tmp_path / "part", local_key, tables, schema, columns=columns, num_shards=num_shards)
    assert len(files) == (num_shards or 1)
    read = ReadEncryptedParquetBatched(f"{tmp_path}/part*", key=[local_key, pii_key])
    table = pa.concat_tables(collect(read)).sort_by("id")
    assert table.schema.equals(TABLE.schema)
    assert table.to_pylist() == TABLE.to_pylist()
    rows = collect(ReadEncryptedParquet(f"{tmp_path}/part*", key=[local_key, pii_key]))
    assert sorted(rows, key=lambda row: row["id"]) == TABLE.to_pylist()
    assert find_plaintext([tmp_path], b"CANARY-NAME") == []


def test_rows_of_all_types_come_back(tmp_path, local_key):
    write(tmp_path / "part", local_key, TABLE.to_pylist(), TABLE.schema)
    assert all_rows(f"{tmp_path}/part*", local_key) == TABLE.to_pylist()
    rows = collect(ReadEncryptedParquet(f"{tmp_path}/part*", key=local_key, as_rows=True), beam.Reshuffle())
    (third,) = [row for row in rows if row.id == 4]
    assert (third.price, third.when.second, third.kind, third.list) == (decimal.Decimal(1), 4, "kind-1", [4, None])
    assert (third.map, third.struct.a.b, third.struct.c, third.small) == ({"k": 4}, "CANARY-NAME-4", [4], 4)


def test_maps_are_written_from_dicts(tmp_path, local_key):
    schema = pa.schema([("id", pa.int64()), ("m", pa.map_(pa.string(), pa.struct([("x", pa.int64())])))])
    write(tmp_path / "part", local_key, [{"id": 1, "m": {"k": {"x": 1}}}, {"id": 2}], schema)
    assert all_rows(f"{tmp_path}/part*", local_key) == [{"id": 1, "m": [("k", {"x": 1})]}, {"id": 2, "m": None}]


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ({"id": "CANARY-NAME-1"}, "a value of the column 'id' does not fit its type, int64"),
        ({"name": "CANARY-NAME-1"}, "a row has no value in the column 'id', which its schema does not allow"),
        ("CANARY-NAME-1", "elements are dicts, rows with a schema, pyarrow.Tables or RecordBatches, not str"),
        (("CANARY-NAME-1", 1), "elements are dicts, rows with a schema, pyarrow.Tables or RecordBatches, not tuple"),
        (pa.table({"id": ["CANARY-NAME-1"]}), "They differ in: id, name, ssn"),
        (beam.Row(name="CANARY-NAME-1"), "'id'"),
    ],
)
def test_what_does_not_fit_fails_by_column_and_without_its_value(tmp_path, local_key, element, message):
    with pytest.raises(Exception, match=re.escape(message)) as caught:
        write(tmp_path / "out" / "part", local_key, [element])
    assert "CANARY" not in error_of(caught)
    assert [name for name in listing(tmp_path / "out") if "_TMP_" not in name] == []


def test_rows_and_tables_keep_their_order():
    maker = TableMaker(SCHEMA)
    elements = [
        ROWS[0],
        pa.Table.from_pylist(ROWS[1:3], SCHEMA),
        ROWS[3],
        pa.RecordBatch.from_pylist(ROWS[4:5], SCHEMA),
    ]
    tables = [table for element in elements for table in maker.add(element)]
    assert pa.concat_tables([*tables, *maker.flush()]).to_pylist() == ROWS[:5]


def test_large_rows_are_not_gathered_for_long():
    maker = TableMaker(SCHEMA)
    sizes = [table.num_rows for n in range(200) for table in maker.add({"id": n, "name": "x" * 100_000})]
    assert sizes[0] == 64
    assert set(sizes[1:]) == {10}


def test_dicts_without_a_schema_fail(tmp_path, local_key):
    with pytest.raises(Exception, match=r"elements of type dict have no schema that is known here: pass schema="):
        write(tmp_path / "part", local_key, schema=None)


def test_what_a_dict_has_beyond_the_schema_is_left_out_and_what_it_lacks_is_null(tmp_path, local_key):
    write(tmp_path / "part", local_key, [{"id": 1, "more": "CANARY-NAME"}])
    assert all_rows(f"{tmp_path}/part*", local_key) == [{"id": 1, "name": None, "ssn": None}]


def groups_of(path, key):
    with open_parquet_at(path, key, None) as reader:
        return [reader.read_row_group(number).num_rows for number in range(reader.num_row_groups)]


def test_row_groups_and_files_have_at_most_so_many_rows(tmp_path, local_key):
    files = write(tmp_path / "part", local_key, row_group_rows=130, max_rows_per_file=300)
    assert [file.rows for file in sorted(files, key=lambda file: -file.rows)] == [300, 300, 300, 100]
    assert listing(tmp_path)[-4:] == [f"part-{number:05}-of-00004.parquet" for number in range(4)]
    groups = sorted(groups_of(file.path, local_key) for file in files)
    assert groups == [[100], [130, 130, 40], [130, 130, 40], [130, 130, 40]]
    assert all_rows(f"{tmp_path}/part*", local_key) == ROWS


def test_limits_cut_tables_too(tmp_path, local_key):
    files = write(tmp_path / "part", local_key, [TABLE], None, row_group_rows=70, max_rows_per_file=200)
    assert sorted(groups_of(file.path, local_key) for file in files) == [[70, 30], [70, 70, 60]]
    rows = [row["id"] for rows in rows_of(f"{tmp_path}/part*", local_key).values() for row in rows]
    assert sorted(rows) == list(range(300))


def test_row_groups_have_about_so_many_bytes(tmp_path, local_key):
    table = pa.table({"id": range(1000), "text": ["x" * 92] * 1000})  # about 104 bytes a row
    (file,) = write(tmp_path / "part", local_key, [table], None, row_group_bytes=21_000)
    groups = groups_of(file.path, local_key)
    assert sum(groups) == 1000
    assert all(180 <= rows <= 220 for rows in groups[:-1])


def test_a_row_that_is_larger_than_a_row_group_is_one(tmp_path, local_key):
    table = pa.table({"id": range(3), "text": ["x" * 1000] * 3})
    (file,) = write(tmp_path / "part", local_key, [table], None, row_group_bytes=10)
    assert groups_of(file.path, local_key) == [1, 1, 1]


def test_files_end_when_they_have_so_many_bytes(tmp_path, local_key):
    table = pa.table({"id": range(4000), "text": [f"{number:01000}" for number in range(4000)]})
    options = {"row_group_rows": 500, "compression": "none", "use_dictionary": False}
    files = write(tmp_path / "part", local_key, [table], None, max_bytes_per_file=900_000, **options)
    assert [file.rows for file in files] == [1000] * 4
    assert all(1_000_000 < file.stored_bytes < 1_100_000 for file in files)


@pytest.mark.parametrize("name", ["row_group_rows", "row_group_bytes", "max_rows_per_file", "max_bytes_per_file"])
def test_limits_are_above_0(local_key, name):
    with pytest.raises(ValueError, match=f"{name} is above 0, not 0"):
        WriteEncryptedParquet("part", key=local_key, **{name: 0})


def test_files_of_different_windows_never_mix(tmp_path, local_key):
    with pipeline() as p:
        rows = p | beam.Create(ROWS[:30]) | beam.Map(lambda row: TimestampedValue(row, row["id"] % 3 * 60))
        files = rows | beam.WindowInto(FixedWindows(60)) | WriteEncryptedParquet(f"{tmp_path}/p", SCHEMA, key=local_key)
        windows = [f"19700101T000{n}00Z/19700101T000{n + 1}00Z" for n in range(3)]
        assert_that(files | beam.Map(lambda file: (file.window, file.rows)), equal_to([(w, 10) for w in windows]))
    found = rows_of(f"{tmp_path}/p*", local_key)
    assert sorted(found) == [f"p-19700101T000{n}00Z-19700101T000{n + 1}00Z-00000-of-00001.parquet" for n in range(3)]
    assert [{row["id"] % 3 for row in found[name]} for name in sorted(found)] == [{0}, {1}, {2}]
    assert all_rows(f"{tmp_path}/p*", local_key) == ROWS[:30]


def test_grouped_files_of_windows_never_mix_either(tmp_path, local_key):
    with pipeline() as p:
        rows = p | beam.Create(ROWS[:30]) | beam.Map(lambda row: TimestampedValue(row, row["id"] % 3 * 60))
        windowed = rows | beam.WindowInto(FixedWindows(60))
        _ = windowed | WriteEncryptedParquet(f"{tmp_path}/p", SCHEMA, key=local_key, num_shards=2)
    found = rows_of(f"{tmp_path}/p*", local_key)
    assert len(found) == 6
    assert [len({row["id"] % 3 for row in rows}) for rows in found.values()] == [1] * 6
    assert all_rows(f"{tmp_path}/p*", local_key) == ROWS[:30]


def test_unbounded_input_is_written_by_windows(tmp_path, local_key):
    stream = Stream()
    for number in range(3):
        rows = ROWS[number * 10 : number * 10 + 10]
        stream = stream.add_elements([TimestampedValue(row, row["id"]) for row in rows[:5]])
        stream = stream.add_elements([TimestampedValue(row, row["id"]) for row in rows[5:]])
        stream = stream.advance_watermark_to((number + 1) * 10)
    with pipeline("--streaming", runner="BundleBasedDirectRunner") as p:
        elements = p | stream.advance_watermark_to_infinity() | beam.WindowInto(FixedWindows(10))
        _ = elements | WriteEncryptedParquet(f"{tmp_path}/part", SCHEMA, key=local_key)
    found = rows_of(f"{tmp_path}/part*", local_key)
    assert len(found) == 3
    assert sorted(sorted(row["id"] for row in rows) for rows in found.values()) == [
        list(range(start, start + 10)) for start in (0, 10, 20)
    ]
    assert all(name.startswith("part-19700101T0000") for name in found)
    assert find_plaintext([tmp_path], *CANARIES) == []


def test_num_shards_is_how_many_files_there_are(tmp_path, local_key):
    files = write(tmp_path / "part", local_key, num_shards=3)
    assert [Path(file.path).name for file in files] == [f"part-{number:05}-of-00003.parquet" for number in range(3)]
    assert sorted(file.rows for file in files) == [333, 333, 334]
    assert all_rows(f"{tmp_path}/part*", local_key) == ROWS
    few = write(tmp_path / "few", local_key, ROWS[:1], num_shards=3)
    assert sorted(file.rows for file in few) == [0, 0, 1], "empty files make up the number, as with Beam"
    assert all_rows(f"{tmp_path}/few*", local_key) == ROWS[:1]


def test_no_rows_are_one_file_that_says_so(tmp_path, local_key):
    (file,) = write(tmp_path / "part", local_key, [])
    assert file.rows == 0
    with open_parquet_at(file.path, local_key, None) as reader:
        assert reader.read().schema.equals(SCHEMA)
    assert collect(ReadEncryptedParquet(f"{tmp_path}/part*", key=local_key)) == []
    assert write(tmp_path / "tables", local_key, [], None) == [], "nobody knows a schema"


def test_names_follow_the_template(tmp_path, local_key):
    write(tmp_path / "a", local_key, num_shards=2, shard_name_template="_SS-NN", file_name_suffix=".pq")
    assert sorted(rows_of(f"{tmp_path}/a*", local_key)) == ["a_00-02.pq", "a_01-02.pq"]
    write(tmp_path / "one", local_key, shard_name_template="")
    assert sorted(rows_of(f"{tmp_path}/one*", local_key)) == ["one.parquet"]


def test_a_prefix_is_in_a_folder_of_a_partition(tmp_path, local_key):
    files = write(f"{tmp_path}/out/day=2026-01-01/country=x/", local_key)
    assert [file.path for file in files] == [f"{tmp_path}/out/day=2026-01-01/country=x/part-00000-of-00001.parquet"]
    assert all_rows(f"{tmp_path}/out", local_key) == ROWS, "a folder stands for all below it"
    assert collect(ReadEncryptedParquet(f"{tmp_path}/out/day=*/**", key=local_key)) != []


def test_a_job_that_runs_again_replaces_its_files(tmp_path, local_key):
    write(tmp_path / "part", local_key, ROWS[:10])
    write(tmp_path / "part", local_key, ROWS[5:])
    assert listing(tmp_path) == sorted([*with_manifest("part-00000-of-00001.parquet"), "keyring/keyring.json"])
    assert all_rows(f"{tmp_path}/part*", local_key) == ROWS[5:]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prefix": "envelope+file:///x"}, ValueError, "leave envelope\\+ out of"),
        ({"prefix": 3}, TypeError, "prefix is a path, not a int"),
        ({"prefix": "out/_TMP_x"}, ValueError, "choose another"),
        ({"num_shards": -1}, ValueError, "num_shards is 0 or above, not -1"),
        ({"shard_name_template": "-N"}, ValueError, "has an S, for the file's number; '-N' has none"),
        ({"shard_name_template": "", "num_shards": 2}, ValueError, "means one file"),
        ({"shard_name_template": "", "max_rows_per_file": 2}, ValueError, "means one file"),
        ({"columns": {"nmae": "KEY"}}, ValueError, "there is no column 'nmae'; there are id, name, ssn"),
        ({"encryption_properties": 1}, ValueError, "encryption_properties does not go with encryption"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
        ({"compression": "no such"}, ValueError, "no such"),
    ],
)
def test_wrong_arguments_are_refused_when_the_pipeline_is_built(local_key, arguments, error, message):
    arguments = {"prefix": "part", "schema": SCHEMA, **arguments}
    if "columns" in arguments:
        arguments["columns"] = dict.fromkeys(arguments["columns"], local_key)
    with pytest.raises(error, match=message):
        WriteEncryptedParquet(key=local_key, **arguments)


def test_an_unknown_column_of_rows_is_refused_when_the_pipeline_is_built(tmp_path, local_key):
    with pytest.raises(ValueError, match="there is no column 'nmae'"):
        write(tmp_path / "part", local_key, PEOPLE, None, columns={"nmae": local_key})


def test_readers_choose_columns_and_rows(tmp_path, local_key):
    write(tmp_path / "part", local_key, row_group_rows=100)
    pattern = f"{tmp_path}/part*"
    rows = collect(
        ReadEncryptedParquet(pattern, key=local_key, columns=["id"], filter=pc.field("name") >= ROWS[990]["name"])
    )
    assert sorted(row["id"] for row in rows) == list(range(990, 1000))
    assert {*map(len, rows)} == {1}
    tables = collect(ReadEncryptedParquetBatched(pattern, key=local_key, filter=[("id", "<", 150)], batch_rows=60))
    assert sum(table.num_rows for table in tables) == 150
    assert max(table.num_rows for table in tables) <= 60
    rows = collect(ReadEncryptedParquet(pattern, key=local_key, columns=["id", "name"], as_rows=True))
    assert sorted(rows[0].as_dict()) == ["id", "name"]


def test_paths_of_a_pcollection_are_read_with_their_names(tmp_path, local_key):
    files = write(tmp_path / "part", local_key, num_shards=2)
    paths = beam.Create([file.path for file in files])
    pairs = collect(paths, ReadAllEncryptedParquet(key=local_key, with_filename=True))
    assert sorted({path for path, _ in pairs}) == [file.path for file in files]
    assert sorted((row for _, row in pairs), key=lambda row: row["id"]) == ROWS
    tables = collect(beam.Create([f"{tmp_path}/part*"]), ReadAllEncryptedParquetBatched(key=local_key))
    assert sum(table.num_rows for table in tables) == 1000
    rows = collect(
        beam.Create([f"{tmp_path}/part*"]), ReadAllEncryptedParquet(key=local_key, as_rows=True, schema=SCHEMA)
    )
    assert sorted(row.id for row in rows) == list(range(1000))
    with pytest.raises(ValueError, match="as_rows needs schema="):
        ReadAllEncryptedParquet(key=local_key, as_rows=True)


def test_what_the_writer_says_can_be_read_at_once(tmp_path, local_key):
    with pipeline() as p:
        files = p | beam.Create(ROWS) | WriteEncryptedParquet(f"{tmp_path}/part", SCHEMA, key=local_key)
        rows = files | beam.Map(lambda file: file.path) | ReadAllEncryptedParquet(key=local_key)
        assert_that(rows, equal_to(ROWS))


def test_internal_files_are_passed_over(tmp_path, local_key):
    write(tmp_path / "out" / "part", local_key)
    for name in ("_TMP_x", "_TMP_run/part-0.parquet", "_MANIFEST.json", "_KEY_FOR_x.json"):
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"PARE, perhaps")
    for pattern in (f"{tmp_path}/out", f"{tmp_path}/out/", f"{tmp_path}/out/**"):
        assert find_parquet(pattern) == (f"{tmp_path}/out/**", [f"{tmp_path}/out/part-00000-of-00001.parquet"])
    with pytest.raises(FileNotFoundError, match="only key files and unfinished files match"):
        find_parquet(f"{tmp_path}/out/_*")


def test_a_pattern_that_matches_nothing_is_refused(tmp_path, local_key):
    for read in (ReadEncryptedParquet, ReadEncryptedParquetBatched):
        with pytest.raises(FileNotFoundError, match="no file matches"):
            read(f"{tmp_path}/nothing*", key=local_key)
    with pytest.raises(Exception, match="no file matches"):
        collect(beam.Create([f"{tmp_path}/nothing*"]), ReadAllEncryptedParquet(key=local_key))
    assert collect(ReadEncryptedParquet(f"{tmp_path}/nothing*", key=local_key, validate=False)) == []
    with pytest.raises(ValueError, match="as_rows needs schema=, since no file matches"):
        ReadEncryptedParquet(f"{tmp_path}/nothing*", key=local_key, validate=False, as_rows=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pattern": "envelope+file:///x"}, ValueError, "leave envelope\\+ out of"),
        ({"pattern": ["x"]}, TypeError, "pattern is a path, pattern or folder, not a list"),
        ({"columns": "id"}, TypeError, "columns is a list of names"),
        ({"on_denied": "ignore"}, ValueError, "on_denied is"),
        ({"batch_rows": 0}, ValueError, "batch_rows is above 0, not 0"),
    ],
)
@pytest.mark.parametrize("read", [ReadEncryptedParquet, ReadEncryptedParquetBatched])
def test_wrong_arguments_of_a_reader_are_refused(tmp_path, local_key, read, arguments, error, message):
    with pytest.raises(error, match=message):
        read(**{"pattern": str(tmp_path), "key": local_key, **arguments})


def test_columns_that_cannot_be_fields_are_named(tmp_path, local_key):
    write(tmp_path / "part", local_key, [pa.table({"a b": [1]})], None)
    with pytest.raises(ValueError, match="the column 'a b' cannot be a field of a row"):
        ReadEncryptedParquet(f"{tmp_path}/part*", key=local_key, as_rows=True)


def test_readers_of_different_rights_see_different_columns(tmp_path, local_key, pii_key):
    write(tmp_path / "part", local_key, columns={"id": pii_key, "ssn": pii_key})
    pattern = f"{tmp_path}/part*"

    def read(key, **settings):
        return sorted(collect(ReadEncryptedParquet(pattern, key=key, **settings)), key=lambda row: row["name"])

    assert read([local_key, pii_key]) == ROWS
    assert read(local_key, on_denied="null") == [{"id": None, "name": row["name"], "ssn": None} for row in ROWS]
    assert read(local_key, on_denied="drop") == [{"name": row["name"]} for row in ROWS]
    assert read(local_key, columns=["name"]) == [{"name": row["name"]} for row in ROWS]
    rows = collect(ReadEncryptedParquet(pattern, key=local_key, on_denied="null", as_rows=True), beam.Reshuffle())
    assert {row.ssn for row in rows} == {None}
    for settings in ({}, {"columns": ["ssn"]}, {"columns": ["name"], "filter": [("ssn", "=", "x")]}):
        with pytest.raises(Exception, match=r"may not open these columns of .*part-00000-of-00001\.parquet"):
            read(local_key, **settings)


def test_the_wrong_key_or_context_fails_by_name(tmp_path, local_key, stranger):
    write(tmp_path / "part", local_key, context={"dataset": "d"})
    for key, context, error in (
        (stranger, {"dataset": "d"}, "WrongKeyError"),
        (local_key, {"dataset": "x"}, "ContextMismatchError"),
        (local_key, None, "ContextMismatchError"),
    ):
        for manifest, what in (("ignore", r"part-00000-of-00001\.parquet"), ("use", r"section 1 of .*_MANIFEST\.json")):
            with pytest.raises(Exception, match=what) as caught:
                collect(ReadEncryptedParquet(f"{tmp_path}/part*", key=key, context=context, manifest=manifest))
            assert error in error_of(caught)
    assert len(collect(ReadEncryptedParquet(f"{tmp_path}/part*", key=local_key, context=ANY_CONTEXT))) == 1000


def test_files_that_were_put_in_the_place_of_others_fail(tmp_path, local_key):
    first, second = write(tmp_path / "part", local_key, num_shards=2)
    one, other = Path(first.path).read_bytes(), Path(second.path).read_bytes()

    def outcome():
        with pytest.raises(Exception, match=r"part-0000\d-of-00002\.parquet") as caught:
            collect(ReadEncryptedParquet(f"{tmp_path}/part*", key=local_key))
        return error_of(caught)

    Path(first.path).write_bytes(other)
    Path(second.path).write_bytes(one)
    assert "WrongKeyError" in outcome(), "two files were swapped"
    Path(second.path).write_bytes(other)
    pq.write_table(pa.Table.from_pylist(ROWS, SCHEMA), first.path)
    assert "NotEncryptedError" in outcome(), "plain Parquet was put in the place"
    Path(first.path).write_bytes(one[:-100])
    assert "TruncatedError" in outcome()
    Path(first.path).write_bytes(one[:300] + bytes([one[300] ^ 1]) + one[301:])
    assert "TamperedError" in outcome()
    Path(first.path).write_bytes(one)
    Path(first.key_file).unlink()
    assert "KeyFileMissingError" in outcome()
    (tmp_path / "part-plain.parquet").write_bytes(b"PAR1 or anything")
    Path(first.path).unlink()
    with pytest.raises(Exception, match=r"part-plain\.parquet"):
        collect(ReadEncryptedParquet(f"{tmp_path}/part-p*", key=local_key))


def test_transforms_travel_without_key_material(tmp_path, local_key, pii_key):
    write(tmp_path / "part", local_key, context={"tenant": "CANARY-TENANT"})
    secrets = [piece.split('"')[0] for piece in Path(local_key.path).read_text().split('"key": "')[1:]]
    assert len(secrets) == 2
    settings = {"key": local_key, "context": {"tenant": "CANARY-TENANT"}}
    writer = WriteEncryptedParquet(f"{tmp_path}/x", SCHEMA, **settings, columns={"ssn": pii_key}, num_shards=2)
    readers = [
        ReadEncryptedParquet(f"{tmp_path}/part*", **settings, filter=pc.field("id") > 3, as_rows=True),
        ReadEncryptedParquetBatched(f"{tmp_path}/part*", **settings),
        ReadAllEncryptedParquet(**settings),
        ReadAllEncryptedParquetBatched(**settings),
    ]
    for transform in (writer, *readers):
        assert not any(secret.encode() in pickle.dumps(transform) for secret in secrets)
        shown = transform.display_data()
        assert shown["key"] == str(local_key)
        assert shown["context"] == "tenant"
        assert "CANARY" not in repr(shown)
    for kind in (parquet_write._WriteDoFn, parquet_write._SealDoFn):
        dofn = kind(writer._settings, 2 if kind is parquet_write._SealDoFn else "folder/")
        dofn.start_bundle()
        copy = pickle.loads(pickle.dumps(dofn))
        assert {copy.__dict__.get(name) for name in ("_bundle", "_keys", "_makers", "_pending")} == {None}
    p = pipeline()
    _ = p | beam.Create(ROWS[:1]) | writer
    _ = p | readers[0]
    graph = p.to_runner_api().SerializeToString()
    assert not any(secret.encode() in graph for secret in secrets)


def test_labels_and_types_stay(tmp_path, local_key):
    p = pipeline()
    rows = p | beam.Create([])
    files = rows | "Out" >> WriteEncryptedParquet(f"{tmp_path}/x", SCHEMA, key=local_key, num_shards=2)
    assert files.element_type is EncryptedParquetFile
    names = {node.full_label for node in p._root_transform().parts[-1].parts}
    assert names == {
        f"Out/{name}"
        for name in (
            "Seal", "Group", "Write", "Start", "No file", "Rewindow", "A file", "Flatten", "Gather", "Name", "Spread",
            "Move", "Moved", "All moved", "Clean", "Manifest",
        )
    }  # fmt: skip
    write(tmp_path / "part", local_key, PEOPLE, None)
    assert (p | ReadEncryptedParquet(f"{tmp_path}/part*", key=local_key)).element_type == beam.typehints.Dict[
        str, typing.Any
    ]
    batched = p | ReadEncryptedParquetBatched(f"{tmp_path}/part*", key=local_key, with_filename=True)
    assert batched.element_type == beam.typehints.Tuple[str, pa.Table]
    row_type = (p | "R" >> ReadEncryptedParquet(f"{tmp_path}/part*", key=local_key, as_rows=True)).element_type
    assert [name for name, _ in row_type._fields] == list(Person._fields)


def test_the_same_rows_twice_are_the_names_of_one_order():
    files = [EncryptedParquetFile(f"t/{name}", "", "", 1, 1, window) for name, window in ("ba", "ab", "ca")]
    named = [(file.path, final) for file, final in named_together(reversed(files), "p", "-SS-of-NN", ".x")]
    assert sorted(named) == [("t/a", "p-b-00-of-01.x"), ("t/b", "p-a-00-of-02.x"), ("t/c", "p-a-01-of-02.x")]


def test_a_file_of_an_unbounded_input_has_the_same_name_at_each_try():
    file = EncryptedParquetFile("t/x", "", "ab12", 1, 1, "a/b")
    assert named_alone(file, "out/p", ".x") == named_alone(file, "out/p", ".x") == (file, "out/p-a-b-ab12.x")


def test_a_move_that_is_tried_again_ends_well_and_a_lost_file_is_an_error(tmp_path, local_key):
    (file,) = write(tmp_path / "part", local_key, ROWS[:5])
    final = f"{tmp_path}/moved.parquet"
    moved = publish(file, final)
    assert publish(file, final) == moved, "done already"
    assert listing(tmp_path) == sorted([*with_manifest("moved.parquet"), "keyring/keyring.json"])

    def is_refused():
        with pytest.raises(EnvelopeError, match=r"moved\.parquet is not there after it was written and moved from"):
            publish(file, final)
        return True

    whole, key_file = Path(moved.path).read_bytes(), Path(moved.key_file).read_bytes()
    Path(moved.path).write_bytes(whole[:-1])
    assert is_refused(), "it was cut"
    Path(moved.path).write_bytes(whole)
    publish(file, final)
    Path(moved.key_file).unlink()
    assert is_refused(), "its key file is away"
    (other,) = write(tmp_path / "other", local_key, ROWS[:5])
    Path(moved.key_file).write_bytes(Path(other.key_file).read_bytes())
    assert is_refused(), "it is another file"
    Path(moved.key_file).write_bytes(key_file)
    Path(moved.path).unlink()
    assert is_refused(), "it is away"


def test_a_move_replaces_what_an_earlier_job_left(tmp_path, local_key):
    (old,) = write(tmp_path / "old", local_key, ROWS[:5])
    (new,) = write(tmp_path / "new", local_key, ROWS[5:])
    moved = publish(new, old.path)
    assert moved.shard_id == new.shard_id
    assert all_rows(f"{tmp_path}/old*", local_key) == ROWS[5:]


def test_a_policy_may_keep_data_keys_over_bundles(tmp_path, local_key):
    policy = DataKeyPolicy("worker")
    first = write(tmp_path / "a", local_key, policy=policy)
    second = write(tmp_path / "b", local_key, policy=policy)
    key_ids = {KeyFile.from_bytes(Path(f.key_file).read_bytes(), "").data_keys[0].key_id for f in first + second}
    assert len(key_ids) == 1
    third = write(tmp_path / "c", local_key)
    assert KeyFile.from_bytes(Path(third[0].key_file).read_bytes(), "").data_keys[0].key_id not in key_ids
