"""Encrypted Parquet in Beam on several runners, stores and processes: retries, kills, KMS calls, S3."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.transforms.window import FixedWindows, TimestampedValue

from beam_envelope import (
    ReadAllEncryptedParquet,
    ReadEncryptedParquet,
    ReadEncryptedParquetBatched,
    WriteEncryptedParquet,
    jobs,
)
from beam_envelope.io import parquet_bundle, parquet_write
from beam_envelope.io.parquet_names import clean
from beam_envelope.io.parquet_read import open_parquet_at
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.testing import find_plaintext
from tests.io.parquet_helpers import ROWS, SCHEMA, all_rows, collect, error_of, pipeline, rows_of, write
from tests.running import listing, with_manifest

KEY = "aws-kms://alias/etl"
PII = "aws-kms://alias/pii"
CANARIES = (b"CANARY-NAME", b"CANARY-SSN")
MULTI = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")


@pytest.fixture
def two_keys(fake_kms):
    """A FakeKms with the keys KEY and PII."""
    fake_kms.create_key("etl")
    fake_kms.create_key("pii")
    return fake_kms


TABLES = [pa.Table.from_pylist(ROWS[start : start + 50], SCHEMA) for start in range(0, 1000, 50)]
"""The rows in pieces that are written as they come, where single rows would be gathered."""


class _Fails(beam.DoFn):
    """Raises at the table that begins with the row 700; with a mark, the first time only."""

    def __init__(self, mark=None):
        self._mark = mark and str(mark)

    def process(self, table):
        if table["id"][0].as_py() == 700 and not (self._mark and Path(self._mark).exists()):
            if self._mark:
                Path(self._mark).touch()
            raise RuntimeError("the worker went away")
        yield table


def once(mark, function, *, after):
    """Return a function that fails the first time, before or after it does its work."""
    mark = str(mark)  # a file, since what this holds is copied when it travels

    def fail(*args, **kwargs):
        result = function(*args, **kwargs) if after or Path(mark).exists() else None
        if not Path(mark).exists():
            Path(mark).touch()
            raise OSError("the disk went away")
        return result

    return fail


def unfinished(folder):
    return [name for name in listing(folder) if "_TMP_" in name]


@pytest.mark.parametrize("num_shards", [0, 2])
def test_a_bundle_that_is_tried_again_leaves_no_row_twice(tmp_path, local_key, num_shards):
    with pipeline(runner="BundleBasedDirectRunner") as p:
        tables = p | beam.Create([TABLES]) | beam.FlatMap(lambda tables: tables) | beam.ParDo(_Fails(tmp_path / "mark"))
        settings = {"key": local_key, "max_rows_per_file": 300, "num_shards": num_shards}
        _ = tables | WriteEncryptedParquet(f"{tmp_path}/out/part", SCHEMA, **settings)
    assert (tmp_path / "mark").exists()
    assert all_rows(f"{tmp_path}/out", local_key) == ROWS
    assert listing(tmp_path / "out") == with_manifest(*rows_of(f"{tmp_path}/out", local_key)), "no leftovers"
    assert find_plaintext([tmp_path], *CANARIES) == []


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", ["write", "close"])
@pytest.mark.parametrize("num_shards", [0, 2])
def test_a_writer_that_fails_once_leaves_no_row_twice(tmp_path, local_key, monkeypatch, step, after, num_shards):
    """Fails in our own step, also when a file is finished that nobody will hear of."""
    fail = once(tmp_path / "mark", getattr(parquet_bundle.OpenFile, step), after=after)
    monkeypatch.setattr(parquet_bundle.OpenFile, step, fail)
    with pipeline(runner="BundleBasedDirectRunner") as p:
        settings = {"key": local_key, "max_rows_per_file": 300, "num_shards": num_shards}
        _ = p | beam.Create(TABLES) | WriteEncryptedParquet(f"{tmp_path}/out/part", SCHEMA, **settings)
    assert (tmp_path / "mark").exists()
    assert all_rows(f"{tmp_path}/out", local_key) == ROWS
    assert listing(tmp_path / "out") == with_manifest(*rows_of(f"{tmp_path}/out", local_key))


@pytest.mark.parametrize("after", [False, True])
def test_a_move_that_fails_once_leaves_no_row_twice(tmp_path, local_key, monkeypatch, after):
    """Before the file moves, or after it did, when the worker dies with the news."""
    monkeypatch.setattr(parquet_write, "publish", once(tmp_path / "mark", parquet_write.publish, after=after))
    with pipeline(runner="BundleBasedDirectRunner") as p:
        settings = {"key": local_key, "max_rows_per_file": 300}
        _ = p | beam.Create(TABLES) | WriteEncryptedParquet(f"{tmp_path}/out/part", SCHEMA, **settings)
    assert (tmp_path / "mark").exists()
    assert all_rows(f"{tmp_path}/out", local_key) == ROWS
    found = rows_of(f"{tmp_path}/out", local_key)
    assert sorted(found) == [f"part-{number:05}-of-{len(found):05}.parquet" for number in range(len(found))]
    assert listing(tmp_path / "out") == with_manifest(*found)


def test_a_job_that_fails_leaves_nothing_that_is_read(tmp_path, local_key):
    p = pipeline()
    tables = p | beam.Create([TABLES]) | beam.FlatMap(lambda tables: tables) | beam.ParDo(_Fails())
    _ = tables | WriteEncryptedParquet(f"{tmp_path}/out/part", SCHEMA, key=local_key, max_rows_per_file=300)
    with pytest.raises(Exception, match="the worker went away"):
        p.run()
    with pytest.raises(FileNotFoundError):
        rows_of(f"{tmp_path}/out", local_key)
    left = [Path(name).name for name in listing(tmp_path / "out")]
    assert listing(tmp_path / "out") == unfinished(tmp_path / "out")
    assert len(left) == 2 * 2, "two files were finished; the third was dropped"
    assert find_plaintext([tmp_path], *CANARIES) == []


KILLED = """
    import os, signal, sys
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from beam_envelope import WriteEncryptedParquet
    from beam_envelope.io import parquet_bundle, parquet_names
    from tests.io.parquet_helpers import SCHEMA
    from tests.io.test_parquet_runners import TABLES

    key, *folders = sys.argv[1:]

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def slowly(tables, where):
        for table in tables:
            if table["id"][0].as_py() == 900 and where == "rows":
                die()
            yield table

    def write(folder):
        where = os.path.basename(folder)
        if where == "close":
            parquet_bundle.OpenFile.close = die
        if where == "move":
            parquet_names.FileSystems.rename = die
        with beam.Pipeline("FnApiRunner", options=PipelineOptions([])) as p:
            tables = p | beam.Create([TABLES]) | beam.FlatMap(slowly, where)
            _ = tables | WriteEncryptedParquet(f"{folder}/part", SCHEMA, key=key, max_rows_per_file=300)

    for folder in folders:
        child = os.fork()
        if child == 0:
            write(folder)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path, local_key):
    """Killed between two rows, before a file is finished, and before it is moved."""
    folders = [tmp_path / where for where in ("rows", "close", "move")]
    words = [sys.executable, "-c", textwrap.dedent(KILLED), str(local_key), *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, env=environment)
    assert done.stdout.split() == [b"-9"] * 3
    for folder in folders:
        assert unfinished(folder) != [], "it was killed while it wrote"
        assert listing(folder) == unfinished(folder)
        with pytest.raises(FileNotFoundError):
            ReadEncryptedParquet(f"{folder}/**", key=local_key)
    assert find_plaintext([tmp_path], *CANARIES) == []
    write(folders[0] / "part", local_key)
    assert all_rows(folders[0], local_key) == ROWS, "another run is not disturbed by what is left"


