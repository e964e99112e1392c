"""What works on Dask works on two worker processes; what would be lost there is refused before anything runs."""

import json
import os
import re
from collections.abc import Iterator

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io import fileio
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.error_handling import ErrorHandler

from beam_envelope import (
    ContextMismatchError,
    DecryptColumns,
    DecryptFields,
    DecryptFiles,
    DecryptRecords,
    DecryptTables,
    EncryptColumns,
    EncryptFields,
    EncryptFiles,
    EncryptRecords,
    EncryptTables,
    EnvelopeError,
    LocalKms,
    ReadAllEncryptedParquet,
    ReadAllEncryptedText,
    ReadEncryptedParquet,
    ReadEncryptedText,
    RotateKeys,
    VerifyShards,
    WriteEncryptedFiles,
    WriteEncryptedParquet,
    WriteEncryptedText,
    cli,
    jobs,
    open_key,
    open_shard,
)
from beam_envelope.keys.local import generate_local_key
from beam_envelope.testing import find_plaintext
from pipelines import decrypt, encrypt, rotate, verify

pytest.importorskip("dask.bag")
distributed = pytest.importorskip("distributed")
client_module = pytest.importorskip("distributed.client")
dask_runner = pytest.importorskip("apache_beam.runners.dask.dask_runner")

CANARY = "CANARY-7f3a-4111111111111111"
CONTEXT = {"dataset": "flights"}
SCHEMA = pa.schema([("email", pa.string()), ("n", pa.int64())])
MESSAGES = "aws-encryption-sdk"


@pytest.fixture(scope="module")
def cluster():
    """A Dask cluster of two worker processes."""
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster
        for client in list(client_module._global_clients.values()):
            client.close()  # the runner leaves that to others


@pytest.fixture
def words(cluster):
    """The options of a job on the cluster; each partition is a bundle."""
    return [
        f"--runner={jobs.DASK_RUNNER}",
        f"--dask_client_address={cluster.scheduler_address}",
        "--dask_npartitions=4",
    ]


@pytest.fixture
def run(words, tmp_path):
    """Run steps on the cluster; return what they gave, as texts in order."""

    def run(inputs, *steps):
        pipeline = beam.Pipeline(options=PipelineOptions(words))
        elements = pipeline | beam.Create(list(inputs))
        for number, step in enumerate(steps):
            elements = elements | f"Step {number}" >> step
        kept = tmp_path / f"kept-{len(os.listdir(tmp_path))}"
        kept.mkdir()
        _ = elements | "Keep" >> beam.Map(_keep, str(kept))
        pipeline.run().wait_until_finish()
        return sorted(json.loads(line) for file in kept.iterdir() for line in file.read_text().splitlines())

    return run


def _keep(element, folder):
    with open(f"{folder}/{os.getpid()}", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(str(element)) + "\n")


def _with_pid(element):
    return f"{os.getpid()} {element}"


@pytest.fixture
def data(tmp_path):
    """Eight files that hold the canary."""
    (tmp_path / "data").mkdir()
    for number in range(8):
        (tmp_path / "data" / f"{number}.csv").write_text(f"email,n\n{CANARY},{number}\n" * 20)
    return tmp_path / "data"


@pytest.fixture
def settings(local_key, tmp_path):
    """The settings of a transform over elements."""
    return {"key": local_key, "keys": str(tmp_path / "keys"), "context": CONTEXT}


@pytest.fixture
def sealed(run, data, local_key, tmp_path):
    """The files, encrypted on the cluster."""
    run([f"{data}/*.csv"], EncryptFiles(str(tmp_path / "sealed"), key=local_key, context=CONTEXT))
    return tmp_path / "sealed"


