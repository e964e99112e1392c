"""Encrypted Parquet: what is written comes back, to whoever may read it, for few calls to the KMS."""

import gc
import io
import pickle
import threading
import weakref

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from beam_envelope.errors import (
    ContextMismatchError,
    FormatError,
    KeyAccessError,
    KeyFileMissingError,
    KmsUnavailableError,
    NotEncryptedError,
    WrongKeyError,
)
from beam_envelope.formats.keyfile import KeyFile, key_file_name
from beam_envelope.formats.parquet import create_parquet, open_parquet, open_sealed_parquet
from beam_envelope.formats.parquet_keys import ColumnKeys
from beam_envelope.formats.rotation import Rotation, Rotator
from beam_envelope.formats.shard import create_shard, open_shard
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.context import ANY_CONTEXT
from beam_envelope.testing import find_plaintext
from tests.formats.parquets import CONTEXT, LEAVES, PEOPLE, SealedParquet
from tests.formats.sealed import names


@pytest.fixture
def path(tmp_path):
    return tmp_path / "part-0.parquet"


@pytest.fixture(scope="module")
def people(keys):
    """Some columns under a second and a third key."""
    main, pii, geo = keys
    columns = {"ssn": pii, "address.geo": geo, "visits.list.element.place": pii, "scores.key_value.value": geo}
    return SealedParquet(PEOPLE, key=main, columns=columns)


def settings_of(keys):
    main, pii, geo = keys
    return {
        "uniform": {"key": main},
        "with columns": {"key": main, "columns": {"ssn": pii, "address": [pii, geo], "tags": main}},
        "columns only": {"columns": {"ssn": pii, "address": geo}},
        "one column only": {"columns": {"scores": pii}},
        "all columns": {"columns": dict.fromkeys(PEOPLE.schema.names, pii)},
    }


# Round trips


@pytest.mark.parametrize("which", ["uniform", "with columns", "columns only", "one column only", "all columns"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zstd", "compression_level": 3, "data_page_version": "2.0", "write_page_checksum": True},
        {"compression": "none", "use_dictionary": False, "write_statistics": False, "store_schema": True},
        {"version": "2.4", "write_page_index": True, "sorting_columns": [pq.SortingColumn(0)], "write_batch_size": 3},
    ],
    ids=["defaults", "zstd", "none", "page index"],
)
def test_a_table_comes_back(keys, path, which, options):
    with create_parquet(path, PEOPLE.schema, context=CONTEXT, **settings_of(keys)[which], **options) as writer:
        writer.write_table(PEOPLE, row_group_size=3)
    assert writer.num_rows == 10
    with open_parquet(path, key=keys, context=CONTEXT) as reader:
        assert (reader.num_rows, reader.num_row_groups) == (10, 4)
        assert (reader.schema, reader.schema.metadata) == (PEOPLE.schema, PEOPLE.schema.metadata)
        table = reader.read()
        assert table.equals(PEOPLE)
        assert (table.schema, table.schema.metadata) == (PEOPLE.schema, PEOPLE.schema.metadata)
        assert reader.read_row_group(1).to_pylist() == PEOPLE.slice(3, 3).to_pylist()
        batches = list(reader.iter_batches(batch_size=2))
        assert max(batch.num_rows for batch in batches) == 2
        assert pa.Table.from_batches(batches).to_pylist() == PEOPLE.to_pylist()  # dictionaries may differ
        again = [batch for number in (3, 0) for batch in reader.iter_batches([number])]
        assert pa.Table.from_batches(again).to_pylist() == [
            *PEOPLE.slice(9).to_pylist(),
            *PEOPLE.slice(0, 3).to_pylist(),
        ]
    assert names(path.parent) == sorted([path.name, key_file_name(path.name)])


