"""Encrypted Parquet that was changed, cut, swapped or put together: a named error, and never other data.

Columns that were written plain are not authenticated; what that means is here too.
"""

import io
import json
import uuid
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from beam_envelope.errors import FormatError, NotEncryptedError, TamperedError, TruncatedError, WrongKeyError
from beam_envelope.formats.keyfile import KeyFile
from beam_envelope.formats.output import StreamOutput
from beam_envelope.formats.parquet import open_parquet
from beam_envelope.formats.parquet_keys import COLUMNS_ENTRY, ColumnKeys, decode_columns, encode_columns
from beam_envelope.formats.parquet_writer import EncryptedParquetWriter
from beam_envelope.keys.context import ANY_CONTEXT
from tests.formats.alone import run_alone
from tests.formats.parquets import CONTEXT, SealedParquet

OPTIONS = {"compression": "none", "use_dictionary": False, "write_statistics": False}


def table_of(offset):
    return pa.table({name: [100 * number + offset for number in range(8)] for name in ("a", "b", "c")})


@pytest.fixture(scope="module")
def small(keys):
    return SealedParquet(pa.table({"a": [1, 2, 3]}), key=keys[0], store_schema=False, **OPTIONS)


@pytest.fixture(scope="module")
def mixed(keys):
    return SealedParquet(table_of(1), columns={"a": keys[0], "b": keys[1]}, **OPTIONS)


def siblings(key, columns=None):
    """Return two files of one size, with the same data keys, as those of one bundle."""
    column_keys = ColumnKeys.of(key if columns is None else None, columns)
    data_keys = column_keys.generate(CONTEXT)
    files = []
    for offset in (1, 2):
        stream, key_file = io.BytesIO(), io.BytesIO()
        output = StreamOutput(stream, key_file.write)
        table = table_of(offset)
        with EncryptedParquetWriter(
            output, table.schema, data_keys, column_keys, CONTEXT, name="f", options=OPTIONS
        ) as writer:
            writer.write_table(table, 4)
        files.append((stream.getvalue(), key_file.getvalue()))
    assert len(files[0][0]) == len(files[1][0])
    return files


def opened(file, key_file, keys):
    return open_parquet(io.BytesIO(file), key=keys, context=CONTEXT, key_file=key_file)


def chunk(reader, row_group, column):
    """Return where a column chunk is."""
    assert "denied" not in reader.columns.values()  # now all keys are there; pyarrow would abort without
    found = reader._file.metadata.row_group(row_group).column(column)
    return slice(found.data_page_offset, found.data_page_offset + found.total_compressed_size)


FLIPS = """
import io, json, random, sys
from collections import Counter
from pathlib import Path
from beam_envelope.errors import EnvelopeError
from beam_envelope.formats.parquet import open_parquet
from beam_envelope.keys.context import ANY_CONTEXT

folder, keys, choice, columns = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
file, key_file = (folder / "f").read_bytes(), (folder / "k").read_bytes()

def read(data):
    stream = io.BytesIO(data)
    return open_parquet(stream, key=keys, context=ANY_CONTEXT, key_file=key_file).read(columns).to_pydict()

right = read(file)
bits = range(8 * len(file)) if not choice else random.Random(7).sample(range(8 * len(file)), choice)
outcomes = Counter()
for bit in bits:
    changed = bytearray(file)
    changed[bit // 8] ^= 1 << bit % 8
    try:
        outcomes["same" if read(changed) == right else f"differs: {bit // 8}"] += 1
    except EnvelopeError as error:
        assert str(error).startswith("the Parquet file "), error
        outcomes[type(error).__name__] += 1
print(json.dumps(outcomes))
"""


def flip(sealed, keys, tmp_path, choice=0, columns=None):
    (tmp_path / "f").write_bytes(sealed.file)
    (tmp_path / "k").write_bytes(sealed.key_file)
    status, output = run_alone(
        FLIPS, tmp_path, json.dumps([str(key) for key in keys]), choice, json.dumps(columns), timeout=850
    )
    assert status == 0, output
    return json.loads(output)