def test_a_bundle_asks_once_for_each_kms_key_and_a_process_once_for_each_data_key(tmp_path, two_keys):
    settings = {"columns": {"ssn": PII}, "max_rows_per_file": 100, "row_group_rows": 30}
    files = write(tmp_path / "part", KEY, **settings)
    assert len(files) == 10
    assert two_keys.calls == {"GenerateDataKey": 2 + 1}, "one bundle, ten files, two KMS keys; and the manifest's"
    clear_caches()
    rows = collect(ReadEncryptedParquet(f"{tmp_path}/part*", key=[KEY, PII]))
    assert sorted(rows, key=lambda row: row["id"]) == ROWS
    calls = two_keys.calls
    assert calls["GenerateDataKey"] == 2 + 1
    assert calls["Decrypt"] <= 4 + 1, (
        "each data key is asked of one KMS key; of the other only if it cannot be told apart"
    )
    clear_caches()
    before = two_keys.calls["Decrypt"]
    collect(ReadEncryptedParquetBatched(f"{tmp_path}/part*", key=KEY, columns=["id", "name"]))
    assert two_keys.calls["Decrypt"] == before + 1 + 1, "what is not read is not asked for"


def test_grouping_asks_once_in_a_bundle_too(tmp_path, two_keys):
    write(tmp_path / "part", KEY, num_shards=3, columns={"ssn": PII})
    assert two_keys.calls == {"GenerateDataKey": 1 + 2 + 1, "Decrypt": 1}