def test_batches_and_tables_can_be_written_in_turn(keys):
    stream, key_file = io.BytesIO(), io.BytesIO()
    with create_parquet(stream, PEOPLE.schema, key=keys[0], key_file=key_file) as writer:
        writer.write_batch(PEOPLE.slice(0, 4).to_batches()[0])
        writer.write(PEOPLE.slice(4, 3))
        writer.write(PEOPLE.slice(7).to_batches()[0], row_group_size=2)
        writer.add_key_value_metadata({"more": "to say"})
    with open_parquet(stream, key=keys[0], key_file=key_file.getvalue()) as reader:
        assert reader.num_row_groups == 4
        assert reader.read().equals(PEOPLE)
        assert reader.metadata == {b"made by": b"a test", b"more": b"to say"}


@pytest.mark.parametrize("which", ["uniform", "columns only"])
@pytest.mark.parametrize("rows", [None, 0])
def test_a_file_without_rows_comes_back(keys, path, which, rows):
    with create_parquet(path, PEOPLE.schema, **settings_of(keys)[which]) as writer:
        if rows is not None:
            writer.write_table(PEOPLE.slice(0, rows))
    with open_parquet(path, key=keys) as reader:
        assert reader.read().equals(PEOPLE.slice(0, 0))
        assert reader.read(["tags"], filter=pc.field("id") > 1).num_rows == 0
    with open_parquet(path, key=keys[2], on_denied="null") if which != "uniform" else open_parquet(path, key=keys) as r:
        assert r.read().num_rows == 0


def test_many_columns_and_row_groups_come_back(keys, path):
    table = pa.table({f"column {number}": list(range(20)) for number in range(300)})
    columns = {f"column {number}": keys[number % 3] for number in range(0, 300, 2)}
    with create_parquet(path, table.schema, key=keys[0], columns=columns) as writer:
        writer.write_table(table, row_group_size=2)
    with open_parquet(path, key=keys) as reader:
        assert reader.read().equals(table)
    with open_parquet(path, key=keys[:1], on_denied="drop") as reader:
        assert len(reader.read().schema) == 200


def test_pandas_gets_its_index_back(keys, path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]}, index=pandas.Index(["p", "q"], name="key"))
    table = pa.Table.from_pandas(frame)
    with create_parquet(path, table.schema, key=keys[0], columns={"b": keys[1]}) as writer:
        writer.write_table(table)
    with open_parquet(path, key=keys) as reader:
        assert reader.read().to_pandas().equals(frame)
    with open_parquet(path, key=keys[0], on_denied="drop") as reader:
        assert reader.read().to_pandas().equals(frame[["a"]])


def test_columns_are_chosen_by_name_or_path(keys, people):
    reader = people.open(keys)
    assert reader.read(["flag", "id"]).equals(PEOPLE.select(["flag", "id"]))
    assert reader.read([]).num_rows == 10
    lon = reader.read(["address.geo.lon", "id", "address.zip"])
    assert lon.schema.names == ["address", "id"]
    assert lon["address"].to_pylist()[2] == {"zip": "0", "geo": {"lon": 0.0}}
    assert reader.read(["visits.list.element.day"])["visits"].to_pylist()[0] == [{"day": 1}]
    for columns in (["flag", "id"], [], ["address.geo.lon", "id"], ["scores.key_value.key", "visits.list.element.day"]):
        assert reader.schema_of(columns) == reader.read(columns).schema
    assert reader.read(["scores"])["scores"].equals(PEOPLE["scores"])
    for name in ("adress", "address.", "address.geo.l", ""):
        with pytest.raises(ValueError, match=f"^there is no column '{name}'; there are id, name, ssn, address.zip,"):
            reader.read([name])
    with pytest.raises(TypeError, match=r"^columns is a list of names, not the text 'id'$"):
        reader.read("id")


def test_a_row_group_that_is_not_there_is_an_index_error(keys, people):
    reader = people.open(keys)
    for number in (-1, 3):
        with pytest.raises(IndexError, match=f"has 3 row groups; there is no number {number}$"):
            reader.read_row_group(number)
        with pytest.raises(IndexError):
            reader.iter_batches([0, number])
    with pytest.raises(ValueError, match=r"^batch_size is above 0, not 0$"):
        reader.iter_batches(batch_size=0)


