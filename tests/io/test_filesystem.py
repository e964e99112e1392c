"""envelope+... paths: the filesystems, and Beam's own IOs on them."""

import signal
import subprocess
import sys
import uuid

import apache_beam as beam
import boto3
import pyarrow as pa
import pytest
from apache_beam.io import fileio
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions
from apache_beam.testing.util import assert_that, equal_to

from beam_envelope import create_shard, jobs, open_shard, register_filesystem
from beam_envelope.errors import ContextMismatchError, FormatError, KeyFileMissingError, NotEncryptedError
from beam_envelope.formats.keyfile import key_file_name
from beam_envelope.io.filesystem import inner_path, outer_path
from beam_envelope.io.options import Settings, current_settings, use_settings
from beam_envelope.io.s3 import clear_s3_clients, s3_client
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.keys.provider import kms_calls
from beam_envelope.testing import find_plaintext
from beam_envelope.testing.filesystem import CANARY, FileSystemConformance, read, write

LINES = [f"CANARY-LINE-{number:05}" for number in range(3000)]


@pytest.fixture
def options(local_key):
    """Pipeline options with the local key, which also hold for Beam's FileSystems in this process."""
    flags = [f"--envelope_key={local_key}", "--envelope_context=dataset=test"]
    options = register_filesystem(PipelineOptions(flags))
    FileSystems.set_options(options)
    yield options
    FileSystems.set_options(PipelineOptions([]))


class TestLocal(FileSystemConformance):
    @pytest.fixture
    def root(self, tmp_path, options):
        (tmp_path / "sealed").mkdir()
        return f"envelope+file://{tmp_path}/sealed/"


class TestS3(FileSystemConformance):
    @pytest.fixture
    def root(self, moto_server, options):
        clear_s3_clients()
        bucket = f"bucket-{uuid.uuid4().hex}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield f"envelope+s3://{bucket}/sealed/"
        clear_s3_clients()


@pytest.fixture
def root(tmp_path, options):
    (tmp_path / "sealed").mkdir()
    return f"envelope+file://{tmp_path}/sealed/"


def pipeline(options):
    return beam.Pipeline("FnApiRunner", options=options)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ("envelope+file:///a/b", "/a/b"),
        ("envelope+file://a/b", "a/b"),
        ("envelope+s3://bucket/b", "s3://bucket/b"),
        ("envelope+gs://bucket/b", "gs://bucket/b"),
        ("envelope+hdfs://b", "hdfs://b"),
    ],
)
def test_an_envelope_path_is_the_path_inside_and_back(outer, inner):
    assert (inner_path(outer), outer_path(inner)) == (inner, outer)


def test_plain_paths_go_on_as_before(tmp_path, root):
    """A filesystem class that answers for another's scheme would break every path of the process."""
    write(f"{tmp_path}/plain.txt", CANARY)
    assert (tmp_path / "plain.txt").read_bytes() == CANARY


@pytest.mark.parametrize("verb", ["rename", "copy"])
def test_between_schemes_nothing_is_moved(root, tmp_path, verb):
    write(f"{root}a.bin")
    with pytest.raises(BeamIOError) as caught:
        getattr(FileSystems, verb)([f"{root}a.bin"], [f"{tmp_path}/b.bin"])
    (reason,) = caught.value.exception_details.values()
    assert "ciphertext would take a plain name or plaintext an encrypted one" in str(reason)
    assert not (tmp_path / "b.bin").exists()


def test_a_folder_is_deleted_with_all_that_is_in_it(root, tmp_path):
    write(f"{root}beam-temp/a.bin")
    FileSystems.delete([f"{root}beam-temp"])
    assert list((tmp_path / "sealed").iterdir()) == []


def test_a_plain_file_among_shards_is_a_named_error(root, tmp_path):
    (tmp_path / "sealed" / "readme.txt").write_bytes(b"plain text " * 20)
    with pytest.raises(NotEncryptedError, match=r"readme\.txt is plain data"):
        read(f"{root}readme.txt")


def test_a_shard_without_its_key_file_is_a_named_error(root, tmp_path):
    write(f"{root}a.bin")
    (tmp_path / "sealed" / "_KEY_FOR_a.bin.json").unlink()
    with pytest.raises(KeyFileMissingError):
        read(f"{root}a.bin")


def test_another_context_is_a_named_error(root, local_key):
    write(f"{root}a.bin")
    with use_settings(Settings((local_key,), {"dataset": "other"})), pytest.raises(ContextMismatchError):
        read(f"{root}a.bin")
    with use_settings(Settings((local_key,), {}, any_context=True)):
        assert read(f"{root}a.bin").startswith(CANARY)