def test_metrics_count_rows_bytes_and_calls(tmp_path, two_keys):
    p = pipeline()
    _ = p | beam.Create(ROWS) | WriteEncryptedParquet(f"{tmp_path}/part", SCHEMA, key=KEY, num_shards=2)
    result = p.run()
    result.wait_until_finish()
    counters = jobs.counters(result)
    sizes = sum(path.stat().st_size for path in tmp_path.glob("part*"))
    assert counters["rows_encrypted"] == 1000
    assert counters["files"] == 2
    assert counters["bytes_ciphertext"] == sizes
    assert counters["bytes_plaintext"] > 30_000
    assert (counters["kms_GenerateDataKey"], counters["kms_Decrypt"]) == (2 + 1, 1)
    clear_caches()
    p = pipeline()
    _ = p | ReadEncryptedParquet(f"{tmp_path}/part*", key=KEY)
    result = p.run()
    result.wait_until_finish()
    counters = jobs.counters(result)
    assert (counters["rows_decrypted"], counters["kms_Decrypt"]) == (1000, 1 + 1)
    assert counters["bytes_plaintext"] > 30_000
    clear_caches()
    before = two_keys.calls
    p = pipeline()
    copied = p | ReadEncryptedParquet(f"{tmp_path}/part*", key=KEY)
    _ = copied | WriteEncryptedParquet(f"{tmp_path}/copy", SCHEMA, key=KEY, max_rows_per_file=50)
    result = p.run()
    result.wait_until_finish()
    calls = two_keys.calls - before
    assert {name: count for name, count in jobs.counters(result).items() if name.startswith("kms_")} == {
        f"kms_{operation}": count for operation, count in calls.items()
    }, "each call once, also where a reader and a writer share a thread"


def test_errors_of_the_kms_fail_the_job_also_where_denied_columns_are_null(tmp_path, two_keys):
    write(tmp_path / "part", KEY, columns={"ssn": PII})
    clear_caches()
    two_keys.deny("Decrypt", "alias/pii")
    read = collect(ReadEncryptedParquet(f"{tmp_path}/part*", key=[KEY, PII], on_denied="null"))
    assert {row["ssn"] for row in read} == {None}
    clear_caches()
    two_keys.deny("Decrypt")
    with pytest.raises(Exception, match="kms:Decrypt") as caught:
        collect(ReadEncryptedParquet(f"{tmp_path}/part*", key=KEY, on_denied="null"))
    assert "KeyAccessError" in error_of(caught)
    two_keys.deny("GenerateDataKey")
    with pytest.raises(Exception, match="kms:GenerateDataKey"):
        write(tmp_path / "other", KEY)