@pytest.mark.parametrize("buffering", [0, -1])
def test_any_seekable_stream_is_read_and_stays_open(keys, people, tmp_path, buffering):
    (tmp_path / "f").write_bytes(people.file)
    with (tmp_path / "f").open("rb", buffering=buffering) as stream:
        with people.open(keys) as reader:
            assert reader.read().equals(PEOPLE)
        with open_parquet(stream, key=keys, context=CONTEXT, key_file=io.BytesIO(people.key_file)) as reader:
            assert reader.read().equals(PEOPLE)
        assert not stream.closed


class Dribble(io.RawIOBase):
    """A stream that gives a byte or three at a time."""

    def __init__(self, data):
        self._inner = io.BytesIO(data)

    def read(self, size=-1):
        return self._inner.read(size if size < 0 else min(size, 3))

    def seek(self, *arguments):
        return self._inner.seek(*arguments)

    def tell(self):
        return self._inner.tell()


def test_a_stream_may_return_less_than_was_asked_for(keys, people):
    stream = Dribble(people.file)
    assert open_parquet(stream, key=keys, context=CONTEXT, key_file=people.key_file).read().equals(PEOPLE)


def test_an_error_of_the_stream_is_passed_on(keys, people):
    class Failing(io.BytesIO):
        broken = False

        def read(self, size=-1):
            if self.broken:
                raise TimeoutError("the network is gone")
            return super().read(size)

    stream = Failing(people.file)
    reader = open_parquet(stream, key=keys, context=CONTEXT, key_file=people.key_file)
    stream.broken = True
    with pytest.raises(TimeoutError, match=r"^the network is gone$"):
        reader.read()
    stream.broken = False
    assert reader.read().equals(PEOPLE)


def test_a_closed_reader_says_so(keys, path):
    with create_parquet(path, PEOPLE.schema, key=keys[0]) as writer:
        writer.write_table(PEOPLE)
    with open_parquet(path, key=keys) as reader:
        batches = reader.iter_batches(batch_size=1)
        next(batches)
    for act in (reader.read, lambda: next(batches), lambda: reader.read_row_group(0)):
        with pytest.raises(ValueError, match=r"part-0\.parquet is closed$"):
            act()
    reader.close()
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        pickle.dumps(reader)


# Keys


def test_nothing_of_the_plaintext_is_on_the_disk(keys, path):
    canary = b"CANARY-4111-1111"
    table = pa.table({"secret column": [canary.decode()] * 1000})
    for options in ({"key": keys[0]}, {"columns": {"secret column": keys[1]}}):
        with create_parquet(
            path, table.schema, overwrite=True, compression="none", use_dictionary=False, **options
        ) as writer:
            writer.write_table(table, 10)
            assert find_plaintext(path.parent, canary) == []
        assert find_plaintext(path.parent, canary) == []
        assert find_plaintext(path.parent, b"secret column") == []  # nor the names of columns


def test_each_data_key_is_in_the_key_file_and_the_footers_is_the_first(keys, people):
    key_file = KeyFile.from_bytes(people.key_file, "k")
    assert key_file.cipher == "parquet-aes-gcm-v1"
    assert [[form.kms_key for form in entry.wrapped_keys] for entry in key_file.data_keys] == [
        [key.full_name()] for key in keys
    ]


def test_a_writer_and_a_reader_say_which_columns_are_plain(keys, path):
    with create_parquet(path, PEOPLE.schema, columns={"address": keys[1], "id": keys[2]}) as writer:
        writer.write_table(PEOPLE)
    encrypted = {"id": str(keys[2]), **dict.fromkeys(LEAVES[3:6], str(keys[1]))}
    assert writer.columns == dict.fromkeys(LEAVES, "plain") | encrypted
    access = dict.fromkeys(LEAVES, "plain") | {"id": "denied", **dict.fromkeys(LEAVES[3:6], "readable")}
    with open_parquet(path, key=keys[1]) as reader:
        assert reader.columns == access
        assert list(reader.columns) == LEAVES
        assert reader.read(["name"]).equals(PEOPLE.select(["name"]))


