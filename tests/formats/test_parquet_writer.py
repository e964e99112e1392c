"""Encrypted Parquet that nobody finished, options and columns that do not go, other writers."""

import errno
import gc
import io
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_envelope.errors import EnvelopeError, FormatError
from beam_envelope.formats import output as output_module
from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.formats.parquet import create_parquet, open_parquet
from beam_envelope.formats.parquet_columns import leaf_paths
from beam_envelope.formats.parquet_keys import ColumnKeys
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import LocalKms
from tests.formats.parquets import CONTEXT, LEAVES, PEOPLE
from tests.formats.sealed import names

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", "y", "z"]})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "part-0.parquet"


def create(path, keys, **settings):
    return create_parquet(path, TABLE.schema, **{"key": keys[0], **settings})


# Unfinished files


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("written", [False, True])
def test_an_exception_in_the_block_leaves_nothing(path, keys, error, written):
    with pytest.raises(error), create(path, keys, columns={"a": keys[1]}) as writer:  # noqa: PT012  # writing, failing
        if written:
            writer.write_table(TABLE)
        raise error
    assert writer.closed
    assert names(path.parent) == []


def test_garbage_collection_does_not_finish_a_file(path, keys):
    writer = create(path, keys)
    writer.write_table(TABLE)
    writer.me = writer
    del writer
    gc.collect()
    assert names(path.parent) == []


def test_an_abort_leaves_nothing_and_may_come_again(path, keys):
    writer = create(path, keys)
    writer.write_table(TABLE)
    writer.abort()
    writer.abort()
    writer.close()
    assert names(path.parent) == []
    for act in (lambda: writer.write_table(TABLE), lambda: writer.add_key_value_metadata({"a": "b"})):
        with pytest.raises(ValueError, match=r"part-0\.parquet is closed$"):
            act()


def test_a_close_while_an_exception_is_handled_drops_the_file_and_says_so(path, keys, caplog):
    writer = create(path, keys)
    try:
        {}["missing"]
    except KeyError:
        writer.close()
    assert caplog.messages == [f"{path} is closed while KeyError is handled: it is dropped"]
    assert names(path.parent) == []
    try:
        {}["missing"]
    except KeyError:
        with create(path, keys) as writer:
            writer.write_table(TABLE)
    assert open_parquet(path, key=keys).read().equals(TABLE)


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_a_disk_that_fails_leaves_nothing(path, keys, monkeypatch, when):
    def fail(*_arguments):
        raise OSError(errno.ENOSPC, "the disk is full")

    writer = create(path, keys)
    writer.write_table(TABLE)
    monkeypatch.setattr(output_module.os, when, fail)
    with pytest.raises(OSError, match="the disk is full"):
        writer.close()
    monkeypatch.undo()
    assert [name for name in names(path.parent) if not name.startswith("_KEY_FOR_")] == []


def test_a_failed_write_drops_the_file(path, keys):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "the disk is full")

    writer = create_parquet(Full(), TABLE.schema, key=keys[0], key_file=io.BytesIO(), compression="none")
    table = pa.table({"a": range(500_000), "b": [f"{number}" for number in range(500_000)]})
    with pytest.raises(OSError, match="the disk is full"):
        writer.write_table(table)
    for act in (lambda: writer.write_table(TABLE), writer.close):
        with pytest.raises(ValueError, match="an earlier write to a stream failed, so it is dropped"):
            act()
    assert writer.closed


def test_a_file_is_visible_only_when_it_is_whole_and_its_key_file_durable(path, keys):
    with create(path, keys) as writer:
        writer.write_table(TABLE)
        assert [name for name in names(path.parent) if not name.startswith("_TMP_")] == []
    assert names(path.parent) == sorted([key_file_name(path.name), path.name])
    assert (path.parent / key_file_name(path.name)).read_bytes() == writer.key_file.to_bytes()


def test_the_key_file_of_a_stream_comes_first(keys):
    log = []

    class Logged(io.BytesIO):
        def write(self, data):
            log.append("file")
            return super().write(data)

    class KeyFile(io.BytesIO):
        def write(self, data):
            log.append("key file")
            return super().write(data)

    with create_parquet(Logged(), TABLE.schema, key=keys[0], key_file=KeyFile()) as writer:
        writer.write_table(TABLE)
    assert log[0] == "key file"
    assert set(log[1:]) == {"file"}