def test_a_shard_that_was_compressed_first_is_refused_rather_than_read_in_part(root, tmp_path, local_key):
    with create_shard(f"{tmp_path}/sealed/a.bin", key=local_key, context={"dataset": "test"}, compression="zstd") as f:
        f.write(CANARY * 100)
    with pytest.raises(FormatError, match="Read it with DecryptFiles or open_shard"):
        read(f"{root}a.bin")


def test_without_a_key_the_error_says_which_option_is_missing(tmp_path):
    FileSystems.set_options(PipelineOptions([]))
    with pytest.raises(ValueError, match=r"give --envelope_key=.* or set BEAM_ENVELOPE_KEY"):
        FileSystems.create(f"envelope+file://{tmp_path}/a.bin")
    assert list(tmp_path.iterdir()) == []


def test_workers_without_options_take_the_settings_of_their_environment(monkeypatch, local_key, tmp_path):
    second = LocalKms(local_key.path, "second")
    generate_local_key(second)
    monkeypatch.setenv("BEAM_ENVELOPE_KEY", f"{local_key} {second}")
    monkeypatch.setenv("BEAM_ENVELOPE_CONTEXT", "dataset=test,version=2")
    expected = Settings((local_key, second), {"dataset": "test", "version": "2"})
    assert current_settings(None) == current_settings({}) == current_settings(PipelineOptions([])) == expected
    options = PipelineOptions([f"--envelope_key={second}"])
    assert current_settings(options).keys == (second,), "an option comes before the environment"


def test_registering_names_the_module_to_the_workers_once(options):
    register_filesystem(options)
    assert options.view_as(SetupOptions).beam_plugins == ["beam_envelope.io.filesystem"]


def _text(root):
    return beam.io.WriteToText(f"{root}part", file_name_suffix=".txt", num_shards=2), beam.io.ReadFromText(
        f"{root}part*", validate=False
    )


def _packed_text(root):
    return beam.io.WriteToText(f"{root}part", file_name_suffix=".txt.gz"), beam.io.ReadFromText(
        f"{root}part*", validate=False
    )


class _Rows(beam.PTransform):
    """Lines as rows of one column into a sink, or back."""

    def __init__(self, io, name):
        super().__init__()
        self.io, self.name = io, name

    def expand(self, elements):
        if isinstance(elements, beam.pvalue.PBegin):
            return elements | self.io | beam.Map(lambda row: row["line"])
        return elements | beam.Map(lambda line: {"line": line}) | self.io


def _parquet(root):
    schema = pa.schema([("line", pa.string())])
    return (
        _Rows(beam.io.WriteToParquet(f"{root}part", schema), "write"),
        _Rows(beam.io.ReadFromParquet(f"{root}part*", validate=False), "read"),
    )


def _avro(root):
    schema = {"type": "record", "name": "row", "fields": [{"name": "line", "type": "string"}]}
    return (
        _Rows(beam.io.WriteToAvro(f"{root}part", schema), "write"),
        _Rows(beam.io.ReadFromAvro(f"{root}part*", validate=False), "read"),
    )


class _Decoded(beam.PTransform):
    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern

    def expand(self, begin):
        read = beam.io.ReadFromTFRecord(self.pattern, validate=False)
        return begin | read | beam.Map(lambda record: record.decode())


def _tfrecord(root):
    write = beam.io.WriteToTFRecord(f"{root}part", coder=beam.coders.StrUtf8Coder())
    return write, _Decoded(f"{root}part*")


class _Matched(beam.PTransform):
    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern

    def expand(self, begin):
        files = begin | fileio.MatchFiles(self.pattern) | fileio.ReadMatches()
        return files | beam.FlatMap(lambda file: file.read_utf8().splitlines())


def _fileio(root):
    return beam.io.WriteToText(f"{root}part"), _Matched(f"{root}part*")


@pytest.mark.parametrize("of", [_text, _packed_text, _parquet, _avro, _tfrecord, _fileio])
def test_beams_own_io_round_trips_and_leaves_no_plaintext(root, tmp_path, options, monkeypatch, of):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    write, read = of(root)
    with pipeline(options) as p:
        _ = p | beam.Create(LINES) | write
    with pipeline(options) as p:
        assert_that(p | read, equal_to(LINES))
    assert find_plaintext([tmp_path], b"CANARY-LINE") == []


