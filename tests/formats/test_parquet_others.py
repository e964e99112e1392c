"""Other software and encrypted Parquet: keys found as docs/format.md says open it; what follows that page, we read."""

import base64
import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from beam_envelope.errors import FormatError, TamperedError
from beam_envelope.formats.keyfile import PARQUET_CIPHER, KeyFile, WrappedDataKey
from beam_envelope.formats.parquet import open_parquet
from tests.formats.parquets import CONTEXT, PEOPLE, SealedParquet

TABLE = PEOPLE.select(["id", "name", "ssn", "address", "tags", "flag", "day", "money"])
LEAVES = [
    *("id", "name", "ssn", "address.zip", "address.geo.lat", "address.geo.lon", "tags.list.element"),
    *("flag", "day", "money"),
]


@pytest.fixture(scope="module")
def uniform(keys):
    return SealedParquet(TABLE, key=keys[0])


@pytest.fixture(scope="module")
def by_column(keys):
    return SealedParquet(TABLE, key=keys[0], columns={"ssn": keys[1], "address": keys[2]})


# Polars


def read_with_polars(file, footer_key, column_keys, columns=None):
    polars = pytest.importorskip("polars")
    keys = polars.ParquetDecryptionProperties(footer_key=footer_key, column_keys=column_keys)
    return polars.read_parquet(io.BytesIO(file), columns=columns, decryption=keys).to_dicts()


def test_polars_reads_a_file_under_one_key(keys, uniform):
    footer_key, columns = uniform.parquet_keys(keys)
    assert (len(footer_key), columns) == (32, [])
    assert read_with_polars(uniform.file, footer_key, None) == TABLE.to_pylist()


def test_polars_reads_the_columns_whose_keys_it_has(keys, by_column):
    footer_key, columns = by_column.parquet_keys(keys)
    column_keys = dict(zip(LEAVES, columns, strict=True))
    assert len({footer_key, *columns}) == 1 + len(LEAVES)
    assert {len(key) for key in columns} == {32}
    assert read_with_polars(by_column.file, footer_key, column_keys) == TABLE.to_pylist()
    del column_keys["ssn"]
    assert read_with_polars(by_column.file, footer_key, column_keys, ["name"]) == TABLE.select(["name"]).to_pylist()
    with pytest.raises(Exception, match=r"(?i)key|decrypt"):
        read_with_polars(by_column.file, footer_key, column_keys, ["ssn"])


def test_polars_reads_plain_columns_beside_an_encrypted_one(keys):
    sealed = SealedParquet(TABLE, columns={"ssn": keys[1]})
    footer_key, (ssn,) = sealed.parquet_keys(keys)
    assert read_with_polars(sealed.file, footer_key, {"ssn": ssn}) == TABLE.to_pylist()


# DuckDB


def read_with_duckdb(file, footer_key, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    (tmp_path / "f.parquet").write_bytes(file)
    with duckdb.connect() as connection:
        connection.execute(f"PRAGMA add_parquet_key('ours', '{base64.b64encode(footer_key).decode()}')")
        query = "SELECT * FROM read_parquet(?, encryption_config={footer_key: 'ours'})"
        return connection.execute(query, [str(tmp_path / "f.parquet")]).fetchall()


def test_duckdb_reads_a_file_under_one_key(keys, tmp_path):
    flat = TABLE.drop_columns(["address", "tags"])
    sealed = SealedParquet(flat, key=keys[0])
    rows = read_with_duckdb(sealed.file, sealed.parquet_keys(keys)[0], tmp_path)
    assert rows == [tuple(row.values()) for row in flat.to_pylist()]


def test_duckdb_does_not_read_encrypted_columns_that_are_nested(keys, tmp_path):
    """docs/parquet.md says so; when this fails, mend it there."""
    sealed = SealedParquet(TABLE.select(["address"]), key=keys[0])
    with pytest.raises(Exception, match="AES tag differs"):
        read_with_duckdb(sealed.file, sealed.parquet_keys(keys)[0], tmp_path)


# pyarrow, with a KmsClient of a dozen lines


class DocumentedClient(pe.KmsClient):
    """Wraps and unwraps as docs/format.md says."""

    def __init__(self, data_keys, binding):
        super().__init__()
        self.binding = binding
        self.keys = {f"k{number}": self.derive(material) for number, material in enumerate(data_keys)}

    def derive(self, material):
        return AESGCM(HKDFExpand(hashes.SHA512(), 32, b"beam-envelope/parquet@v1\0" + self.binding).derive(material))

    def wrap_key(self, key_bytes, name):
        nonce = os.urandom(12)
        sealed = self.keys[name].encrypt(nonce, key_bytes, self.binding + name.encode())
        return base64.b64encode(nonce + sealed).decode()

    def unwrap_key(self, wrapped, name):
        token = base64.b64decode(wrapped)
        return self.keys[name].decrypt(token[:12], token[12:], self.binding + name.encode())


def materials(key_file, keys):
    for number, entry in enumerate(key_file.data_keys):
        with keys[number].unwrap(entry.wrapped_keys[0], key_file.context) as data_key:
            yield bytes(data_key.material)


def test_pyarrow_reads_our_files(keys, by_column):
    key_file = KeyFile.from_bytes(by_column.key_file, "k")
    client = DocumentedClient(materials(key_file, keys), key_file.binding())
    factory = pe.CryptoFactory(lambda _: client)
    properties = factory.file_decryption_properties(pe.KmsConnectionConfig())
    table = pq.read_table(io.BytesIO(by_column.file), decryption_properties=properties, use_threads=False)
    assert table.equals(TABLE)


def write_with_pyarrow(keys, entry=None, **configuration):
    """Write a file as docs/format.md says, with nothing of ours but the key file; return it and its key file."""
    data_keys = [key.generate_data_key(CONTEXT) for key in keys]
    key_file = KeyFile(tuple(map(WrappedDataKey.of, data_keys)), CONTEXT, cipher=PARQUET_CIPHER, name="theirs")
    client = DocumentedClient([bytes(data_key.material) for data_key in data_keys], key_file.binding())
    factory = pe.CryptoFactory(lambda _: client)
    settings = {"double_wrapping": False, "data_key_length_bits": 256, **configuration}
    properties = factory.file_encryption_properties(
        pe.KmsConnectionConfig(), pe.EncryptionConfiguration(footer_key="k0", **settings)
    )
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, TABLE.schema, encryption_properties=properties) as writer:
        writer.write_table(TABLE, 3)
        if entry is not None:
            writer.add_key_value_metadata({"beam-envelope.columns": entry})
    return stream.getvalue(), key_file.to_bytes()