@pytest.fixture
def table(run, tmp_path, local_key):
    """A table of 100 rows, encrypted on the cluster."""
    pq.write_table(pa.table({"email": [f"{CANARY}{n}" for n in range(100)], "n": range(100)}), tmp_path / "t.parquet")
    run([str(tmp_path / "t.parquet")], EncryptTables(str(tmp_path / "tables"), key=local_key, context=CONTEXT))
    (tmp_path / "t.parquet").unlink()
    return tmp_path / "tables" / "t.parquet"


# ------------------------------------------------------------------------------------------------ what works


def test_files_are_encrypted_and_decrypted_by_other_processes(run, data, local_key, tmp_path):
    sealed, opened = str(tmp_path / "sealed"), tmp_path / "opened"
    paths = [str(path) for path in data.iterdir()]
    encrypted = run(paths, EncryptFiles(sealed, key=local_key, context=CONTEXT), beam.Map(_with_pid))
    assert len(encrypted) == 8
    assert str(os.getpid()) not in {text.partition(" ")[0] for text in encrypted}
    assert find_plaintext(sealed, CANARY.encode()) == []
    assert len(run([sealed], DecryptFiles(str(opened), key=local_key, context=CONTEXT))) == 8
    assert {path.name: path.read_bytes() for path in opened.iterdir()} == {
        path.name: path.read_bytes() for path in data.iterdir()
    }


def test_parts_of_big_files_are_encrypted(run, data, local_key, tmp_path):
    transform = EncryptFiles(str(tmp_path / "sealed"), key=local_key, split_lines=200, header_lines=1)
    assert len(run([str(data / "0.csv")], transform)) > 2
    parts = sorted(path for path in (tmp_path / "sealed").iterdir() if not path.name.startswith("_"))
    lines = [open_shard(part, key=local_key).read().decode().splitlines(keepends=True) for part in parts]
    assert [line for number, part in enumerate(lines) for line in part[number > 0 :]] == (
        (data / "0.csv").read_text().splitlines(keepends=True)
    )


def test_tables_are_encrypted_and_decrypted(run, table, local_key, tmp_path):
    assert len(run([str(table)], DecryptTables(str(tmp_path / "opened"), key=local_key, context=CONTEXT))) == 1
    assert pq.read_table(tmp_path / "opened" / "t.parquet")["n"].to_pylist() == list(range(100))


def test_encrypted_files_are_read(run, sealed, table, local_key):
    lines = run([f"{sealed}/*.csv"], ReadAllEncryptedText(key=local_key, context=CONTEXT))
    assert len(lines) == 8 * 40
    assert {f"{CANARY},{number}" for number in range(8)} < set(lines)
    rows = run([str(table)], ReadAllEncryptedParquet(key=local_key, context=CONTEXT, columns=["n"]))
    assert rows == sorted(str({"n": n}) for n in range(100))


def test_a_pipeline_may_begin_with_encrypted_parquet(words, table, local_key, tmp_path):
    pipeline = beam.Pipeline(options=PipelineOptions(words))
    rows = pipeline | ReadEncryptedParquet(str(table), key=local_key, context=CONTEXT)
    _ = rows | "Keep" >> beam.Map(_keep, str(tmp_path / "tables"))
    pipeline.run().wait_until_finish()
    kept = [path for path in (tmp_path / "tables").iterdir() if path.name.isdigit()]
    assert sum(len(path.read_text().splitlines()) for path in kept) == 100


def test_records_go_through_both_forms(run, settings):
    records = [f"{CANARY}{n}" for n in range(50)]
    message = {**settings, "keys": None, "format": MESSAGES}
    back = run(
        records,
        EncryptRecords(**settings),
        DecryptRecords(**settings),
        EncryptRecords(**message),
        DecryptRecords(**message),
    )
    assert back == sorted(str(record.encode()) for record in records)


def test_a_bundle_has_one_data_key(run, settings, tmp_path):
    run(range(100), beam.Map(str).with_output_types(str), EncryptRecords(**settings))
    assert len([name for name in os.listdir(tmp_path / "keys") if name.endswith(".json")]) == 4


