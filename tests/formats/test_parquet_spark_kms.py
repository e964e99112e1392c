"""The Java classes of docs/spark, compiled and run: Spark opens files through key files or its own key tools, with KMS.

Needs pyspark, a Java compiler, and the AWS SDK for Java in Maven's local repository; skipped without.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.formats.parquet import create_parquet, open_parquet
from beam_envelope.keys.cache import clear_caches
from tests.formats.alone import run_alone
from tests.formats.parquets import PEOPLE

pyspark = pytest.importorskip("pyspark")
ROOT = Path(__file__).parents[2]
POM = Path(__file__).parent / "spark" / "pom.xml"
TOOLS = [tool for tool in ("javac", "mvn") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(TOOLS), reason=f"not on the PATH: {TOOLS}")

TABLE = PEOPLE.select(["ssn", "id", "name", "address", "tags", "flag"])
ROWS = TABLE.to_pylist()
CONTEXT = {"dataset": "people"}  # as in docs/parquet.md
EVERYONE, PII = "aws-kms://alias/everyone", "aws-kms://alias/pii"

SPARK = """
import json
from pyspark.sql import SparkSession
settings, steps = json.loads(sys.argv[1])
builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
for name, value in settings.items():
    builder = builder.config(name, value)
spark = builder.getOrCreate()
for path, columns, options in steps:
    try:
        if columns is None:
            rows = [(n, f"row {n}", f"123-45-{n:04}") for n in range(100)]
            frame = spark.createDataFrame(rows, "id long, a string, b string")
            frame.coalesce(1).write.options(**options).parquet(path)
            rows = []
        else:
            rows = [row.asDict(recursive=True) for row in spark.read.parquet(path).select(*columns).collect()]
        print("ROWS", json.dumps(rows))
    except Exception as error:
        print("ERROR", json.dumps(str(error)))