def test_each_key_of_the_columns_opens_a_footer_without_a_key_of_its_own(keys, path):
    with create_parquet(path, PEOPLE.schema, columns={"ssn": keys[1], "name": [keys[0], keys[2]]}) as writer:
        writer.write_table(PEOPLE)
    for key, lost in zip(keys, ["ssn", "name", "ssn"], strict=True):
        with open_parquet(path, key=key, on_denied="drop") as reader:
            assert reader.read().equals(PEOPLE.drop_columns([lost]))


def test_a_denied_footer_is_an_error_whatever_on_denied_says(keys, people):
    for on_denied in ("error", "null", "drop"):
        with pytest.raises(WrongKeyError, match=r"^the Parquet file is encrypted under default/"):
            people.open(keys[1:], on_denied=on_denied)
    with pytest.raises(ValueError, match=r"^on_denied is 'error', 'null' or 'drop', not 'ignore'$"):
        people.open(keys, on_denied="ignore")


DENIED = ["ssn", "visits.list.element.place"]


def test_two_readers_see_exactly_their_columns(keys, people):
    main, pii, geo = keys
    first = people.open([main, pii], on_denied="drop").read()
    assert first.schema.names == [name for name in PEOPLE.schema.names if name != "scores"]
    assert first.drop_columns("address").equals(PEOPLE.drop_columns(["address", "scores"]))
    assert first["address"].to_pylist()[:3] == [None, {"zip": None}, {"zip": "0"}]
    second = people.open([main, geo], on_denied="drop").read()
    assert second.equals(PEOPLE.drop_columns(["ssn", "visits"]))


def test_denied_columns_are_null_and_of_their_type(keys, people):
    reader = people.open(keys[:1], on_denied="null")
    table = reader.read()
    assert (table.schema, table.schema.metadata) == (PEOPLE.schema, PEOPLE.schema.metadata)
    assert (reader.schema, reader.schema.metadata) == (PEOPLE.schema, PEOPLE.schema.metadata)
    for name in ("ssn", "visits", "scores"):
        assert table[name].null_count == 10
    assert table["address"].to_pylist()[:3] == [
        None,
        {"zip": None, "geo": None},
        {"zip": "0", "geo": None},
    ]
    rest = ["ssn", "visits", "scores", "address"]
    assert table.drop_columns(rest).equals(PEOPLE.drop_columns(rest))
    assert reader.read(["ssn"]).equals(table.select(["ssn"]))
    assert reader.read_row_group(2, ["ssn", "id"]).num_rows == 2


def test_columns_that_were_not_nullable_are_so_where_nulls_take_their_place(keys, path):
    inner = pa.struct([pa.field("a", pa.int64(), nullable=False), pa.field("b", pa.int64(), nullable=False)])
    schema = pa.schema([pa.field("s", inner, nullable=False), pa.field("t", inner, nullable=False)])
    table = pa.table({"s": [{"a": 1, "b": 2}], "t": [{"a": 3, "b": 4}]}, schema=schema)
    with create_parquet(path, schema, key=keys[0], columns={"s.a": keys[1], "t": keys[1]}) as writer:
        writer.write_table(table)
    with open_parquet(path, key=keys[0], on_denied="null") as reader:
        table = reader.read()
        assert table.to_pylist() == [{"s": {"a": None, "b": 2}, "t": None}]
        assert not table.schema.field("s").nullable
        assert table.schema.field("t").nullable
        table.validate(full=True)


def test_a_denied_column_is_an_error_that_names_columns_and_keys(keys, people):
    reader = people.open(keys[:1])
    with pytest.raises(WrongKeyError) as caught:
        reader.read()
    pii, geo = (key.full_name() for key in keys[1:])
    assert str(caught.value).startswith(
        f"this reader may not open these columns of the Parquet file: {', '.join(DENIED)} (under {pii}); "
        f"address.geo.lat, address.geo.lon, scores.key_value.value (under {geo}). Name others, or open the file with "
        f"on_denied='null' or 'drop'. the Parquet file is encrypted under {pii}; the keys allowed here are"
    )
    assert reader.schema.equals(PEOPLE.schema)
    assert reader.read(["id", "address.zip", "visits.list.element.day"]).num_rows == 10