def test_fields_and_columns_of_tables(run, settings):
    rows = [{"email": f"{CANARY}{n}", "n": n} for n in range(20)]
    sealed = run(rows, EncryptFields(["email"], **settings))
    assert len(sealed) == 20
    assert not any(CANARY in text for text in sealed)
    fields = run(rows, EncryptFields(["email"], **settings), DecryptFields(["email"], **settings))
    assert fields == sorted(map(str, rows))
    tables = [pa.table({"email": [f"{CANARY}{n}"], "n": [n]}) for n in range(8)]
    columns = run(
        tables, EncryptColumns(["email"], **settings), DecryptColumns(["email"], **settings), beam.Map(_to_pylist)
    )
    assert columns == sorted(str(table.to_pylist()) for table in tables)


def _to_pylist(table):
    return table.to_pylist()


def test_keys_are_rotated_and_shards_verified(run, sealed, local_key):
    new = LocalKms(local_key.path, "new")
    generate_local_key(new)
    assert len(run([str(sealed)], RotateKeys([local_key], to=new))) == 8 + 1  # and the manifest
    assert open_shard(sealed / "0.csv", key=new, context=CONTEXT).read(5) == b"email"
    *whole, last = (sealed / "3.csv").read_bytes()
    (sealed / "3.csv").write_bytes(bytes([*whole, last ^ 1]))
    verified = run([str(sealed)], VerifyShards(key=new, context=CONTEXT), beam.Filter(lambda file: not file.ok))
    assert len(verified) == 1
    assert "3.csv" in verified[0]


def test_what_fails_raises_when_waited_for(words, sealed, local_key, tmp_path):
    pipeline = beam.Pipeline(options=PipelineOptions(words))
    _ = pipeline | beam.Create([str(sealed)]) | DecryptFiles(str(tmp_path / "opened"), key=local_key, context={})
    result = pipeline.run()
    with pytest.raises(ContextMismatchError, match="was written with another encryption context"):
        result.wait_until_finish()
    assert result.state == "FAILED"
    assert not (tmp_path / "opened").exists() or os.listdir(tmp_path / "opened") == []


def test_there_are_no_metrics(words, data, local_key, tmp_path):
    pipeline = beam.Pipeline(options=PipelineOptions(words))
    _ = pipeline | beam.Create([str(data)]) | EncryptFiles(str(tmp_path / "sealed"), key=local_key)
    result = pipeline.run()
    result.wait_until_finish()
    with pytest.raises(NotImplementedError):
        result.metrics()
    assert jobs.counters(result) == {}


# ------------------------------------------------------------------------------- the programs and the command


@pytest.fixture
def uri(local_key):
    """The key as a text."""
    return f"local-kms://{local_key.path}"


def test_the_programs_run(words, data, uri, tmp_path):
    sealed, opened, log = tmp_path / "sealed", tmp_path / "opened", tmp_path / "log.jsonl"
    encrypt.run([f"{data}/*", "--output", str(sealed), "--key", uri, *words]).wait_until_finish()
    verify.run([str(sealed), "--key", uri, "--log", str(log), *words]).wait_until_finish()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["ok"] for row in rows] == [True] * 9  # and the manifest
    decrypt.run([str(sealed), "--output", str(opened), "--key", uri, *words]).wait_until_finish()
    assert (opened / "5.csv").read_bytes() == (data / "5.csv").read_bytes()


def test_the_program_that_rotates_is_refused(words, sealed, uri):
    before = {path.name: path.read_bytes() for path in sealed.iterdir()}
    with pytest.raises(EnvelopeError, match=r"^RotateKeys with an error handler does not work on Dask"):
        rotate.run([str(sealed), "--from", uri, "--to", uri, *words])
    assert {path.name: path.read_bytes() for path in sealed.iterdir()} == before


def test_the_runner_goes_by_its_full_name(capsys):
    assert cli.main(["verify", "sealed/", "--key", "local-kms://k", "--runner=DaskRunner"]) == 1
    assert f"write --runner={jobs.DASK_RUNNER}" in capsys.readouterr().err.replace("\n", "")