@pytest.mark.timeout(900)  # 15 s on a machine that has nothing else to do
def test_every_flip_of_a_bit_is_an_error_where_all_is_under_one_key(keys, small, tmp_path):
    outcomes = flip(small, keys, tmp_path)
    assert sum(outcomes.values()) == 8 * len(small.file)
    assert set(outcomes) == {"TamperedError", "TruncatedError", "WrongKeyError"}


def test_flipped_bits_in_other_columns_do_not_change_what_is_encrypted(keys, mixed, tmp_path):
    outcomes = flip(mixed, keys, tmp_path, 1000, ["a", "b"])
    assert not [name for name in outcomes if name.startswith("differs")]
    assert outcomes["same"] < 400  # those in the plain column, and padding


def test_flipped_bits_in_plain_columns_are_an_error_or_other_data(keys, mixed, tmp_path):
    outcomes = flip(mixed, keys, tmp_path, 1000)
    assert any(name.startswith("differs") for name in outcomes)
    assert outcomes["TamperedError"] > 500


def test_a_file_that_was_cut_is_an_error(keys, small):
    for size in range(len(small.file)):
        with pytest.raises((TruncatedError, TamperedError)) as caught:
            small.open(keys, small.file[:size]).read()
        if size < 12:
            assert type(caught.value) is TruncatedError
    with pytest.raises(
        TruncatedError, match=r"^the Parquet file has 0 bytes, which no whole file has: it was cut short"
    ):
        small.open(keys, b"")
    with pytest.raises(TruncatedError, match=r"^the Parquet file does not end as an encrypted Parquet file does"):
        small.open(keys, small.file[:-1])
    with pytest.raises((TruncatedError, TamperedError)):
        small.open(keys, small.file + b"\0")


def test_a_plain_file_in_the_place_of_an_encrypted_one_is_an_error(keys, small):
    stream = io.BytesIO()
    pq.write_table(small.table, stream)
    with pytest.raises(
        NotEncryptedError, match=r"^the Parquet file is plain Parquet beside the key file of an encrypted"
    ):
        small.open(keys, stream.getvalue())
    with pytest.raises(TruncatedError):
        small.open(keys, b"PARE" + stream.getvalue()[4:])
    with pytest.raises(TamperedError):
        small.open(keys, b"PARE" + stream.getvalue()[4:-4] + b"PARE")


def test_a_weaker_algorithm_is_refused(keys, small):
    """AES_GCM_CTR_V1 does not authenticate pages, and pyarrow takes what the file says."""
    start = len(small.file) - 8 - int.from_bytes(small.file[-8:-4], "little")
    assert small.file[start : start + 4] == b"\x1c\x1c\x28\x08"
    changed = small.file[: start + 1] + b"\x2c" + small.file[start + 2 :]
    with pytest.raises(TamperedError, match=r"its footer does not begin as it should"):
        small.open(keys, changed)
    client = small.open(keys)._keys.client
    properties = pe.CryptoFactory(lambda _: client).file_decryption_properties(pe.KmsConnectionConfig())
    assert pq.ParquetFile(io.BytesIO(changed), decryption_properties=properties).metadata.num_rows == 3


@pytest.mark.parametrize("column", [0, 1])
def test_a_column_chunk_of_a_sibling_is_refused(keys, column):
    (one, key_file), (other, _) = siblings(keys[0])
    reader = opened(one, key_file, keys)
    place = chunk(reader, 1, column)
    changed = one[: place.start] + other[place] + one[place.stop :]
    assert changed != one
    with pytest.raises(TamperedError, match=r"was changed after it was written, or damaged: "):
        opened(changed, key_file, keys).read()
    assert opened(changed, key_file, keys).read_row_group(0).equals(table_of(1).slice(0, 4))


def test_a_plain_column_chunk_of_a_sibling_is_read(keys):
    (one, key_file), (other, _) = siblings(None, {"a": keys[0], "b": keys[1]})
    place = chunk(opened(one, key_file, keys), 1, 2)
    reader = opened(one[: place.start] + other[place] + one[place.stop :], key_file, keys)
    assert reader.columns["c"] == "plain"
    assert reader.read(["c"])["c"].to_pylist()[4:] == table_of(2)["c"].to_pylist()[4:]
    assert reader.read(["a", "b"]).equals(table_of(1).select(["a", "b"]))


