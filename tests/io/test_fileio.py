"""WriteEncryptedFiles: Beam's WriteToFiles with its traps closed."""

import apache_beam as beam
import pytest
from apache_beam.io import fileio
from apache_beam.io.filesystem import BeamIOError
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to

from beam_envelope import WriteEncryptedFiles, open_shard
from beam_envelope.errors import WrongKeyError
from beam_envelope.io import filesystem
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.testing import find_plaintext
from tests.running import listing, with_manifest

EVENTS = [{"tenant": tenant, "text": f"CANARY-{tenant}-{number:04}"} for number in range(300) for tenant in ("a", "b")]


class _Lines(fileio.FileSink):
    """A sink with an argument, which WriteToFiles itself would lose."""

    def __init__(self, prefix="(lost) "):
        self.prefix = prefix

    def open(self, fh):
        self.fh = fh

    def write(self, record):
        self.fh.write(f"{self.prefix}{record['text']}\n".encode())

    def flush(self):
        self.fh.flush()


@pytest.fixture
def tenants(local_key):
    """A key for each tenant."""
    keys = {name: LocalKms(local_key.path, name) for name in ("a", "b")}
    for key in keys.values():
        generate_local_key(key)
    return keys


def write(path, *flags, **arguments):
    with beam.Pipeline("FnApiRunner", options=PipelineOptions(list(flags))) as p:
        _ = p | beam.Create(EVENTS) | WriteEncryptedFiles(str(path), **arguments)


def test_each_tenant_has_its_own_key_and_context(tmp_path, tenants):
    with beam.Pipeline("FnApiRunner", options=PipelineOptions([f"--temp_location={tmp_path}/temp"])) as p:
        results = (
            p
            | beam.Create(EVENTS)
            | WriteEncryptedFiles(
                f"{tmp_path}/sealed",
                destination=lambda event: event["tenant"],
                key=lambda tenant: str(LocalKms(tenants["a"].path, tenant)),
                context=lambda tenant: {"tenant": tenant},
                sink=_Lines("> "),
                file_naming=fileio.destination_prefix_naming(".txt"),
            )
        )
        names = [f"{tmp_path}/sealed/{tenant}-00000-of-00001.txt" for tenant in ("a", "b")]
        assert_that(results | beam.Map(lambda result: result.file_name), equal_to(names))
    assert listing(tmp_path / "sealed") == with_manifest("a-00000-of-00001.txt", "b-00000-of-00001.txt")
    for tenant, key in tenants.items():
        shard = tmp_path / "sealed" / f"{tenant}-00000-of-00001.txt"
        with open_shard(shard, key=key, context={"tenant": tenant}) as stream:
            expected = sorted(f"> {event['text']}" for event in EVENTS if event["tenant"] == tenant)
            assert sorted(stream.read().decode().splitlines()) == expected
        other = tenants["b" if tenant == "a" else "a"]
        with pytest.raises(WrongKeyError):
            open_shard(shard, key=other, context={"tenant": tenant})
    assert find_plaintext([tmp_path], b"CANARY-") == [], "also with --temp_location, where Beam would leave plaintext"


@pytest.mark.parametrize("sink", [_Lines, lambda _destination: _Lines("(lost) ")])
def test_a_sink_is_a_class_or_a_function_too(tmp_path, local_key, sink):
    write(tmp_path / "sealed", key=local_key, sink=sink)
    (shard,) = (tmp_path / "sealed").glob("output*")
    with open_shard(shard, key=local_key) as stream:
        assert stream.readline().startswith(b"(lost) CANARY-")


def test_text_is_the_default(tmp_path, local_key):
    with beam.Pipeline("FnApiRunner", options=PipelineOptions([])) as p:
        _ = p | beam.Create(["one", "two"]) | WriteEncryptedFiles(f"{tmp_path}/sealed", key=local_key)
    (shard,) = (tmp_path / "sealed").glob("output*")
    with open_shard(shard, key=local_key) as stream:
        assert sorted(stream.read().split()) == [b"one", b"two"]


def test_spilled_destinations_land_too(tmp_path, local_key):
    write(
        tmp_path / "sealed",
        key=local_key,
        sink=_Lines(""),
        destination=lambda event: event["text"][-1],
        max_writers_per_bundle=2,
        shards=1,
        file_naming=fileio.destination_prefix_naming(),
    )
    found = []
    for shard in (tmp_path / "sealed").glob("[0-9]-*"):
        with open_shard(shard, key=local_key) as stream:
            found += stream.read().decode().split()
    assert sorted(found) == sorted(event["text"] for event in EVENTS)
    assert find_plaintext([tmp_path], b"CANARY-") == []


def test_a_failed_rename_fails_the_job(tmp_path, local_key, monkeypatch):
    """Beam passes it over, and reports files that are not there."""

    def fail(source, destination):
        raise BeamIOError("no rename today")

    monkeypatch.setattr(filesystem, "_rename", fail)
    with pytest.raises(Exception, match="is not there after Beam wrote it"):  # the runner's own class
        write(tmp_path / "sealed", key=local_key, sink=_Lines(""))
    assert list((tmp_path / "sealed").glob("output*")) == []


def test_a_temporary_folder_elsewhere_is_refused(tmp_path, local_key):
    with pytest.raises(
        TypeError, match="chooses its own temporary folder, inside path, so that no plaintext leaves it"
    ):
        WriteEncryptedFiles(str(tmp_path), key=local_key, temp_directory="/elsewhere")