def test_several_processes_write_and_read(tmp_path, two_keys):
    with pipeline(*MULTI, runner="DirectRunner") as p:
        rows = p | beam.Create(ROWS) | beam.Reshuffle()
        files = rows | WriteEncryptedParquet(f"{tmp_path}/out/part", SCHEMA, key=KEY, columns={"ssn": PII})
        _ = files | beam.Map(lambda file: file.path) | beam.io.WriteToText(f"{tmp_path}/names")
    written = two_keys.calls["GenerateDataKey"]
    found = rows_of(f"{tmp_path}/out", [KEY, PII])
    assert sorted((row for rows in found.values() for row in rows), key=lambda row: row["id"]) == ROWS
    assert listing(tmp_path / "out") == with_manifest(*found)
    assert written == 2 * len(found) + 1, "a bundle for each file, and the manifest"
    clear_caches()
    before = two_keys.calls["Decrypt"]
    with pipeline(*MULTI, runner="DirectRunner") as p:
        read = p | ReadEncryptedParquet(f"{tmp_path}/out", key=[KEY, PII])
        _ = read | beam.Map(lambda row: row["id"]) | beam.io.WriteToText(f"{tmp_path}/ids")
    ids = [int(line) for path in tmp_path.glob("ids*") for line in path.read_text().split()]
    assert sorted(ids) == list(range(1000))
    processes = 2
    assert two_keys.calls["Decrypt"] - before <= processes * (2 * 2 * len(found) + 1)
    assert find_plaintext([tmp_path / "out"], *CANARIES) == []


def test_unbounded_input_on_several_bundles_uses_one_data_key(tmp_path, two_keys):
    from apache_beam.testing.test_stream import TestStream

    stream = TestStream()
    for number in range(4):
        stream = stream.add_elements([TimestampedValue(row, row["id"]) for row in ROWS[number * 10 : number * 10 + 10]])
        stream = stream.advance_watermark_to((number + 1) * 10)
    with pipeline("--streaming", runner="BundleBasedDirectRunner") as p:
        rows = p | stream.advance_watermark_to_infinity() | beam.WindowInto(FixedWindows(10))
        _ = rows | WriteEncryptedParquet(f"{tmp_path}/part", SCHEMA, key=KEY)
    assert len(rows_of(f"{tmp_path}/part*", KEY)) == 4
    assert two_keys.calls["GenerateDataKey"] == 1


@pytest.fixture
def bucket(moto_server):
    """An empty bucket."""
    import boto3

    client = boto3.client("s3", endpoint_url=moto_server)
    client.create_bucket(Bucket="sealed")
    return client


def names_in(client):
    return [entry["Key"] for entry in client.list_objects_v2(Bucket="sealed").get("Contents", [])]


def test_files_are_on_s3(tmp_path, bucket, local_key):
    files = write("s3://sealed/day=1/part", local_key, max_rows_per_file=400)
    assert [file.path for file in files] == [f"s3://sealed/day=1/part-0000{n}-of-00003.parquet" for n in range(3)]
    assert names_in(bucket) == with_manifest(
        *(f"day=1/part-0000{n}-of-00003.parquet" for n in range(3)), folder="day=1/"
    )
    rows = collect(ReadEncryptedParquet("s3://sealed/day=1/*", key=local_key))
    assert sorted(rows, key=lambda row: row["id"]) == ROWS
    rows = collect(beam.Create(["s3://sealed/"]), ReadAllEncryptedParquet(key=local_key, columns=["id"]))
    assert len(rows) == 1000
    bucket.delete_object(Bucket="sealed", Key="day=1/_KEY_FOR_part-00001-of-00003.parquet.json")
    with pytest.raises(Exception, match=r"there is no key file _KEY_FOR_part-00001-of-00003\.parquet\.json"):
        collect(ReadEncryptedParquet("s3://sealed/day=1/*", key=local_key))
    for name in names_in(bucket):
        body = bucket.get_object(Bucket="sealed", Key=name)["Body"].read()
        assert not any(canary in body for canary in CANARIES)


def test_the_temporary_folder_is_emptied_on_s3(bucket):
    for name in ("_TMP_run/left.parquet", "_TMP_run/_KEY_FOR_left.parquet.json", "_TMP_running/other"):
        bucket.put_object(Bucket="sealed", Key=name, Body=b"x")
    clean("s3://sealed/_TMP_run/")
    assert names_in(bucket) == ["_TMP_running/other"]
    clean("s3://no-such-bucket/_TMP_run/")  # only a warning


