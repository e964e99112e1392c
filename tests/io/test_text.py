"""WriteEncryptedText and its readers."""

import pickle
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.io.source_test_utils import (
    assert_reentrant_reads_succeed,
    assert_split_at_fraction_exhaustive,
    read_from_source,
)
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to

from beam_envelope import ANY_CONTEXT, ReadAllEncryptedText, ReadEncryptedText, WriteEncryptedText, open_shard
from beam_envelope.errors import ContextMismatchError, WrongKeyError
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.testing import find_plaintext
from tests.running import listing, with_manifest

LINES = [f"CANARY-LINE-{number:05}" for number in range(2000)]


@pytest.fixture
def other_key(local_key):
    """A second key of the same keyring."""
    other = LocalKms(local_key.path, "other")
    generate_local_key(other)
    return other


def pipeline():
    return beam.Pipeline("FnApiRunner", options=PipelineOptions([]))


def write(prefix, key, lines=LINES, **options):
    with pipeline() as p:
        _ = p | beam.Create(lines) | WriteEncryptedText(str(prefix), key=key, **options)


def lines_of(path, key, context=None):
    with open_shard(path, key=key, context=context) as stream:
        return stream.read().decode().splitlines()


def test_lines_come_back_and_are_nowhere_in_clear(tmp_path, local_key):
    write(tmp_path / "sealed" / "part", local_key, file_name_suffix=".txt")
    assert listing(tmp_path / "sealed") == with_manifest("part-00000-of-00001.txt")
    with pipeline() as p:
        assert_that(p | ReadEncryptedText(f"{tmp_path}/sealed/part*", key=local_key), equal_to(LINES))
    assert find_plaintext([tmp_path], b"CANARY-LINE") == []


def test_the_output_names_the_shards(tmp_path, local_key):
    with pipeline() as p:
        paths = p | beam.Create(LINES) | WriteEncryptedText(f"{tmp_path}/part", key=local_key, num_shards=2)
        assert_that(paths, equal_to([f"{tmp_path}/part-0000{number}-of-00002" for number in range(2)]))


def test_two_datasets_of_one_pipeline_have_each_its_key_and_context(tmp_path, local_key, other_key):
    with pipeline() as p:
        lines = p | beam.Create(LINES)
        _ = lines | "A" >> WriteEncryptedText(f"{tmp_path}/a", key=local_key, context={"dataset": "a"})
        _ = lines | "B" >> WriteEncryptedText(f"{tmp_path}/b", key=other_key, context={"dataset": "b"})
    assert lines_of(tmp_path / "a-00000-of-00001", local_key, {"dataset": "a"}) == LINES
    assert lines_of(tmp_path / "b-00000-of-00001", other_key, {"dataset": "b"}) == LINES
    with pipeline() as p:
        a = p | "A" >> ReadEncryptedText(f"{tmp_path}/a*", key=local_key, context={"dataset": "a"})
        b = p | "B" >> ReadEncryptedText(f"{tmp_path}/b*", key=other_key, context=ANY_CONTEXT)
        assert_that((a, b) | beam.Flatten(), equal_to(LINES * 2))


@pytest.mark.parametrize(
    ("which", "context", "error"), [("other", {"dataset": "a"}, WrongKeyError), ("same", {}, ContextMismatchError)]
)
def test_a_wrong_key_or_context_fails_the_pipeline_by_name(tmp_path, local_key, other_key, which, context, error):
    write(tmp_path / "part", local_key, context={"dataset": "a"})
    key = other_key if which == "other" else local_key
    for manifest, what in (("ignore", "part-00000-of-00001"), ("use", r"section 1 of .*_MANIFEST\.json")):
        with pytest.raises(Exception, match=what) as caught, pipeline() as p:
            _ = p | ReadEncryptedText(f"{tmp_path}/part*", key=key, context=context, manifest=manifest)
        assert error.__name__ in repr(caught.value)