def test_ranges_of_one_shard_are_read_in_parallel_with_one_call_to_the_kms(root, options):
    with pipeline(options) as p:
        _ = p | beam.Create(LINES) | beam.io.WriteToText(f"{root}part", num_shards=1)
    clear_caches()
    size = FileSystems.match([f"{root}part*"])[0].metadata_list[0].size_in_bytes
    filesystem = FileSystems.get_filesystem(root)
    before = kms_calls.counts["Decrypt"]
    for _ in range(64):
        filesystem.open(f"{root}part-00000-of-00001").close()
    assert kms_calls.counts["Decrypt"] - before == 1
    with pipeline(options) as p:
        lines = p | beam.Create([f"{root}part*"]) | beam.io.ReadAllFromText(desired_bundle_size=size // 64)
        assert_that(lines, equal_to(LINES))


def test_every_io_runs_in_worker_processes_which_know_the_filesystem_and_its_settings(
    root, tmp_path, local_key, monkeypatch
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    flags = [f"--envelope_key={local_key}", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    options = register_filesystem(PipelineOptions(flags))
    ios = {
        of.__name__: of(f"{root}{of.__name__}/") for of in (_text, _packed_text, _parquet, _avro, _tfrecord, _fileio)
    }
    with jobs.make_pipeline(options) as p:
        lines = p | beam.Create(LINES) | beam.Reshuffle()
        for name, (sink, _) in ios.items():
            _ = lines | f"Write{name}" >> sink
    with jobs.make_pipeline(options) as p:
        for name, (_, source) in ios.items():
            assert_that(p | f"Read{name}" >> source, equal_to(LINES), label=f"Check{name}")
    assert find_plaintext([tmp_path], b"CANARY-LINE") == []


def test_each_bundle_that_writes_makes_one_call_to_the_kms(root, local_key, monkeypatch):
    calls = []
    generate = LocalKms.generate_data_key
    monkeypatch.setattr(LocalKms, "generate_data_key", lambda *arguments: calls.append(1) or generate(*arguments))
    options = PipelineOptions([f"--envelope_key={local_key}"])
    with pipeline(options) as p:
        _ = p | beam.Create(LINES) | beam.io.WriteToText(f"{root}part")
    assert len(calls) == len(FileSystems.match([f"{root}part*"])[0].metadata_list) == 1


def test_opening_on_s3_costs_two_gets_and_a_range_one_more(moto_server, options):
    clear_s3_clients()
    boto3.client("s3").create_bucket(Bucket="bucket")
    write("envelope+s3://bucket/a.bin", CANARY * 100_000)
    requests = []
    s3_client().meta.events.register("before-send.s3", lambda request, **_: requests.append(request.method))
    with FileSystems.open("envelope+s3://bucket/a.bin") as stream:
        assert requests == ["GET", "GET"], "the shard and its key file"
        assert stream.read(100) == (CANARY * 4)[:100]
        assert len(requests) == 2
        stream.seek(2_000_000)
        stream.read(100)
        assert requests == ["GET"] * 3
    clear_s3_clients()


KILLED = """
import os, signal, sys
import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from beam_envelope import WriteEncryptedText

class Lines(beam.DoFn):
    def process(self, number):
        if number == 1500 and sys.argv[3] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        yield f"CANARY-LINE-{number:05}"

with beam.Pipeline("FnApiRunner", options=PipelineOptions([])) as p:
    _ = p | beam.Create(range(3000)) | beam.ParDo(Lines()) | WriteEncryptedText(
        sys.argv[1], key=sys.argv[2], max_records_per_shard=400)
"""


def test_a_killed_worker_leaves_nothing_that_reads_and_a_second_run_all_of_it(tmp_path, local_key):
    sealed = tmp_path / "sealed"
    program = [sys.executable, "-c", KILLED, f"{sealed}/part", str(local_key)]
    assert subprocess.run([*program, "die"], capture_output=True, check=False).returncode == -signal.SIGKILL
    assert list(sealed.glob("part*")) == []
    assert find_plaintext([sealed], b"CANARY-LINE") == []
    assert subprocess.run([*program, "live"], capture_output=True, check=False).returncode == 0
    shards = sorted(sealed.glob("part*"))
    lines = []
    for shard in shards:
        assert shard.with_name(key_file_name(shard.name)).exists()
        with open_shard(shard, key=local_key) as stream:
            lines += stream.read().decode().split()
    assert (len(shards), sorted(lines)) == (8, LINES)