def test_the_command_claims_nothing_that_it_does_not_know(words, data, uri, tmp_path, capsys):
    arguments = ["encrypt", str(data), "--output", str(tmp_path / "sealed"), "--key", uri]
    assert cli.main([*arguments, *words]) == 0
    told = capsys.readouterr().out
    assert re.fullmatch(
        r"Encrypted 8 files in [0-9.]+ s into \S+\. This runner reports no metrics, so bytes and KMS calls are not "
        r"known\.\n",
        told,
    )
    assert cli.main([*arguments, "--if-exists=skip", "--json", *words]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["files"], sorted(figures)) == (8, ["files", "output", "seconds"])


# ------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def pipeline():
    """A pipeline for DaskRunner that never runs: there is no cluster."""
    return beam.Pipeline(runner=dask_runner.DaskRunner(), options=PipelineOptions([]))


def keyring(folder):
    """Return a key whose keyring is not looked at."""
    return open_key(f"local-kms://{folder}/keyring.json")


ROWS = [beam.Row(email="a", n=1)]
SINKS = {
    "WriteEncryptedText": (["line"], lambda folder, key: WriteEncryptedText(f"{folder}/part", key=key)),
    "WriteEncryptedText of one shard": (
        ["line"],
        lambda folder, key: WriteEncryptedText(f"{folder}/part", key=key, num_shards=1),
    ),
    "WriteEncryptedFiles": (["line"], lambda folder, key: WriteEncryptedFiles(folder, key=key)),
    "WriteEncryptedParquet": (ROWS, lambda folder, key: WriteEncryptedParquet(f"{folder}/part", SCHEMA, key=key)),
    "WriteEncryptedParquet of one shard": (
        ROWS,
        lambda folder, key: WriteEncryptedParquet(f"{folder}/part", SCHEMA, key=key, num_shards=1),
    ),
}


