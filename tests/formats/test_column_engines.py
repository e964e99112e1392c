"""Raw cells in programs that we did not write: Spark's aes_encrypt and aes_decrypt, and Tink."""

# ruff: noqa: S608  # the queries are made of our own names and keys

import datetime as dt
import decimal

import pyarrow as pa
import pytest

from beam_envelope.formats.keyfile import RAW_CELL_CIPHER
from beam_envelope.formats.keystore import LocalKeyStore
from beam_envelope.formats.record import RecordDecryptor, RecordEncryptor
from beam_envelope.formats.table import decrypt_columns, encrypt_columns
from beam_envelope.keys.cache import DataKeyPolicy

TABLE = pa.table(
    {
        "email": pa.array(["ada@x.org", None, "", "größe"]),
        "raw": pa.array([b"\0\xff", b"", None, b"x"]),
        "n": pa.array([1, None, -(2**63), 2**63 - 1]),
        "f": pa.array([0.1, -0.0, 1e300, None]),
        "ok": pa.array([True, False, None, True]),
        "price": pa.array(
            [decimal.Decimal("1.50"), None, decimal.Decimal("-0.01"), decimal.Decimal(0)], pa.decimal128(9, 2)
        ),
        "day": pa.array([dt.date(2026, 2, 28), None, dt.date(1970, 1, 1), dt.date(1969, 12, 31)]),
        "at": pa.array([dt.datetime(2026, 1, 2, 3, 4, 5, 678), None, None, None], pa.timestamp("us")),  # noqa: DTZ001
    }
)
CASTS = {
    "email": "string", "raw": "binary", "n": "bigint", "f": "double", "ok": "boolean", "price": "decimal(9,2)",
    "day": "date", "at": "timestamp_ntz",
}  # fmt: skip


class Raw:
    """Our side: raw cells, and their keys by key id."""

    def __init__(self, key, folder):
        store = LocalKeyStore(folder)
        self.encryptor = RecordEncryptor([key], store, {}, DataKeyPolicy(), RAW_CELL_CIPHER)
        self.decryptor = RecordDecryptor([key], store, {})

    def encrypt(self, table, columns):
        return encrypt_columns(table, columns, self.encryptor, layout="raw")

    def key_of(self, key_id):
        return self.decryptor.key(bytes.fromhex(key_id), RAW_CELL_CIPHER).raw_key()

    def new_key(self):
        """Return a key id and its key, for another program to encrypt with."""
        key, _ = self.encryptor.reserve(1, 1)
        return key.key_id.hex(), key.raw_key()


@pytest.fixture
def raw(local_key, tmp_path):
    return Raw(local_key, tmp_path / "keys")


@pytest.fixture(scope="module")
def spark(tmp_path_factory):
    sql = pytest.importorskip("pyspark.sql")
    warehouse = tmp_path_factory.mktemp("warehouse")
    session = (
        sql.SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.warehouse.dir", str(warehouse))
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .getOrCreate()
    )
    yield session
    session.stop()


def view(spark, name, table, path):
    """Let Spark read a table, through Parquet."""
    import pyarrow.parquet as pq

    pq.write_table(table, path)
    spark.read.parquet(str(path)).createOrReplaceTempView(name)


def test_spark_reads_every_type_from_our_raw_cells(spark, raw, tmp_path):
    sealed = raw.encrypt(TABLE, TABLE.column_names)
    view(spark, "sealed", sealed, tmp_path / "sealed.parquet")
    (key_id,) = {one for one in sealed.column("email_key_id").to_pylist() if one}
    key = raw.key_of(key_id).hex()
    opened = {name: f"aes_decrypt({name}, unhex('{key}'), 'GCM', 'DEFAULT', '{name}')" for name in TABLE.column_names}
    casts = [
        f"CAST(CAST({opened[name]} AS STRING) AS {kind}) AS {name}" for name, kind in CASTS.items() if name != "raw"
    ]
    rows = spark.sql(f"SELECT {', '.join(casts)}, {opened['raw']} AS raw FROM sealed").collect()
    found = [{name: row[name] for name in TABLE.column_names} for row in rows]
    for row in found:
        row["raw"] = None if row["raw"] is None else bytes(row["raw"])
    assert found == TABLE.to_pylist()