def open_theirs(file, key_file, keys, **settings):
    return open_parquet(io.BytesIO(file), key=keys, context=CONTEXT, key_file=key_file, **settings)


def test_we_read_what_pyarrow_wrote_under_one_key(keys):
    file, key_file = write_with_pyarrow(keys[:1], uniform_encryption=True)
    with open_theirs(file, key_file, keys) as reader:
        assert reader.read().equals(TABLE)
        assert set(reader.columns.values()) == {"readable"}


def test_we_read_what_pyarrow_wrote_column_by_column(keys):
    entry = '{"columns": {"k1": ["ssn", "address.zip"], "k0": ["id"]}, "rest": "plain"}'
    file, key_file = write_with_pyarrow(keys[:2], entry, column_keys={"k1": ["ssn", "address.zip"], "k0": ["id"]})
    assert open_theirs(file, key_file, keys).read().equals(TABLE)
    with open_theirs(file, key_file, keys[0], on_denied="drop") as reader:
        assert {leaf for leaf, access in reader.columns.items() if access == "denied"} == {"ssn", "address.zip"}
        assert reader.read(["name", "tags", "id"]).equals(TABLE.select(["name", "tags", "id"]))
        assert "ssn" not in reader.schema.names


def test_an_entry_that_is_wrong_about_a_column_gives_an_error(keys):
    file, key_file = write_with_pyarrow(
        keys[:2], '{"columns": {}, "rest": "k0"}', column_keys={"k1": ["ssn"], "k0": ["id"]}
    )
    reader = open_theirs(file, key_file, keys)
    with pytest.raises(Exception, match="has a column under the data key 'k1', which is not open here") as caught:
        reader.read()
    assert type(caught.value).__module__ == "beam_envelope.errors"
    assert reader.read(["id", "name"]).equals(TABLE.select(["id", "name"]))


@pytest.mark.parametrize(
    "configuration",
    [
        {"double_wrapping": True},
        {"encryption_algorithm": "AES_GCM_CTR_V1"},
        {"plaintext_footer": True, "column_keys": {"k0": ["id"]}, "uniform_encryption": False},
    ],
    ids=["double wrapping", "CTR", "plaintext footer"],
)
def test_what_does_not_follow_the_format_is_refused(keys, configuration):
    file, key_file = write_with_pyarrow(keys[:1], **{"uniform_encryption": True, **configuration})
    with pytest.raises((TamperedError, FormatError, Exception)) as caught:
        open_theirs(file, key_file, keys)
    assert type(caught.value).__module__ == "beam_envelope.errors"


def test_keys_of_128_bits_are_refused(keys):
    with pytest.raises(TamperedError, match="a key in it has the wrong form"):
        open_theirs(*write_with_pyarrow(keys[:1], uniform_encryption=True, data_key_length_bits=128), keys)


def test_a_table_of_pyarrows_own_file_is_the_same(keys, by_column):
    stream = io.BytesIO()
    pq.write_table(TABLE, stream, row_group_size=4)
    bare = pq.ParquetFile(stream)
    with by_column.open(keys) as reader:
        assert reader.schema.equals(bare.schema_arrow, check_metadata=True)
        ours = pa.Table.from_batches(reader.iter_batches(batch_size=3))
        assert ours.equals(pa.Table.from_batches(bare.iter_batches(batch_size=3)))