def test_an_existing_file_is_kept_unless_told_otherwise(path, keys, fake_kms):
    create(path, keys).close()
    before = path.read_bytes()
    fake_kms.create_key("etl")
    with pytest.raises(FileExistsError):
        create(path, keys, key="aws-kms://alias/etl")
    assert path.read_bytes() == before
    assert fake_kms.calls == {}
    with create(path, keys, overwrite=True) as writer:
        writer.write_table(TABLE)
    assert open_parquet(path, key=keys).read().equals(TABLE)


def test_another_writer_of_the_same_file_is_noticed(path, keys, monkeypatch):
    writer = create(path, keys, overwrite=True)
    publish = output_module._publish

    def interfere(*arguments, **settings):
        publish(*arguments, **settings)
        (path.parent / key_file_name(path.name)).write_bytes(b"another's")

    monkeypatch.setattr(output_module, "_publish", interfere)
    with pytest.raises(EnvelopeError, match="another writer replaced the key file"):
        writer.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_process_cannot_go_on_with_a_writer(path, keys):
    writer = create(path, keys)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            writer.write_table(TABLE)
        except ValueError as error:
            status = 0 if "was opened before a fork" in str(error) else 2
        writer.abort()
        del writer
        gc.collect()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    writer.write_table(TABLE)
    writer.close()
    assert open_parquet(path, key=keys).read().equals(TABLE)


def test_a_writer_cannot_be_pickled_but_its_column_keys_can(path, keys):
    with create(path, keys) as writer, pytest.raises(TypeError, match="cannot be pickled or copied"):
        pickle.dumps(writer)
    column_keys = ColumnKeys.of(keys[0], {"a": keys[1], "b": [keys[1], keys[2]]})
    assert pickle.loads(pickle.dumps(column_keys)) == column_keys
    assert len({column_keys, pickle.loads(pickle.dumps(column_keys))}) == 1


# What is refused


def test_a_table_of_another_schema_is_refused(path, keys):
    with create(path, keys) as writer:
        for table, difference in (
            (TABLE.select(["a"]), "b"),
            (TABLE.append_column("c", [[1, 2, 3]]), "c"),
            (TABLE.set_column(0, "a", [["1", "2", "3"]]), "a"),
            (TABLE.select(["b", "a"]), "the order of the columns"),
        ):
            with pytest.raises(ValueError, match=f"the schema that it was created with. It differs in: {difference}$"):
                writer.write_table(table)
        writer.write_table(TABLE)  # nothing was written of those
    assert open_parquet(path, key=keys).read().equals(TABLE)