@pytest.mark.parametrize("aad", ["other", ""])
def test_spark_refuses_a_cell_of_another_column(spark, raw, tmp_path, aad):
    sealed = raw.encrypt(TABLE.select(["email"]), ["email"])
    view(spark, "moved", sealed, tmp_path / "moved.parquet")
    key = raw.key_of(sealed.column("email_key_id")[0].as_py()).hex()
    with pytest.raises(Exception, match=r"AES_CRYPTO_ERROR|Tag mismatch|AEADBadTag"):
        spark.sql(f"SELECT aes_decrypt(email, unhex('{key}'), 'GCM', 'DEFAULT', '{aad}') FROM moved").collect()


def test_we_read_what_spark_encrypts(spark, raw, tmp_path):
    view(spark, "plain", TABLE.select(["email", "n"]), tmp_path / "plain.parquet")
    key_id, key = raw.new_key()
    cells = [
        f"aes_encrypt(CAST({name} AS STRING), unhex('{key.hex()}'), 'GCM', 'DEFAULT', '', '{name}') AS {name}, "
        f"IF({name} IS NULL, NULL, '{key_id}') AS {name}_key_id"
        for name in ("email", "n")
    ]
    rows = spark.sql(f"SELECT {', '.join(cells)} FROM plain").collect()
    columns = {name: [row[name] for row in rows] for name in ("email", "email_key_id", "n", "n_key_id")}
    sealed = pa.table(
        {
            name: pa.array(
                [bytes(one) if isinstance(one, bytearray) else one for one in values],
                pa.string() if name.endswith("_key_id") else pa.binary(),
            )
            for name, values in columns.items()
        }
    )
    back = decrypt_columns(sealed, {"email": pa.string(), "n": pa.int64()}, raw.decryptor)
    assert back.equals(TABLE.select(["email", "n"]))


@pytest.fixture
def tink_aead():
    """Return a function from a key of 32 bytes to Tink's AEAD with a RAW AES-GCM key: no prefix of Tink's."""
    tink = pytest.importorskip("tink")
    from tink import aead, secret_key_access
    from tink.proto import aes_gcm_pb2, tink_pb2

    aead.register()

    def make(key):
        value = aes_gcm_pb2.AesGcmKey(version=0, key_value=key).SerializeToString()
        data = tink_pb2.KeyData(
            type_url="type.googleapis.com/google.crypto.tink.AesGcmKey",
            value=value,
            key_material_type=tink_pb2.KeyData.SYMMETRIC,
        )
        entry = tink_pb2.Keyset.Key(
            key_data=data, status=tink_pb2.ENABLED, key_id=1, output_prefix_type=tink_pb2.OutputPrefixType.RAW
        )
        keyset = tink_pb2.Keyset(primary_key_id=1, key=[entry]).SerializeToString()
        return tink.proto_keyset_format.parse(keyset, secret_key_access.TOKEN).primitive(aead.Aead)

    return make


def test_tink_reads_our_raw_cells(raw, tink_aead):
    sealed = raw.encrypt(TABLE.select(["email", "n"]), ["email", "n"])
    for row, values in zip(sealed.to_pylist(), TABLE.to_pylist(), strict=True):
        for name in ("email", "n"):
            if row[name] is not None:
                opened = tink_aead(raw.key_of(row[f"{name}_key_id"])).decrypt(row[name], name.encode())
                assert opened == str(values[name]).encode()


def test_we_read_what_tink_encrypts(raw, tink_aead):
    key_id, key = raw.new_key()
    cells = [None if one is None else tink_aead(key).encrypt(one.encode(), b"email") for one in ("Ada", None, "")]
    ids = [None if one is None else key_id for one in cells]
    sealed = pa.table({"email": pa.array(cells, pa.binary()), "email_key_id": pa.array(ids)})
    back = decrypt_columns(sealed, {"email": pa.string()}, raw.decryptor)
    assert back.column("email").to_pylist() == ["Ada", None, ""]