def test_a_large_file_is_read_from_s3_in_ranges(bucket, local_key):
    table = pa.table({"id": range(200_000), "text": [f"{n * 7919 % 200_003:050}" for n in range(200_000)]})
    write("s3://sealed/part", local_key, [table], None, row_group_rows=20_000, compression="none")
    tables = collect(ReadEncryptedParquetBatched("s3://sealed/part*", key=local_key, columns=["id"]))
    assert sum(pa.concat_tables(tables)["id"].to_pylist()) == sum(range(200_000))


def test_a_job_that_fails_leaves_nothing_that_is_read_on_s3(bucket, local_key, monkeypatch):
    def fail(*_args):
        raise OSError("the store went away")

    with monkeypatch.context() as patched:
        patched.setattr(parquet_bundle.OpenFile, "close", fail)
        with pytest.raises(Exception, match="the store went away"):
            write("s3://sealed/part", local_key)
    assert names_in(bucket) == []
    monkeypatch.setattr(parquet_write, "publish", fail)
    with pytest.raises(Exception, match="the store went away"):
        write("s3://sealed/part", local_key)
    assert all(name.startswith("_TMP_") for name in names_in(bucket))
    with pytest.raises(FileNotFoundError):
        rows_of("s3://sealed/", local_key)


def test_readers_with_different_rights_never_take_the_process_down(tmp_path, local_key):
    """Because pyarrow aborts or hangs at what a denied column's metadata is asked for, in a process of its own."""
    pii = LocalKms(local_key.path, "pii")
    generate_local_key(pii)
    write(tmp_path / "part", local_key, columns={"id": pii, "ssn": pii}, row_group_rows=50)
    program = """
        import sys
        import apache_beam as beam, pyarrow.compute as pc
        from apache_beam.options.pipeline_options import PipelineOptions
        from beam_envelope import ReadEncryptedParquet, ReadEncryptedParquetBatched
        pattern, key = sys.argv[1:]
        for settings in (
            {}, {"columns": ["ssn"]}, {"filter": pc.field("ssn") == "x"}, {"filter": pc.field("name") > "x"},
            {"filter": [("id", ">", 3)], "columns": ["name"]}, {"on_denied": "null", "filter": pc.field("ssn") == "x"},
            {"on_denied": "null"}, {"on_denied": "drop"}, {"columns": ["name"]},
            {"on_denied": "drop", "columns": ["ssn"]},
        ):
            for read in (ReadEncryptedParquet, ReadEncryptedParquetBatched):
                try:
                    with beam.Pipeline("FnApiRunner", options=PipelineOptions([])) as p:
                        _ = p | read(pattern, key=key, **settings)
                    print("read")
                except Exception as error:
                    print("refused" if "may not open these columns" in repr(error) else repr(error))
    """
    words = [sys.executable, "-c", textwrap.dedent(program), f"{tmp_path}/part*", str(local_key)]
    done = subprocess.run(words, check=True, capture_output=True, timeout=300)
    expected = ["refused"] * 6 + ["read"] * 4
    assert done.stdout.decode().split("\n")[:-1] == [outcome for outcome in expected for _ in range(2)]


def test_many_threads_read_many_files(tmp_path, local_key):
    write(tmp_path / "part", local_key, max_rows_per_file=25, row_group_rows=5)
    with pipeline("--direct_num_workers=4", "--direct_running_mode=multi_threading", runner="DirectRunner") as p:
        rows = p | ReadEncryptedParquet(f"{tmp_path}/part*", key=local_key)
        total = rows | beam.Map(lambda row: row["id"]) | beam.CombineGlobally(sum)
        _ = total | beam.io.WriteToText(f"{tmp_path}/total")
    (found,) = tmp_path.glob("total*")
    assert found.read_text().strip() == str(sum(range(1000)))


def test_files_opened_by_hand_are_the_same(tmp_path, local_key):
    (file,) = write(tmp_path / "part", local_key)
    from beam_envelope.formats.parquet import open_parquet

    with open_parquet(file.path, key=local_key) as one, open_parquet_at(file.path, local_key, None) as other:
        assert one.read().equals(other.read())