@pytest.mark.parametrize("on_denied", ["error", "null", "drop"])
def test_the_siblings_of_a_denied_column_are_read(keys, on_denied):
    """Also where the denied one is the first of the file, which misleads pyarrow."""
    table = PEOPLE.select(["ssn", "address", "id", "name"])
    sealed = SealedParquet(table, key=keys[0], columns={"ssn": keys[1], "address.zip": keys[1]})
    reader = sealed.open(keys[0], on_denied=on_denied)
    assert reader.read(["name"]).equals(PEOPLE.select(["name"]))
    assert reader.read(["name", "id"]).equals(PEOPLE.select(["name", "id"]))
    assert reader.read_row_group(1, ["id"]).equals(PEOPLE.select(["id"]).slice(4, 4))
    assert reader.read(["address.geo"])["address"].to_pylist()[3] == {"geo": {"lat": 0.5, "lon": -1.0}}


# Filters


FILTERS = [
    (pc.field("id") > 6, [7, 8, 9]),
    ([("id", ">", 6)], [7, 8, 9]),
    ([[("id", "<", 1)], [("name", "=", "name 9")]], [0, 9]),
    (pc.field("address", "geo", "lat") >= 3, [8, 9]),
    (pc.field("ssn").is_null() | (pc.field("ssn") == "123-45-0007"), [4, 7]),
    (pc.field("colour").isin(["blue"]), [5]),
    ((pc.field("money") < 0.02) & pc.field("flag"), [0]),
    (pc.field("id") > 100, []),
]


@pytest.mark.parametrize(("expression", "ids"), FILTERS)
def test_a_filter_gives_the_rows_that_fulfil_it(keys, people, expression, ids):
    reader = people.open(keys)
    assert reader.read(filter=expression).equals(PEOPLE.take(pa.array(ids, pa.int64())))
    assert reader.read(["tags", "flag"], expression).equals(
        PEOPLE.select(["tags", "flag"]).take(pa.array(ids, "int64"))
    )
    assert reader.read(["id"], expression)["id"].to_pylist() == ids
    assert reader.read([], expression).num_rows == len(ids)
    assert sum(batch.num_rows for batch in reader.iter_batches(filter=expression, batch_size=3)) == len(ids)
    assert reader.read_row_group(0, ["id"], expression)["id"].to_pylist() == [number for number in ids if number < 4]


@pytest.mark.parametrize("on_denied", ["error", "null", "drop"])
def test_a_filter_on_a_denied_column_is_an_error(keys, people, on_denied):
    reader = people.open(keys[:1], on_denied=on_denied)
    for expression in (pc.field("ssn") == "x", [("ssn", "=", "x")], pc.field("ssn").is_null(), pc.field("id") > 3):
        if "id" in str(expression):
            assert reader.read(["id"], expression)["id"].to_pylist() == [4, 5, 6, 7, 8, 9]
            continue
        with pytest.raises(
            WrongKeyError, match="may not open these columns of the Parquet file, which the filter needs"
        ):
            reader.read(["id"], expression)
    with pytest.raises(WrongKeyError, match=r"which the filter needs: address.geo.lat"):
        reader.read(["id"], pc.field("address", "geo", "lat") > 1)
    assert reader.read(["id"], pc.field("address", "zip") == "3")["id"].to_pylist() == [5]


def test_a_filter_that_cannot_be_applied_is_a_value_error(keys, people):
    reader = people.open(keys)
    for expression in (pc.field("nope") > 1, [("nope", "=", 1)], pc.field("name") > 1, pc.field("address", "x") == 1):
        with pytest.raises(ValueError, match=r"^the filter does not fit the file: "):
            reader.read(filter=expression)
    with pytest.raises(ValueError, match=r"^the filter needs the whole of a map; ask"):
        reader.read(["scores.key_value.key"], pc.field("scores").is_null())
    days = reader.read(["visits.list.element.day"], pc.field("visits").is_valid())
    assert days["visits"].to_pylist() == [[{"day": 1}], [], *[[{"day": 2}]] * 7]


# Contexts, key files


def test_the_context_must_be_the_one_that_was_written(keys, people):
    for context in (None, {}, {"dataset": "other"}):
        with pytest.raises(ContextMismatchError):
            people.open(keys, context=context)
    assert people.open(keys, context=ANY_CONTEXT).num_rows == 10


