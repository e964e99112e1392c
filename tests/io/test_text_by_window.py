"""WriteEncryptedText of an unbounded input."""

import apache_beam as beam
import pytest
from apache_beam import coders
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.testing.test_stream import TestStream as Stream
from apache_beam.transforms.trigger import AccumulationMode, AfterCount, Repeatedly
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.utils import proto_utils

from beam_envelope import WriteEncryptedText, open_shard
from beam_envelope.testing import find_plaintext
from tests.running import listing


def windows_of(*elements):
    """A stream of texts, each with its time, in windows of 10 s."""
    stream = Stream()
    for text, moment in elements:
        stream = stream.add_elements([TimestampedValue(text, moment)])
    return stream.advance_watermark_to_infinity()


def write_stream(stream, write, into=None, between=None):
    with beam.Pipeline("BundleBasedDirectRunner", options=PipelineOptions(["--streaming"])) as p:
        paths = p | stream | (into or beam.WindowInto(FixedWindows(10))) | write
        if between is not None:
            _ = paths | between


def lines_of(path, key):
    with open_shard(path, key=key) as stream:
        return stream.read().decode().splitlines()


def all_lines(folder, key):
    return sorted(line for path in folder.glob("part*") for line in lines_of(path, key))


def test_unbounded_input_is_written_by_windows(tmp_path, local_key):
    stream = Stream()
    for window in range(3):
        stream = stream.add_elements([TimestampedValue(f"CANARY-{window}-{n}", window * 10 + n) for n in range(5)])
        stream = stream.advance_watermark_to((window + 1) * 10)
    options = PipelineOptions(["--streaming"])
    with beam.Pipeline("BundleBasedDirectRunner", options=options) as p:
        elements = p | stream.advance_watermark_to_infinity() | beam.WindowInto(FixedWindows(10))
        _ = elements | WriteEncryptedText(f"{tmp_path}/part", key=local_key, triggering_frequency=10, num_shards=1)
    shards = [path for path in tmp_path.iterdir() if path.name.startswith("part")]
    assert len(shards) == 3
    read = sorted(line for path in shards for line in lines_of(path, local_key))
    assert read == sorted(f"CANARY-{window}-{n}" for window in range(3) for n in range(5))
    assert find_plaintext([tmp_path], b"CANARY-") == []


def test_shards_of_a_stream_say_their_window_and_number(tmp_path, local_key):
    elements = [(f"{number}", number % 20) for number in range(40)]
    stream = Stream().add_elements([TimestampedValue(*element) for element in elements])
    write = WriteEncryptedText(f"{tmp_path}/part", key=local_key, num_shards=2)
    write_stream(stream.advance_watermark_to_infinity(), write)
    names = [name for name in listing(tmp_path) if name.startswith("part")]
    assert names == [
        f"part-[{window}.0, {window + 10}.0)-0000{number}-of-00002" for window in (0, 10) for number in (0, 1)
    ]
    assert all_lines(tmp_path, local_key) == sorted(text for text, _ in elements)
    utc = {"shard_name_template": "-V-SSS-of-NNN", "file_name_suffix": ".txt", "header": "h"}
    write_stream(windows_of(("a", 1)), WriteEncryptedText(f"{tmp_path}/utc/part", key=local_key, **utc))
    (shard,) = (tmp_path / "utc").glob("part*")
    assert shard.name == "part-[1970-01-01T00-00-00, 1970-01-01T00-00-10)-000-of-001.txt"
    assert lines_of(shard, local_key) == ["h", "a"]


