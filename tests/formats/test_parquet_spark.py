"""Spark reads our Parquet files through a small KmsClient, and we read what Spark wrote through it.

Needs pyspark and a Java compiler; skipped without.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from beam_envelope.formats.keyfile import PARQUET_CIPHER, KeyFile, WrappedDataKey
from beam_envelope.formats.parquet import open_parquet
from tests.formats.alone import run_alone
from tests.formats.parquets import CONTEXT, PEOPLE, SealedParquet

pyspark = pytest.importorskip("pyspark")
JAVAC = shutil.which("javac")
pytestmark = pytest.mark.skipif(JAVAC is None, reason="there is no `javac` on the PATH")

TABLE = PEOPLE.select(["ssn", "id", "name", "address", "tags", "scores", "flag"])

SPARK = """
import json
from pyspark.sql import SparkSession
settings, path, *queries = json.loads(sys.argv[1])
builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
for name, value in settings.items():
    builder = builder.config(name, value)
spark = builder.getOrCreate()
if not queries:
    frame = spark.createDataFrame([(number, f"row {number}") for number in range(100)], "id long, name string")
    frame.coalesce(1).write.parquet(path)
for columns in queries:
    try:
        rows = spark.read.parquet(path).select(*columns).collect()
        print("ROWS", json.dumps([row.asDict(recursive=True) for row in rows]))
    except Exception as error:
        print("ERROR", str(error).replace("\\n", " "))
print("DONE")
"""


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """The folder of the compiled KmsClient."""
    folder = tmp_path_factory.mktemp("classes")
    jars = Path(pyspark.__file__).parent / "jars" / "*"
    source = Path(__file__).parent / "spark" / "DocumentedClient.java"
    subprocess.run([JAVAC, "-cp", str(jars), "-d", str(folder), str(source)], check=True, capture_output=True)
    return folder


def spark(classes, key_file, wrapping_keys, path, *queries, **encryption):
    """Have Spark write a file, or read some columns for each query; return a list of rows, or an error, for each."""
    settings = {
        "spark.driver.extraClassPath": str(classes),
        "spark.hadoop.parquet.crypto.factory.class": "org.apache.parquet.crypto.keytools.PropertiesDrivenCryptoFactory",
        "spark.hadoop.parquet.encryption.kms.client.class": "DocumentedClient",
        "spark.hadoop.documented.binding": key_file.binding().hex(),
        **{f"spark.hadoop.documented.key.{name}": key.hex() for name, key in wrapping_keys.items()},
        **{f"spark.hadoop.parquet.encryption.{name}": value for name, value in encryption.items()},
    }
    status, output = run_alone(SPARK, json.dumps([settings, str(path), *queries]), timeout=280)
    lines = output.splitlines()
    assert (status, lines[-1:]) == (0, ["DONE"]), output
    rows = [json.loads(line.removeprefix("ROWS ")) for line in lines if line.startswith("ROWS ")]
    return [*rows, *(line for line in lines if line.startswith("ERROR "))]


def wrapping_keys_of(key_file, keys):
    """Return the wrapping keys as docs/format.md derives them."""
    found = {}
    for number, (entry, key) in enumerate(zip(key_file.data_keys, keys, strict=False)):
        with key.unwrap(entry.wrapped_keys[0], key_file.context) as data_key:
            info = b"beam-envelope/parquet@v1\0" + key_file.binding()
            found[f"k{number}"] = HKDFExpand(hashes.SHA512(), 32, info).derive(data_key.material)
    return found


def test_spark_reads_our_files(keys, classes, tmp_path):
    sealed = SealedParquet(TABLE, key=keys[0], columns={"ssn": keys[1], "address.zip": keys[1]})
    (tmp_path / "f.parquet").write_bytes(sealed.file)
    key_file = KeyFile.from_bytes(sealed.key_file, "k")
    (rows,) = spark(classes, key_file, wrapping_keys_of(key_file, keys), tmp_path / "f.parquet", TABLE.schema.names)
    expected = [{**row, "scores": None if row["scores"] is None else dict(row["scores"])} for row in TABLE.to_pylist()]
    assert rows == json.loads(json.dumps(expected))


def test_spark_without_a_key_reads_the_other_columns(keys, classes, tmp_path):
    sealed = SealedParquet(TABLE, key=keys[0], columns={"ssn": keys[1]})
    (tmp_path / "f.parquet").write_bytes(sealed.file)
    key_file = KeyFile.from_bytes(sealed.key_file, "k")
    one = {"k0": wrapping_keys_of(key_file, keys)["k0"]}
    rows, error = spark(classes, key_file, one, tmp_path / "f.parquet", ["id", "name"], ["ssn"])
    assert rows == TABLE.select(["id", "name"]).to_pylist()
    assert "no wrapping key k1" in error


def test_we_read_what_spark_wrote(keys, classes, tmp_path):
    data_key = keys[0].generate_data_key(CONTEXT)
    key_file = KeyFile((WrappedDataKey.of(data_key),), CONTEXT, cipher=PARQUET_CIPHER)
    encryption = {"uniform.key": "k0", "double.wrapping": "false", "data.key.length.bits": "256"}
    assert spark(classes, key_file, wrapping_keys_of(key_file, keys), tmp_path / "out", **encryption) == []
    (path,) = (tmp_path / "out").glob("*.parquet")
    with open_parquet(path, key=keys, context=CONTEXT, key_file=key_file.to_bytes()) as reader:
        assert reader.read().to_pylist() == [{"id": number, "name": f"row {number}"} for number in range(100)]