def test_a_value_that_cannot_be_written_is_not_in_the_message(path, keys):
    table = pa.table({"at": pa.array([1_234_567_891], pa.timestamp("ns"))})
    with (
        pytest.raises(ValueError, match=r"^pyarrow cannot write this table to .*would lose data$") as caught,
        create_parquet(path, table.schema, key=keys[0], coerce_timestamps="ms") as writer,
    ):
        writer.write_table(table)
    assert "1234567891" not in str(caught.value)
    assert names(path.parent) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"bloom_filter_options": {"a": True}},
            ValueError,
            "^bloom_filter_options does not go with encryption: Parquet",
        ),
        (
            {"encryption_properties": 1},
            ValueError,
            "^encryption_properties does not go with encryption: the encryption is",
        ),
        ({"filesystem": 1}, ValueError, "^filesystem does not go with encryption: pass a local path"),
        ({"metadata_collector": []}, ValueError, "^metadata_collector does not go with encryption: the metadata"),
        ({"compressionn": "zstd"}, TypeError, "compressionn"),
        ({"compression": "zzz"}, (ValueError, OSError), "(?i)zzz"),
        ({"version": "9"}, ValueError, "9"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_does_not_go_is_refused_before_anything_is_made(path, keys, fake_kms, options, error, message):
    fake_kms.create_key("etl")
    with pytest.raises(error, match=message):
        create(path, keys, key="aws-kms://alias/etl", **options)
    assert fake_kms.calls == {}
    assert names(path.parent) == []


def test_other_options_do_what_they_say(path, keys):
    with create(path, keys, compression={"a": "zstd", "b": "none"}, use_dictionary=["b"], flavor="spark") as writer:
        writer.write_table(TABLE)
    with open_parquet(path, key=keys) as reader:
        chunks = [reader._file.metadata.row_group(0).column(number) for number in range(2)]  # all under one key
        assert [chunk.compression for chunk in chunks] == ["ZSTD", "UNCOMPRESSED"]
        assert "RLE_DICTIONARY" not in chunks[0].encodings
        assert "RLE_DICTIONARY" in chunks[1].encodings


@pytest.mark.parametrize("name", ["a:b", "a,b", "a;b", " a", "a ", ""])
def test_a_column_whose_name_cannot_be_passed_on_is_refused(path, keys, name):
    table = pa.table({name: [1], "other": [2]})
    message = (
        f"^the column '{name}' cannot have a key of its own: Parquet libraries take no ':', ',' or ';' in its name"
    )
    for columns in ({name: keys[1]}, {"other": keys[1]}):  # also where it would be under key=
        with pytest.raises(ValueError, match=message):
            create_parquet(path, table.schema, key=keys[0], columns=columns)
    with create_parquet(path, table.schema, key=keys[0]) as writer:  # all under one key: any name
        writer.write_table(table)
    assert open_parquet(path, key=keys).read().equals(table)
    with create_parquet(path, table.schema, columns={"other": keys[0]}, overwrite=True) as writer:  # plain: any name
        writer.write_table(table)
    assert open_parquet(path, key=keys).read([name, "other"]).equals(table)


@pytest.mark.parametrize("name", ["a b", "ü", "a.b", "a\tb", "'a'", "a{b}", '"k1"', "k0", "plain", "a" * 2000])
def test_any_other_name_is_fine(path, keys, name):
    table = pa.table({name: [1], "other": [2]})
    with create_parquet(path, table.schema, key=keys[0], columns={name: keys[1]}) as writer:
        writer.write_table(table)
    with open_parquet(path, key=keys) as reader:
        assert reader.read().equals(table)
        assert reader.read([name]).equals(table.select([name]))
    assert open_parquet(path, key=keys[0], on_denied="drop").read().equals(table.select(["other"]))


@pytest.mark.parametrize("name", ["nope", "addres", "address.", "tags.element", "id.x"])
def test_an_unknown_column_is_refused(path, keys, name):
    with pytest.raises(ValueError, match=f"^there is no column '{name}'; there are id, name, ssn, address.zip, "):
        create_parquet(path, PEOPLE.schema, key=keys[0], columns={name: keys[1]})


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("id", LEAVES[:1]),
        ("address", LEAVES[3:6]),
        ("address.geo", LEAVES[4:6]),
        ("address.geo.lat", LEAVES[4:5]),
        ("tags", LEAVES[6:7]),
        ("visits.list", LEAVES[7:9]),
        ("visits.list.element.day", LEAVES[7:8]),
        ("scores.key_value", LEAVES[9:11]),
    ],
)
def test_a_name_means_all_that_is_below_it(path, keys, name, leaves):
    with create_parquet(path, PEOPLE.schema, key=keys[0], columns={name: keys[1]}) as writer:
        writer.write_table(PEOPLE)
    assert [leaf for leaf, key in writer.columns.items() if key == str(keys[1])] == leaves
    with open_parquet(path, key=keys[0]) as reader:
        assert [leaf for leaf, access in reader.columns.items() if access == "denied"] == leaves
    assert open_parquet(path, key=keys).read().equals(PEOPLE)


def test_one_column_named_twice_for_different_keys_is_refused(path, keys):
    columns = {"address": keys[1], "address.zip": keys[2]}
    with pytest.raises(
        ValueError, match=r"^the column address\.zip is named twice, for different KMS keys\. Name it once$"
    ):
        create_parquet(path, PEOPLE.schema, columns=columns)
    create_parquet(path, PEOPLE.schema, columns={"address": keys[1], "address.zip": keys[1]}).abort()