print("DONE")
"""


@pytest.fixture(scope="module")
def class_path(tmp_path_factory):
    """The compiled classes, and the AWS SDK."""
    folder = tmp_path_factory.mktemp("classes")
    found = folder / "class-path"
    maven = ["mvn", "-o", "-q", "-B", "-f", POM, "dependency:build-classpath", f"-Dmdep.outputFile={found}"]
    if subprocess.run(list(map(str, maven)), check=False, capture_output=True).returncode:
        pytest.skip("there is no AWS SDK for Java: mvn -f tests/formats/spark/pom.xml dependency:build-classpath")
    sdk = found.read_text()
    jars = Path(pyspark.__file__).parent / "jars" / "*"
    sources = [str(path) for path in (ROOT / "docs" / "spark").glob("*.java")]
    compiler = ["javac", "-Xlint:all,-processing,-path", "-cp", f"{jars}:{sdk}", "-d", str(folder), *sources]
    done = subprocess.run(compiler, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return f"{folder}:{sdk}"


def documented_settings():
    """Return the settings that the guide shows."""
    guide = (ROOT / "docs" / "parquet.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```properties\n(.*?)```", guide, re.DOTALL)
    return dict(re.split(r"\s+", line, maxsplit=1) for line in block.splitlines())


def spark(class_path, *steps, **changes):
    """Have Spark read columns of files, or write one; return rows, or the text of an error, for each step."""
    settings = {"spark.driver.extraClassPath": class_path, **documented_settings()}
    settings |= {f"spark.hadoop.beam.envelope.{name}": value for name, value in changes.items()}
    asked = [[str(path), columns, options] for path, columns, *rest in steps for options in [*rest, {}][:1]]
    status, output = run_alone(SPARK, json.dumps([settings, asked]), timeout=280)
    lines = output.splitlines()
    assert (status, lines[-1:]) == (0, ["DONE"]), output
    return [json.loads(line.partition(" ")[2]) for line in lines if line.startswith(("ROWS ", "ERROR "))]


@pytest.fixture
def kms(fake_kms):
    for name in ("everyone", "pii", "other"):
        fake_kms.create_key(name)
    return fake_kms


def write(path, **settings):
    with create_parquet(path, TABLE.schema, **{"key": EVERYONE, "columns": {"ssn": PII}, **settings}) as writer:
        writer.write_table(TABLE, 4)
    return path


def swap_key_files(one, other):
    for source, target in ((one, other), (other, one)):
        target.with_name(key_file_name(target.name) + ".new").write_bytes(
            source.with_name(key_file_name(source.name)).read_bytes()
        )
    for path in (one, other):
        new = path.with_name(key_file_name(path.name) + ".new")
        new.replace(path.with_name(key_file_name(path.name)))


def test_spark_reads_what_it_may_and_refuses_what_was_changed(kms, class_path, tmp_path):
    default = write(tmp_path / "default.parquet", context=CONTEXT)
    several = write(tmp_path / "several.parquet", context=CONTEXT, key=["aws-kms://alias/other", EVERYONE], columns={})
    interop = write(tmp_path / "interop.parquet", interop=True)
    other_context = write(tmp_path / "context.parquet", context={"dataset": "others"})
    under_other = write(tmp_path / "other.parquet", context=CONTEXT, key="aws-kms://alias/other", columns={})
    one, two = (write(tmp_path / f"{name}.parquet", context=CONTEXT) for name in ("one", "two"))
    swap_key_files(one, two)
    plain = write(tmp_path / "plain.parquet", context=CONTEXT)
    pq.write_table(TABLE, plain)
    counter = write(tmp_path / "ctr.parquet", context=CONTEXT)
    data = bytearray(counter.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert data[footer : footer + 3] == b"\x1c\x1c\x28"  # EncryptionAlgorithm, its field 1: AES_GCM_V1
    data[footer + 1] = 0x2C  # its field 2: AES_GCM_CTR_V1
    counter.write_bytes(data)
    before = kms.calls
    names = TABLE.schema.names
    paths = [default, several, interop, other_context, under_other, one, plain, counter]
    read = spark(class_path, *((path, names) for path in paths))
    assert read[:3] == [ROWS, ROWS, ROWS]
    assert (kms.calls - before)["Decrypt"] <= 14  # however often Spark asks for keys
    assert "was written with the encryption context" in read[3]
    assert "alias/other" in read[4] or "none of beam.envelope.keys" in read[4] or "identify a CMK" in read[4]
    assert "one.parquet and its key file do not belong together" in read[5]
    assert "plain.parquet was changed: its footer is not encrypted" in read[6]
    assert "ctr.parquet was changed: its footer is not encrypted with AES_GCM_V1" in read[7]


def test_spark_without_a_key_reads_the_other_columns(kms, class_path, tmp_path):
    default = write(tmp_path / "default.parquet", context=CONTEXT)
    interop = write(tmp_path / "interop.parquet", interop=True)
    steps = [(path, columns) for path in (default, interop) for columns in (["id", "name"], ["ssn"])]
    read = spark(class_path, *steps, keys="alias/everyone")
    rows = TABLE.select(["id", "name"]).to_pylist()
    assert [read[0], read[2]] == [rows, rows]
    assert "alias/everyone: The key ID in the request does not identify a CMK" in read[1]
    assert "the KMS key alias/pii is none of beam.envelope.keys: alias/everyone" in read[3]


def test_keys_in_the_footer_and_any_context_are_opt_in(kms, class_path, tmp_path):
    interop = write(tmp_path / "interop.parquet", interop=True)
    other_context = write(tmp_path / "context.parquet", context={"dataset": "others", "ä": "ö"})
    plain = tmp_path / "plain.parquet"
    pq.write_table(TABLE, plain)
    arns = ", ".join(kms.create_key(name) for name in ("unused", "new"))
    arn = arns.rpartition(", ")[2]
    by_arn = write(tmp_path / "arn.parquet", key=f"aws-kms://{arn}", columns={})
    steps = [(path, TABLE.schema.names) for path in (interop, other_context, plain, by_arn)]
    read = spark(class_path, *steps, interop="false", context="any", keys=f"alias/everyone,alias/pii,{arns}")
    assert read[1:] == [ROWS, ROWS, ROWS]
    assert isinstance(read[0], str)


def test_we_read_what_spark_wrote(kms, class_path, tmp_path):
    footer, uniform = "parquet.encryption.footer.key", "parquet.encryption.uniform.key"
    columns = {footer: "alias/everyone", "parquet.encryption.column.keys": "alias/pii: b"}
    guide = (ROOT / "docs" / "parquet.md").read_text(encoding="utf-8")
    assert all(f'"{option}"' in guide for option in columns)
    single = {"parquet.encryption.double.wrapping": "false", "parquet.encryption.data.key.length.bits": "256"}
    ways = {
        "columns": columns,
        "single": {**columns, **single},
        "complete": {**columns, "parquet.encryption.complete.columns": "true"},
        "uniform": {uniform: "alias/pii", "parquet.encryption.kek.length.bits": "256"},
    }
    assert spark(class_path, *((tmp_path / name, None, options) for name, options in ways.items())) == [[]] * 4
    expected = [{"id": n, "a": f"row {n}", "b": f"123-45-{n:04}"} for n in range(100)]
    for name in ways:
        (path,) = (tmp_path / name).glob("*.parquet")
        clear_caches()  # Spark wraps the keys of several files under one key encryption key
        before = kms.calls
        with open_parquet(path, key=[EVERYONE, PII], interop=True) as reader:
            assert reader.read().to_pylist() == expected
            access = reader.columns
        assert (kms.calls - before) == {"Decrypt": 1 if name == "uniform" else 2}, name
        assert access["a"] == ("plain" if name in {"columns", "single"} else "readable")
        if name != "uniform":
            with open_parquet(path, key=EVERYONE, interop=True, on_denied="drop") as reader:
                assert reader.read(["id", "a"]).num_rows == 100
                assert reader.columns["b"] == "denied"