def test_beams_options_hold(tmp_path, local_key):
    write(
        tmp_path / "part",
        local_key,
        header="HEADER",
        footer="FOOTER",
        max_records_per_shard=700,
        file_name_suffix=".csv",
    )
    shards = sorted(path for path in tmp_path.glob("part*"))
    assert [path.name for path in shards] == [f"part-0000{number}-of-00003.csv" for number in range(3)]
    contents = [lines_of(path, local_key) for path in shards]
    assert [(lines[0], lines[-1]) for lines in contents] == [("HEADER", "FOOTER")] * 3
    assert sorted(line for lines in contents for line in lines[1:-1]) == LINES


def test_size_limits_and_compression_hold(tmp_path, local_key):
    write(tmp_path / "small", local_key, max_bytes_per_shard=10_000)
    assert len(list(tmp_path.glob("small*"))) == 4
    write(tmp_path / "packed", local_key, file_name_suffix=".gz")
    with open_shard(tmp_path / "packed-00000-of-00001.gz", key=local_key) as stream:
        assert stream.read(2) == b"\x1f\x8b"
    with pipeline() as p:
        assert_that(p | ReadEncryptedText(f"{tmp_path}/packed*", key=local_key), equal_to(LINES))


def test_readers_skip_headers_and_name_the_shard(tmp_path, local_key):
    write(tmp_path / "part", local_key, header="HEADER", num_shards=1)
    shard = f"{tmp_path}/part-00000-of-00001"
    with pipeline() as p:
        pairs = p | ReadEncryptedText(f"{tmp_path}/part*", key=local_key, skip_header_lines=1, with_filename=True)
        assert_that(pairs, equal_to([(shard, line) for line in LINES]))


def test_paths_of_a_pcollection_are_read_in_ranges(tmp_path, local_key):
    write(tmp_path / "part", local_key, num_shards=2)
    with pipeline() as p:
        lines = p | beam.Create([f"{tmp_path}/part*"]) | ReadAllEncryptedText(key=local_key, desired_bundle_size=1000)
        assert_that(lines, equal_to(LINES))
    with pipeline() as p:
        pairs = p | beam.Create([f"{tmp_path}/part*"]) | ReadAllEncryptedText(key=local_key, with_filename=True)
        assert_that(pairs | beam.Keys() | beam.Distinct(), equal_to([str(path) for path in tmp_path.glob("part*")]))


def test_a_pattern_that_matches_nothing_is_refused_when_the_pipeline_is_built(tmp_path, local_key):
    with pytest.raises(OSError, match="No files found"):
        ReadEncryptedText(f"{tmp_path}/nothing*", key=local_key)


def test_any_split_of_a_shard_gives_each_line_once(tmp_path, local_key):
    """Beam's own exhaustive test: at each fraction, whatever the reader has done, no line is lost or read twice."""
    lines = [f"{number}-{'x' * (number % 7)}" for number in range(24)]
    write(tmp_path / "part", local_key, lines, num_shards=1)
    source = ReadEncryptedText(f"{tmp_path}/part*", key=local_key)._read._source
    splits = list(source.split(desired_bundle_size=30))
    assert len(splits) > 3
    read = [
        line for split in splits for line in read_from_source(split.source, split.start_position, split.stop_position)
    ]
    assert read == lines
    (whole,) = source.split(desired_bundle_size=1 << 40)
    assert_reentrant_reads_succeed((whole.source, whole.start_position, whole.stop_position))
    assert_split_at_fraction_exhaustive(whole.source, whole.start_position, whole.stop_position)


def test_transforms_travel_without_key_material(local_key, tmp_path):
    write(tmp_path / "part", local_key)
    material = Path(local_key.path).read_bytes()
    secret = material.split(b'"key": "')[1].split(b'"')[0]
    for transform in (
        WriteEncryptedText(f"{tmp_path}/x", key=local_key),
        ReadEncryptedText(f"{tmp_path}/part*", key=local_key),
        ReadAllEncryptedText(key=local_key),
    ):
        assert secret not in pickle.dumps(transform)
        shown = transform.display_data()
        assert shown["key"] == str(local_key)