def test_columns_of_one_name_are_refused_unless_all_is_under_one_key(path, keys):
    schema = pa.schema([("s", pa.struct([("a", pa.int64())])), ("s.a", pa.int64())])
    with pytest.raises(ValueError, match=r"^two columns have the same name, so they cannot have different keys"):
        create_parquet(path, schema, key=keys[0], columns={"s": keys[1]})
    table = pa.table({"s": [{"a": 1}], "s.a": [2]}, schema=schema)
    with create_parquet(path, schema, key=keys[0]) as writer:
        writer.write_table(table)
    assert open_parquet(path, key=keys).read().equals(table)


def test_there_must_be_a_key(path, keys):
    for columns in (None, {}):
        with pytest.raises(
            ValueError, match=r"^no key was given; pass key='aws-kms://alias/...', or columns= with a key"
        ):
            create_parquet(path, TABLE.schema, columns=columns)
    with pytest.raises(FormatError, match="does not start with a scheme that is known"):
        create(path, keys, columns={"a": "pii"})
    with pytest.raises(ValueError, match="key_file goes with a stream"):
        create(path, keys, key_file="k")
    with pytest.raises(ValueError, match="pass key_file="):
        create(io.BytesIO(), keys)
    with pytest.raises(ValueError, match="is a name that key files, manifests and unfinished files have"):
        create(path.with_name("_MANIFEST.json"), keys)
    with pytest.raises(ValueError, match="create_parquet takes local paths and open streams, not 'gs://a/b'"):
        create("gs://a/b", keys)
    assert names(path.parent) == []


def test_more_kms_keys_than_can_open_a_footer_need_a_key_for_it(path, tmp_path, keys):
    schema = pa.schema([(f"c{number}", pa.int64()) for number in range(11)])
    columns = {f"c{number}": LocalKms(tmp_path / f"{number}.json") for number in range(11)}
    with pytest.raises(
        ValueError, match=r"^the columns are under 11 KMS keys, each of which would have to open the footer"
    ):
        create_parquet(path, schema, columns=columns)
    assert len(ColumnKeys.of(keys[0], columns).groups) == 12


def test_column_keys_are_one_group_for_each_set_of_kms_keys(keys):
    main, pii, geo = keys
    made = ColumnKeys.of(main, {"a": pii, "b": [pii, geo], "c": [geo, pii], "d": main, "e": pii})
    assert made.groups == ((main,), (pii,), (pii, geo))
    assert made.named == (("a", 1), ("b", 2), ("c", 2), ("d", 0), ("e", 1))
    assert made.rest == 0
    assert ColumnKeys.of(None, {"a": pii}) == ColumnKeys(((pii,),), (("a", 0),), None)
    assert ColumnKeys.of(None, {"a": pii, "b": geo}).groups == ((pii, geo), (pii,), (geo,))


def test_the_paths_of_a_schema_are_those_that_pyarrow_writes():
    assert leaf_paths(PEOPLE.schema, {}) == LEAVES
    assert leaf_paths(PEOPLE.schema, {"use_compliant_nested_type": False})[6] == "tags.list.item"
    assert leaf_paths(pa.schema([("a b", pa.int64())]), {"flavor": "spark"}) == ["a_b"]


def test_a_denied_kms_leaves_nothing(path, keys, fake_kms):
    fake_kms.create_key("etl")
    fake_kms.deny("GenerateDataKey")
    clear_caches()
    with pytest.raises(EnvelopeError, match="kms:GenerateDataKey"):
        create(path, keys, columns={"a": "aws-kms://alias/etl"}, context=CONTEXT)
    assert names(path.parent) == []


def test_pages_of_a_uniform_file_are_small_in_what_they_add(path, keys, tmp_path):
    table = pa.table({"a": range(200_000), "b": [f"row {number}" for number in range(200_000)]})
    with create_parquet(path, table.schema, key=keys[0]) as writer:
        writer.write_table(table)
    pq.write_table(table, tmp_path / "plain")
    assert path.stat().st_size < 1.01 * (tmp_path / "plain").stat().st_size