@pytest.mark.parametrize(("one", "other"), [((0, 0), (0, 1)), ((0, 0), (1, 0))], ids=["columns", "row groups"])
def test_column_chunks_that_changed_places_are_refused(keys, one, other):
    for sealed in (
        SealedParquet(table_of(1), key=keys[0], **OPTIONS),
        SealedParquet(table_of(1), key=keys[0], columns={"a": keys[1]}, **OPTIONS),
    ):
        reader = sealed.open(keys)
        here, there = chunk(reader, *one), chunk(reader, *other)
        changed = bytearray(sealed.file)
        changed[here], changed[there] = sealed.file[there], sealed.file[here]
        with pytest.raises(TamperedError):
            sealed.open(keys, changed).read(["a", "b"])


def test_files_that_were_swapped_are_an_error(keys):
    """Also those of one bundle, which have the same data keys."""
    (one, its_key_file), (other, _) = siblings(keys[0])
    assert opened(one, its_key_file, keys).num_rows == 8
    with pytest.raises(WrongKeyError, match=r"^the Parquet file and its key file do not belong together: "):
        opened(other, its_key_file, keys)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"created": "2020-01-01T00:00:00Z"},
        {"shard_id": uuid.UUID(int=5)},
        {"compression": "zstd"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_key_file_that_was_changed_is_an_error(keys, small, change):
    key_file = replace(KeyFile.from_bytes(small.key_file, "k"), **change).to_bytes()
    with pytest.raises(WrongKeyError, match=r"belong together"):
        open_parquet(io.BytesIO(small.file), key=keys, context=ANY_CONTEXT, key_file=key_file)


def test_data_keys_that_changed_places_in_the_key_file_are_an_error(keys):
    sealed = SealedParquet(table_of(1), key=keys[0], columns={"a": keys[1], "b": keys[2]}, **OPTIONS)
    key_file = KeyFile.from_bytes(sealed.key_file, "k")
    first, second, third = key_file.data_keys
    for changed, columns in (((second, first, third), None), ((first, third, second), ["a"]), ((first,), ["c"])):
        raw = key_file.with_wrapped_keys(changed).to_bytes()
        with pytest.raises((WrongKeyError, FormatError), match=r"belong together|does not say which columns are under"):
            open_parquet(io.BytesIO(sealed.file), key=keys, context=CONTEXT, key_file=raw).read(columns)


def test_the_entry_for_the_columns_means_what_was_assigned():
    leaves = ["a", "b", "c.d", "e"]
    for assigned in (
        dict.fromkeys(leaves, 0),
        {"a": 1, "b": 0, "c.d": 2, "e": 0},
        {"a": 1, "b": None, "c.d": None, "e": None},
        {"a": 0, "b": None, "c.d": 0, "e": 1},
    ):
        assert decode_columns(encode_columns(assigned), leaves, 3, "f") == assigned
    assert encode_columns({"a": 1, "b": 0, "e": 0}) == b'{"columns": {"k1": ["a"]}, "rest": "k0"}'


@pytest.mark.parametrize(
    "entry",
    [
        b"",
        b"[]",
        b"{}",
        b'{"columns": {}, "rest": "k3"}',
        b'{"columns": {"k1": ["x"]}, "rest": "k0"}',
        b'{"columns": {"k3": ["a"]}, "rest": "k0"}',
        b'{"columns": {"k1": [["a"]]}, "rest": "k0"}',
        b'{"columns": ["a"], "rest": "k0"}',
        b"[" * 100_000,
    ],
)
def test_an_entry_for_the_columns_that_makes_no_sense_is_a_format_error(entry):
    with pytest.raises(FormatError) as caught:
        decode_columns(entry, ["a", "b"], 3, "part-0")
    assert str(caught.value) == (
        f"the footer of part-0 does not say which columns are under which key ({COLUMNS_ENTRY}). Write it again"
    )