def test_a_missing_key_file_is_named(keys, path):
    with create_parquet(path, PEOPLE.schema, key=keys[0]) as writer:
        writer.write_table(PEOPLE)
    (path.parent / key_file_name(path.name)).unlink()
    with pytest.raises(KeyFileMissingError, match=r"^there is no key file _KEY_FOR_part-0\.parquet\.json beside "):
        open_parquet(path, key=keys)
    pq.write_table(PEOPLE, path)
    with pytest.raises(NotEncryptedError, match="is plain data: it has no key file"):
        open_parquet(path, key=keys)
    with pytest.raises(KeyFileMissingError, match="there is no key file at "):
        open_parquet(path, key=keys, key_file=path.with_name("k"))
    with pytest.raises(FileNotFoundError):
        open_parquet(path.with_name("nothing"), key=keys)
    with pytest.raises(NotEncryptedError, match="is a key file or an unfinished file"):
        open_parquet(path.with_name("_KEY_FOR_x.json"), key=keys)
    with pytest.raises(ValueError, match="open_parquet takes local paths and open streams, not 's3://a/b'"):
        open_parquet("s3://a/b", key=keys)
    with pytest.raises(ValueError, match="pass key_file="):
        open_parquet(io.BytesIO(), key=keys)


def test_a_shard_and_a_parquet_file_are_told_apart(keys, people, path):
    with create_shard(path, key=keys[0], context=CONTEXT) as stream:
        pq.write_table(PEOPLE, stream)
    with pytest.raises(FormatError, match="is of the cipher cobblestone-256, not of an encrypted Parquet file"):
        open_parquet(path, key=keys, context=CONTEXT)
    with pytest.raises(FormatError, match="Is it another format"):
        open_shard(io.BytesIO(people.file), key=keys, context=CONTEXT, key_file=people.key_file)
    one = SealedParquet(PEOPLE, key=keys[0])
    with pytest.raises(FormatError, match=r"Open it with open_parquet or ReadEncryptedParquet$"):
        open_shard(io.BytesIO(one.file), key=keys, context=CONTEXT, key_file=one.key_file)


def test_rotation_leaves_the_file_alone(keys, people):
    main, pii, geo = keys
    key_file = KeyFile.from_bytes(people.key_file, "k")
    rotated = Rotator(Rotation(source=(pii,), to=geo)).rotate(key_file, "k")
    stream = io.BytesIO(people.file)
    with open_sealed_parquet(stream, rotated.to_bytes(), [main, geo], CONTEXT, "f") as reader:
        assert reader.read().equals(PEOPLE)
    with open_sealed_parquet(stream, rotated.to_bytes(), [main, pii], CONTEXT, "f", on_denied="drop") as reader:
        assert set(PEOPLE.schema.names) - set(reader.schema.names) == {"ssn", "visits", "scores"}


# Calls to the KMS


URIS = ["aws-kms://alias/main", "aws-kms://alias/pii", "aws-kms://alias/geo"]


@pytest.fixture
def kms(fake_kms):
    for name in ("main", "pii", "geo"):
        fake_kms.create_key(name)
    return fake_kms


def test_one_call_for_each_kms_key_writes_a_file_and_one_reads_all(kms, tmp_path):
    main, pii, geo = URIS
    columns = {"ssn": pii, "address": geo, "tags": pii, "scores": geo}
    with create_parquet(tmp_path / "a", PEOPLE.schema, key=main, columns=columns) as writer:
        for _ in range(10):
            writer.write_table(PEOPLE, row_group_size=2)
    assert kms.calls == {"GenerateDataKey": 3}
    for _ in range(3):
        with open_parquet(tmp_path / "a", key=URIS) as reader:
            assert reader.num_row_groups == 50
            assert reader.read().num_rows == 100
            list(reader.iter_batches(filter=pc.field("id") > 3))
    assert kms.calls == {"GenerateDataKey": 3, "Decrypt": 3}