def test_panes_of_a_window_do_not_overwrite_each_other(tmp_path, local_key):
    into = beam.WindowInto(
        FixedWindows(10),
        trigger=Repeatedly(AfterCount(1)),
        accumulation_mode=AccumulationMode.DISCARDING,
    )
    write = WriteEncryptedText(f"{tmp_path}/part", key=local_key, file_name_suffix=".txt")
    write_stream(windows_of(*[(f"{number}", number) for number in range(4)]), write, into)
    start = "part-[0.0, 10.0)-00000-of-00001"
    names = [name for name in listing(tmp_path) if name.startswith("part")]
    assert names == [f"{start}-pane-1.txt", f"{start}-pane-2.txt", f"{start}-pane-3.txt", f"{start}.txt"]
    assert all_lines(tmp_path, local_key) == ["0", "1", "2", "3"]


class _FailOnce(beam.DoFn):
    def __init__(self, mark):
        self._mark = mark

    def process(self, path):
        if not self._mark.exists():
            self._mark.write_text(path)
            raise OSError("the worker went away")
        yield path


def test_a_stream_that_is_tried_again_writes_the_same_shards(tmp_path, local_key):
    elements = [(f"{number}", number % 20) for number in range(40)]
    write = WriteEncryptedText(f"{tmp_path}/part", key=local_key)
    write_stream(windows_of(*elements), write, between=beam.ParDo(_FailOnce(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()
    assert len(list(tmp_path.glob("part*"))) == 2
    assert all_lines(tmp_path, local_key) == sorted(text for text, _ in elements)


def test_a_line_of_a_stream_that_cannot_be_written_leaves_no_shard(tmp_path, local_key):
    class Picky(coders.StrUtf8Coder):
        def encode(self, value):
            if value == "bad":
                raise ValueError("no such text")
            return super().encode(value)

    write = WriteEncryptedText(f"{tmp_path}/part", key=local_key, coder=Picky())
    with pytest.raises(Exception, match="no such text"):
        write_stream(windows_of(("good", 1), ("bad", 2), ("better", 3)), write)
    assert [name for name in listing(tmp_path) if name.startswith(("part", "_KEY_FOR"))] == []


def test_a_stream_needs_no_side_input(tmp_path, local_key):
    """Flink's portable runner cannot put one into a checkpoint."""
    p = beam.Pipeline(options=PipelineOptions(["--streaming"]))
    elements = p | windows_of(("a", 1)) | beam.WindowInto(FixedWindows(10))
    _ = elements | WriteEncryptedText(f"{tmp_path}/part", key=local_key, num_shards=2)
    payloads = [
        proto_utils.parse_Bytes(transform.spec.payload, beam_runner_api_pb2.ParDoPayload)
        for transform in p.to_runner_api().components.transforms.values()
        if transform.spec.urn == common_urns.primitives.PAR_DO.urn
    ]
    assert len(payloads) == 2, "one deals lines out, one writes"
    assert not [payload for payload in payloads if payload.side_inputs]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_records_per_shard": 5}, "max_records_per_shard and max_bytes_per_shard do not hold for an unbounded"),
        ({"max_bytes_per_shard": 5}, "max_records_per_shard and max_bytes_per_shard do not hold for an unbounded"),
        ({"shard_name_template": "-SS-of-NN"}, "each window would overwrite the shards of the last one"),
        ({"shard_name_template": ""}, "each window would overwrite the shards of the last one"),
    ],
)
def test_options_that_do_not_hold_for_a_stream_are_refused(tmp_path, local_key, options, message):
    p = beam.Pipeline(options=PipelineOptions(["--streaming"]))
    elements = p | windows_of(("a", 1)) | beam.WindowInto(FixedWindows(10))
    with pytest.raises(ValueError, match=message):
        _ = elements | WriteEncryptedText(f"{tmp_path}/part", key=local_key, **options)


def test_a_stream_without_windows_is_refused(tmp_path, local_key):
    p = beam.Pipeline(options=PipelineOptions(["--streaming"]))
    elements = p | windows_of(("a", 1))
    with pytest.raises(ValueError, match="triggering_frequency must be set"):
        _ = elements | WriteEncryptedText(f"{tmp_path}/part", key=local_key)