@pytest.mark.parametrize("name", SINKS)
def test_sinks_that_would_write_nothing_are_refused(name, pipeline, tmp_path):
    elements, sink = SINKS[name]
    with pytest.raises(EnvelopeError) as caught:
        _ = pipeline | beam.Create(elements) | sink(str(tmp_path / "out"), keyring(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{name.partition(' ')[0]} does not work on Dask: DaskRunner drops what a bundle gives")
    assert message.endswith("take another runner. docs/dask.md tells what works there")
    assert not (tmp_path / "out").exists()


def test_sources_are_refused_with_what_works_instead(pipeline, sealed, local_key):
    with pytest.raises(EnvelopeError, match=re.escape("beam.Create([pattern]) | ReadAllEncryptedText(...)")):
        _ = pipeline | ReadEncryptedText(f"{sealed}/*", key=local_key, context=CONTEXT)


@pytest.mark.parametrize("transform", [EncryptColumns, DecryptColumns])
def test_columns_of_rows_are_refused(transform, pipeline, tmp_path):
    columns = ["email"] if transform is EncryptColumns else {"email": pa.string()}
    rows = beam.Row(email="a" if transform is EncryptColumns else b"a", n=1)
    with pytest.raises(EnvelopeError, match=f"^{transform.__name__} of rows does not work on Dask"):
        _ = pipeline | beam.Create([rows]) | transform(columns, key=keyring(tmp_path), keys=str(tmp_path / "keys"))


def handled(folder, key):
    """Return a transform of each kind, by the type of its input."""
    keys = f"{folder}/keys"
    return [
        EncryptFiles(folder, key=key),
        DecryptFiles(folder, key=key),
        EncryptTables(folder, key=key),
        EncryptRecords(key=key, keys=keys),
        RotateKeys([key], to=key),
    ]


@pytest.mark.parametrize("number", range(5))
def test_error_handlers_are_refused(number, pipeline, tmp_path):
    transform = handled(str(tmp_path / "out"), keyring(tmp_path))[number]
    elements = pipeline | beam.Create(["a"])
    with (
        pytest.raises(
            EnvelopeError,
            match=f"^{type(transform).__name__} with an error handler does not work on Dask: DaskRunner has no second",
        ),
        ErrorHandler(beam.Map(print)) as handler,
    ):
        _ = elements | transform.with_error_handler(handler)


def test_a_second_end_is_refused_before_anything_runs(pipeline, data, tmp_path):
    files = pipeline | beam.Create([str(data)])
    for name in ("A", "B"):
        _ = files | name >> EncryptFiles(str(tmp_path / name), key=keyring(tmp_path))
    message = (
        "so these steps would not run: A/Plan, A/Group, A/Spread/AddRandomKeys and 10 more. "
        "Make a pipeline of its own of each end."
    )
    with pytest.raises(EnvelopeError, match=re.escape(message)):
        pipeline.run()
    assert not (tmp_path / "B").exists()


def refused(pipeline, message):
    """Assert that a pipeline does not start."""
    with pytest.raises(EnvelopeError, match=re.escape(message)):
        pipeline.run()


def test_other_steps_that_would_be_lost_are_refused(pipeline, settings, tmp_path):
    records = pipeline | beam.Create(["a"]) | EncryptRecords(**settings)
    _ = records | beam.Map(str) | "Out" >> beam.io.WriteToText(str(tmp_path / "out"))
    refused(pipeline, "it gives results at the end of a bundle, and DaskRunner drops those")
    assert not (tmp_path / "keys").exists()


def test_writing_by_destination_is_refused(pipeline, settings, tmp_path):
    records = pipeline | beam.Create(["a"]) | EncryptRecords(**settings)
    _ = records | beam.Map(str) | "Out" >> fileio.WriteToFiles(str(tmp_path / "out"))
    refused(pipeline, "does not work on Dask")


def test_sources_of_beam_are_refused(pipeline, settings, data):
    _ = pipeline | "In" >> beam.io.ReadFromText(f"{data}/*") | EncryptRecords(**settings)
    refused(pipeline, "the step 'In/Read' does not work on Dask: DaskRunner cannot read sources")


class _Even(beam.DoFn):
    def process(self, element):
        yield element if element % 2 else beam.pvalue.TaggedOutput("even", element)


def test_second_outputs_are_refused(pipeline, settings):
    numbers = pipeline | beam.Create([1, 2]) | "Even" >> beam.ParDo(_Even()).with_outputs("even", main="odd")
    _ = numbers.even | "Text" >> beam.Map(str).with_output_types(str) | EncryptRecords(**settings)
    refused(pipeline, "the step 'Text' does not work on Dask: it reads a second output")


class _Batches(beam.DoFn):
    def infer_output_type(self, input_type):
        return str

    def process_batch(self, batch: list[int]) -> Iterator[list[str]]:
        yield [str(element) for element in batch]


def test_batches_are_refused(pipeline, settings):
    numbers = pipeline | beam.Create([1, 2]).with_output_types(int)
    _ = numbers | "Batch" >> beam.ParDo(_Batches()) | EncryptRecords(**settings)
    refused(pipeline, "the step 'Batch' does not work on Dask: it takes batches")


def test_other_runners_may_do_all_of_this(settings, tmp_path):
    with beam.Pipeline(runner="FnApiRunner", options=PipelineOptions([])) as pipeline:
        numbers = pipeline | beam.Create([1, 2]) | "Even" >> beam.ParDo(_Even()).with_outputs("even", main="odd")
        for name, elements in (("odd", numbers.odd), ("even", numbers.even)):
            texts = elements | f"Text {name}" >> beam.Map(str).with_output_types(str)
            _ = texts | name >> EncryptRecords(**settings) | f"{name}s" >> beam.Map(_keep, str(tmp_path))
    assert len([name for name in os.listdir(tmp_path) if name.isdigit()]) == 1