def test_files_of_one_bundle_share_data_keys_and_a_reader_asks_for_each_once(kms):
    column_keys = ColumnKeys.of(URIS[0], {"ssn": URIS[1]})
    from beam_envelope.formats.output import StreamOutput
    from beam_envelope.formats.parquet_writer import EncryptedParquetWriter

    files = []
    data_keys = column_keys.generate(CONTEXT)
    for number in range(5):
        stream, key_file = io.BytesIO(), io.BytesIO()
        output = StreamOutput(stream, key_file.write)
        with EncryptedParquetWriter(
            output, PEOPLE.schema, data_keys, column_keys, CONTEXT, name=f"{number}", options={}
        ) as writer:
            writer.write_table(PEOPLE)
        files.append((stream, key_file.getvalue()))
    for data_key in data_keys:
        data_key.close()
    clear_caches()
    for stream, key_file in files:
        with open_parquet(stream, key=URIS[:2], context=CONTEXT, key_file=key_file) as reader:
            assert reader.read().equals(PEOPLE)
    assert kms.calls == {"GenerateDataKey": 2, "Decrypt": 2}


def test_no_kms_is_asked_for_keys_of_columns_that_nobody_reads(kms, tmp_path):
    with create_parquet(tmp_path / "a", PEOPLE.schema, key=URIS[0], columns={"ssn": URIS[1]}) as writer:
        writer.write_table(PEOPLE)
    with open_parquet(tmp_path / "a", key=URIS) as reader:
        assert reader.read(["id"]).num_rows == 10
        assert kms.calls["Decrypt"] == 1
        assert reader.columns["ssn"] == "readable"
    assert kms.calls["Decrypt"] == 2


def test_a_key_that_the_kms_denies_is_asked_for_once_by_those_who_go_on_without(kms, tmp_path):
    with create_parquet(tmp_path / "a", PEOPLE.schema, key=URIS[0], columns={"ssn": URIS[1]}) as writer:
        writer.write_table(PEOPLE)
    kms.deny("Decrypt", "alias/pii")
    for _ in range(3):
        with open_parquet(tmp_path / "a", key=URIS[:2], on_denied="null") as reader:
            assert reader.read()["ssn"].null_count == 10
    assert kms.calls["Decrypt"] == 3  # for the footer's data key; one that was denied; one under the other key
    with open_parquet(tmp_path / "a", key=URIS) as reader, pytest.raises(KeyAccessError, match=r"ssn .*kms:Decrypt"):
        reader.read()
    kms.allow("Decrypt", "alias/pii")
    with open_parquet(tmp_path / "a", key=URIS) as reader:  # who takes no for an error asks again
        assert reader.read().equals(PEOPLE)


def test_a_kms_that_does_not_answer_is_no_denial(kms, tmp_path, monkeypatch):
    with create_parquet(tmp_path / "a", PEOPLE.schema, key=URIS[0], columns={"ssn": URIS[1]}) as writer:
        writer.write_table(PEOPLE)
    with open_parquet(tmp_path / "a", key=URIS, on_denied="drop") as reader:
        kms.fail(1000)
        monkeypatch.setattr("time.sleep", lambda _: None)
        with pytest.raises(KmsUnavailableError):
            reader.read()
        kms.fail(0)
        assert reader.read().equals(PEOPLE)


# Threads


def test_threads_may_share_a_reader(keys, people):
    reader = people.open(keys[:2], on_denied="null")
    wrong = []

    def work():
        for _ in range(30):
            table = reader.read(filter=pc.field("id") >= 5)
            if table["name"].to_pylist() != PEOPLE["name"].to_pylist()[5:] or reader.columns["ssn"] != "readable":
                wrong.append(table)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


def test_a_reader_that_nobody_closes_is_no_trouble(keys, path):
    with create_parquet(path, PEOPLE.schema, key=keys[0]) as writer:
        writer.write_table(PEOPLE)
    reader = open_parquet(path, key=keys)
    alive = weakref.ref(reader)
    assert reader.read().num_rows == 10
    del reader
    gc.collect()
    assert alive() is None
    batches = open_parquet(path, key=keys).iter_batches(batch_size=1)
    next(batches)
    gc.collect()
    assert next(batches).num_rows == 1
