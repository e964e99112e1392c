"""Libraries over `envelope::`: what they write, `open_shard` reads, and the other way round. The guide's examples."""
# ruff: noqa: S608  # the queries are our own

import gc
import re
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from beam_envelope import create_shard, open_shard
from beam_envelope.formats.keyfile import is_internal
from tests.fsspec.conftest import CANARY

GUIDE = (Path(__file__).parents[2] / "docs" / "fsspec.md").read_text(encoding="utf-8")
ROWS = 20_000
TABLE = pd.DataFrame({"number": range(ROWS), "text": [f"{CANARY}-{number}" for number in range(ROWS)]})
LINES = TABLE.to_csv(index=False).encode()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def url(folder):
    return f"envelope::file://{folder}"


@pytest.fixture
def sealed(folder, options):
    """Write a file as a shard, with `create_shard`."""

    def write(name, data):
        with create_shard(folder / name, **options) as f:
            f.write(data)

    return write


@pytest.fixture
def opened(folder, options):
    """Read a shard with `open_shard`."""

    def read(name):
        with open_shard(folder / name, **options) as f:
            return f.read()

    return read


@pytest.fixture(autouse=True)
def no_plaintext_is_left(tmp_path, monkeypatch):
    """See, after each test, that no file of it, temporary ones included, holds what was encrypted."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    yield
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def shards(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not is_internal(path.name))


def parquet(table):
    return table.to_parquet(compression=None)


@pytest.mark.skipif(int(pd.__version__.split(".")[0]) < 3, reason="pandas 2 does not take chained URLs; see the guide")
class TestPandas:
    def test_csv_is_written_and_read(self, url, options, opened, sealed):
        TABLE.to_csv(f"{url}/a.csv", index=False, storage_options=options)
        assert opened("a.csv") == LINES
        sealed("b.csv", LINES)
        assert pd.read_csv(f"{url}/b.csv", storage_options=options).equals(TABLE)

    def test_csv_is_compressed_before_encryption(self, url, options, opened):
        TABLE.to_csv(f"{url}/a.csv.gz", index=False, compression="gzip", storage_options=options)
        assert opened("a.csv.gz")[:2] == b"\x1f\x8b"
        assert pd.read_csv(f"{url}/a.csv.gz", compression="gzip", storage_options=options).equals(TABLE)

    def test_parquet_is_written_and_read(self, url, options, opened, sealed):
        TABLE.to_parquet(f"{url}/a.parquet", compression=None, storage_options=options)
        assert opened("a.parquet")[:4] == b"PAR1"
        sealed("b.parquet", parquet(TABLE))
        assert pd.read_parquet(f"{url}/b.parquet", storage_options=options).equals(TABLE)

    def test_a_partitioned_dataset_is_written_and_read(self, url, folder, options):
        parts = TABLE.assign(part=TABLE["number"] % 3)
        parts.to_parquet(f"{url}/set", partition_cols=["part"], compression=None, storage_options=options)
        assert len(shards(folder)) == 3
        back = pd.read_parquet(f"{url}/set", filters=[("part", "=", 1)], storage_options=options)
        assert sorted(back["number"]) == list(range(1, ROWS, 3))

    def test_a_writer_that_fails_leaves_nothing(self, url, folder, options):
        class Refuses:
            def __str__(self):
                raise RuntimeError("planned")

        broken = pd.DataFrame({"text": [*TABLE["text"], Refuses()]})
        with pytest.raises(RuntimeError, match="planned"):
            broken.to_csv(f"{url}/a.csv", storage_options=options, chunksize=1000)
        gc.collect()
        assert list(folder.rglob("*")) == []


class TestPyarrow:
    def test_a_column_decrypts_a_part_of_the_shard(self, url, options, sealed):
        pq = pytest.importorskip("pyarrow.parquet")
        wide = pd.DataFrame({f"c{number}": range(ROWS) for number in range(20)})
        sealed("wide.parquet", parquet(wide))
        fs, path = fsspec.url_to_fs(f"{url}/wide.parquet", **options)
        with fs.open(path) as f:
            assert pq.read_table(f, columns=["c7"])["c7"].to_pylist() == list(range(ROWS))
            assert f.raw.chunks_decrypted * 16384 < f.size / 4

    def test_a_dataset_that_fails_leaves_nothing_that_reads(self, url, folder, options):
        dataset, pa = pytest.importorskip("pyarrow.dataset"), pytest.importorskip("pyarrow")
        table = pa.Table.from_pandas(TABLE)

        def batches():
            yield from table.to_batches(max_chunksize=1000)
            raise RuntimeError("planned")

        fs, path = fsspec.url_to_fs(url, **options)
        with pytest.raises(RuntimeError, match="planned"):
            dataset.write_dataset(batches(), path, schema=table.schema, filesystem=fs, format="parquet")
        gc.collect()
        assert [path for path in folder.rglob("*") if path.is_file()] == []


class TestPolars:
    def test_files_are_written_and_read(self, url, options, opened, sealed):
        pl = pytest.importorskip("polars")
        with fsspec.open(f"{url}/a.csv", "wb", **options) as f:
            pl.from_pandas(TABLE).write_csv(f)
        assert opened("a.csv") == LINES
        with fsspec.open(f"{url}/a.parquet", "wb", **options) as f:
            pl.from_pandas(TABLE).lazy().sink_parquet(f, compression="uncompressed")
        assert opened("a.parquet")[:4] == b"PAR1"
        sealed("b.parquet", parquet(TABLE))
        with fsspec.open(f"{url}/b.parquet", **options) as f:
            assert pl.scan_parquet(f).select(pl.col("number").sum()).collect().item() == TABLE["number"].sum()
        sealed("b.csv", LINES)
        with fsspec.open(f"{url}/b.csv", **options) as f:
            assert pl.read_csv(f).equals(pl.from_pandas(TABLE))

    def test_a_dataset_is_scanned(self, url, options, sealed):
        pl, dataset = pytest.importorskip("polars"), pytest.importorskip("pyarrow.dataset")
        for part in range(3):
            sealed(f"set/part={part}/a.parquet", parquet(TABLE))
        fs, path = fsspec.url_to_fs(f"{url}/set", **options)
        found = pl.scan_pyarrow_dataset(dataset.dataset(path, filesystem=fs, partitioning="hive"))
        assert found.filter(pl.col("part") == 1).select(pl.len()).collect().item() == ROWS


class TestDask:
    def test_blocks_of_one_shard_are_all_of_it_once(self, url, options, sealed):
        read_bytes, dask = pytest.importorskip("dask.bytes").read_bytes, pytest.importorskip("dask")
        sealed("a.csv", LINES)
        for blocksize in (16384, 10_001, len(LINES) - 1):
            _, (blocks,) = read_bytes(f"{url}/a.csv", delimiter=b"\n", blocksize=blocksize, sample=False, **options)
            assert len(blocks) >= len(LINES) // blocksize
            assert b"".join(dask.compute(*blocks, scheduler="threads")) == LINES

    def test_csv_is_read_in_blocks_and_written(self, url, folder, options, opened, sealed):
        dd = pytest.importorskip("dask.dataframe")
        sealed("a.csv", LINES)
        blocks = dd.read_csv(f"{url}/a.csv", blocksize=100_000, storage_options=options)
        assert blocks.npartitions == 5
        assert list(blocks.compute()["number"]) == list(TABLE["number"])
        blocks.to_csv(f"{url}/out/*.csv", index=False, header=False, storage_options=options)
        names = shards(folder / "out")
        assert len(names) == blocks.npartitions
        together = b"".join(opened(f"out/{name}") for name in sorted(names, key=lambda name: int(name[:-4])))
        assert together == LINES.partition(b"\n")[2]

    def test_parquet_is_written_and_read(self, url, options, folder):
        dd = pytest.importorskip("dask.dataframe")
        dd.from_pandas(TABLE, npartitions=3).to_parquet(f"{url}/set", compression=None, storage_options=options)
        assert shards(folder) == ["part.0.parquet", "part.1.parquet", "part.2.parquet"]
        assert len(dd.read_parquet(f"{url}/set", storage_options=options)) == ROWS

    def test_the_processes_scheduler_takes_it_along(self, url, options, sealed):
        dd = pytest.importorskip("dask.dataframe")
        sealed("a.csv", LINES)
        blocks = dd.read_csv(f"{url}/a.csv", blocksize=300_000, storage_options=options)
        assert blocks["number"].sum().compute(scheduler="processes", num_workers=2) == TABLE["number"].sum()

    def test_a_compressed_shard_is_never_read_in_part(self, url, folder, options):
        dd = pytest.importorskip("dask.dataframe")
        with create_shard(folder / "a.csv", compression="zstd", **options) as f:
            f.write(LINES)
        with pytest.raises(Exception, match="was compressed before it was encrypted"):
            dd.read_csv(f"{url}/a.csv", storage_options=options)
        with pytest.raises(ValueError, match="blocksize=None"):
            dd.read_csv(f"{url}/a.csv", storage_options={**options, "zstd": True}, blocksize=1000)
        whole = dd.read_csv(f"{url}/a.csv", storage_options={**options, "zstd": True}, blocksize=None)
        assert len(whole) == ROWS


class TestDuckDb:
    @pytest.fixture
    def sql(self, options):
        connection = pytest.importorskip("duckdb").connect()
        connection.register_filesystem(fsspec.filesystem("envelope", **options))
        connection.execute("SET temp_directory = ''")
        yield connection.execute
        connection.close()

    def test_csv_and_parquet_are_read(self, sql, folder, sealed):
        sealed("a.csv", LINES)
        sealed("a.parquet", parquet(TABLE))
        for reader, name in (("read_csv", "a.csv"), ("read_parquet", "a.parquet")):
            rows = sql(f"SELECT count(*), sum(number) FROM {reader}('envelope://{folder}/{name}')").fetchone()
            assert rows == (ROWS, TABLE["number"].sum())

    def test_globs_and_partitions_are_found(self, sql, folder, sealed):
        for part in range(3):
            sealed(f"part={part}/a.parquet", parquet(TABLE))
        pattern = f"envelope://{folder}/*/*.parquet"
        query = f"SELECT count(*) FROM read_parquet('{pattern}', hive_partitioning=true) WHERE part = 1"
        assert sql(query).fetchone() == (ROWS,)

    def test_copy_to_writes_shards(self, sql, folder, opened):
        select = f"SELECT range AS number, '{CANARY}' AS text FROM range(100000)"
        for _ in range(2):  # the second time over the first
            sql(f"COPY ({select}) TO 'envelope://{folder}/a.csv'")
            sql(f"COPY ({select}) TO 'envelope://{folder}/a.parquet' (COMPRESSION uncompressed)")
        assert opened("a.csv").count(b"\n") == 100_001
        assert opened("a.parquet")[:4] == b"PAR1"
        assert shards(folder) == ["a.csv", "a.parquet"]

    def test_copy_to_partitions_writes_shards(self, sql, folder):
        select = f"SELECT range AS number, range % 3 AS part, '{CANARY}' AS text FROM range(1000)"
        sql(f"COPY ({select}) TO 'envelope://{folder}/set' (FORMAT parquet, PARTITION_BY part)")
        assert len(shards(folder)) == 3

    def test_a_copy_that_fails_leaves_nothing(self, sql, folder):
        select = "SELECT CASE WHEN range > 250000 THEN error('planned') ELSE range END FROM range(300000)"
        with pytest.raises(Exception, match="planned"):
            sql(f"COPY ({select}) TO 'envelope://{folder}/a.csv'")
        gc.collect()
        assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_the_examples_of_the_guide_run(folder, options, monkeypatch):
    for library in ("polars", "duckdb", "dask.dataframe"):
        pytest.importorskip(library)
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    for block in blocks:
        here = block.replace("envelope::s3://lake", f"envelope::file://{folder}/lake")
        here = here.replace("envelope::s3://", "envelope::file://").replace("aws-kms://alias/etl", options["key"])
        exec(compile(here, "docs/fsspec.md", "exec"), names)  # noqa: S102  # our own page
    assert shards(folder)[:3] == ["a.csv", "b.csv", "b.parquet"]
