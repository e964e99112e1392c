"""The benchmark itself: it measures in turn, checks what it measures, and tells the truth in its report."""

import dataclasses
import io
import json
import sys
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import chart, columns, machine, parquet, peers, records, report, shards
from benchmarks.data import check_equal, check_zeros, new_key, random_file
from benchmarks.files import measure_files
from benchmarks.measure import Sample, interleave, peak_memory, run_module, times_faster
from benchmarks.memory import act
from benchmarks.results import Measurement, Row, Target, speed_rows
from benchmarks.settings import FULL, MIB, QUICK, Settings

TINY = Settings(
    size=MIB,
    slow_size=MIB,
    rounds=2,
    job_rounds=1,
    random_bytes=MIB,
    random_reads=20,
    records=200,
    pipeline_records=2000,
    cells=5000,
    parquet_bytes=MIB,
)
SVG = "{http://www.w3.org/2000/svg}"


def silent(text):
    """Show no progress."""


def a_report(*targets, quick=False):
    rows = (
        Row("write", "a & b", 200.0, 150.0, 250.0, ours=True, relative=1.0),
        Row("write", "<c>", 100.0, 90.0, 110.0),
    )
    measurement = Measurement("shards", "One < two & three", "MB/s", "A method.", rows, targets, ("A note.",))
    return report.Report({"cpu": "x & y", "cores": "2"}, "2026-01-01T00:00:00+00:00", 1.0, quick, [measurement])


def text_of(found):
    stream = io.StringIO()
    report.show(found, Console(file=stream, width=120))
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------ measuring


def test_contenders_are_measured_in_turn():
    calls = []

    def run(name):
        calls.append(name)
        return Sample(float(len(calls)))

    samples = interleave({"a": lambda: run("a"), "b": lambda: run("b")}, rounds=2)
    assert calls == ["a", "b"] * 3  # the first of each is the warm-up
    assert samples == {"a": [Sample(3.0), Sample(5.0)], "b": [Sample(4.0), Sample(6.0)]}


def test_a_ratio_is_the_median_over_rounds_so_that_a_slow_round_for_both_changes_nothing():
    ours = [Sample(1.0), Sample(10.0), Sample(1.0)]
    theirs = [Sample(2.0), Sample(20.0), Sample(3.0)]
    assert times_faster(ours, theirs) == 2.0


def test_speeds_are_in_megabytes_of_plaintext_and_relative_to_the_first_contender():
    fast, slow = speed_rows("write", {"ours": [Sample(0.5, 0.25)], "peer": [Sample(1.0)]}, 10**8, ["ours"])
    assert (fast.value, fast.relative, fast.cpu_s_per_gb, fast.ours) == (200.0, 1.0, 2.5, True)
    assert (slow.value, slow.relative, slow.cpu_s_per_gb, slow.ours) == (100.0, 0.5, None, False)


def test_the_peak_is_that_of_the_process_and_not_of_the_one_that_started_it():
    ballast = bytearray(b"\1" * (256 * MIB))
    assert peak_memory() > len(ballast)
    assert 0 < int(run_module("tests.benchmarks.peak")) < 128 * MIB


def test_the_failure_of_a_module_is_told():
    with pytest.raises(RuntimeError, match=r"No module named benchmarks\.nothing"):
        run_module("benchmarks.nothing")


# ------------------------------------------------------------------------------------------- the measurements


def test_shards_in_memory():
    found = shards.measure_memory(TINY, silent)
    assert [(row.group, row.name) for row in found.rows] == [
        (group, name)
        for group in ("write", "write, kept in memory", "read")
        for name in ("beam_envelope", "cryptography.cobblestone")
    ]
    assert [target.limit for target in found.targets] == [0.85, 0.85]
    assert all(row.low <= row.value <= row.high for row in found.rows)


def test_records_beside_their_peers():
    pytest.importorskip("aws_encryption_sdk")
    found = records.measure_records(TINY, silent)
    assert [(row.group, row.name) for row in found.rows] == [
        (f"{verb}, {size} B", name)
        for size in (100, 1000)
        for verb in ("encrypt", "decrypt")
        for name in ("AESGCM alone", peers.OURS, "beam_envelope, SDK messages", peers.ESDK)
    ]
    assert [target.limit for target in found.targets] == [1.6, 60, 12] * 4


def test_records_in_a_pipeline():
    found = records.measure_record_pipeline(TINY, silent)
    assert [row.name for row in found.rows] == ["identity Map", peers.OURS] * 2
    assert [(target.limit, target.at_least) for target in found.targets] == [(1.25, False)] * 2


def test_a_rate_is_that_of_one_second_and_relative_to_the_first_contender():
    slow, fast = records.rate_rows("g", {"a": [Sample(0.5)], "b": [Sample(0.25)]}, ["b"])
    assert (slow.value, slow.relative, slow.ours) == (2.0, 1.0, False)
    assert (fast.value, fast.relative, fast.ours) == (4.0, 2.0, True)


def test_columns_without_spark(monkeypatch):
    monkeypatch.setattr(columns.importlib.util, "find_spec", lambda name: None)
    found = columns.measure_columns(TINY, silent)
    assert [target.limit for target in found.targets] == [1.25, 50, 50]
    assert found.notes == ("Spark was not measured: it takes Java and pyspark.",)


def test_parquet_without_spark(monkeypatch):
    monkeypatch.setattr(columns.importlib.util, "find_spec", lambda name: None)
    found = parquet.measure_parquet(TINY, silent)
    assert [target.limit for target in found.targets] == [1.15, 1.20, 1.15]
    assert {row.group for row in found.rows} == {"write", "read", "pipeline", "job, 2 processes"}


def test_wrong_plaintext_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(shards.MemoryBench, "read_ours", lambda self, source: None)
    with pytest.raises(SystemExit, match="Wrong output, so no figures: what was opened is not what was sealed"):
        shards.measure_memory(TINY, silent)


def test_random_access():
    found = shards.measure_random(TINY, silent)
    (target,) = found.targets
    assert 4 <= target.value <= 6
    assert target.met
    assert [row.name for row in found.rows] == ["beam_envelope", "plain file"]


def test_files_beside_all_peers():
    pytest.importorskip("aws_encryption_sdk")
    pytest.importorskip("pyrage")
    found = measure_files(TINY, silent)
    assert {row.name for row in found.rows} == {peers.OURS, peers.NATIVE, peers.AGE, peers.ESDK, peers.CP}
    assert [target.text for target in found.targets] == [
        "write a file, against aws-encryption-sdk streaming",
        "read a file, against aws-encryption-sdk streaming",
    ]


def test_the_aws_sdk_writes_the_suite_and_frame_that_are_promised(tmp_path):
    pytest.importorskip("aws_encryption_sdk")
    deserialize = pytest.importorskip("aws_encryption_sdk.internal.formatting.deserialize")
    source, target = random_file(tmp_path / "plain", 10_000), tmp_path / "sealed"
    peers.esdk().encrypt(source, target)
    with target.open("rb") as stream:
        header, _ = deserialize.deserialize_header(stream)
    assert (header.algorithm.algorithm_id, header.frame_length) == (0x0478, 4096)


def test_the_aws_sdk_also_goes_without_keyrings_as_on_python_3_10(tmp_path, monkeypatch):
    pytest.importorskip("aws_encryption_sdk")
    monkeypatch.setitem(sys.modules, "aws_cryptographic_material_providers", None)
    source, peer = random_file(tmp_path / "plain", 10_000), peers.esdk()
    peer.encrypt(source, tmp_path / "sealed")
    peer.decrypt(tmp_path / "sealed", tmp_path / "opened")
    check_equal(tmp_path / "opened", source)


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, 2 * MIB + 16384, 3 * MIB + 5])
def test_the_cipher_alone_gives_back_what_it_got(tmp_path, size):
    peer = peers.native()
    source = random_file(tmp_path / "plain", size)
    peer.encrypt(source, tmp_path / "sealed")
    peer.decrypt(tmp_path / "sealed", tmp_path / "opened")
    check_equal(tmp_path / "opened", source)


def test_the_actions_of_the_memory_measurement(tmp_path):
    key = new_key(tmp_path)
    plain, sealed = tmp_path / "plain" / "zeros.bin", tmp_path / "sealed" / "zeros.bin"
    plain.parent.mkdir()
    plain.write_bytes(bytes(MIB + 7))
    act("create_shard", plain, sealed, key)
    act("open_shard", sealed, tmp_path / "opened", key)
    assert sealed.stat().st_size > MIB


def test_zeros_are_counted_and_compared():
    check_zeros(io.BytesIO(bytes(10)), 10)
    with pytest.raises(SystemExit, match="10 bytes came back as 9"):
        check_zeros(io.BytesIO(bytes(9)), 10)
    with pytest.raises(SystemExit, match="a byte that was zero came back as another"):
        check_zeros(io.BytesIO(b"\0\1"), 2)


def test_files_that_differ_or_are_cut_stop_the_benchmark(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"ab")
    with pytest.raises(SystemExit, match="is not"):
        check_equal(tmp_path / "b", tmp_path / "a")


def test_no_room_is_told_before_anything_is_written(tmp_path):
    message = r"The benchmark needs \d+ MiB of room in .*--folder, or use --quick"
    with pytest.raises(SystemExit, match=message), machine.work_folder(1 << 60, tmp_path):
        pytest.fail("there is no such disk")
    assert not list(tmp_path.iterdir())


def test_the_work_folder_goes_with_all_that_is_in_it(tmp_path):
    with machine.work_folder(1, tmp_path) as folder:
        (folder / "file").write_bytes(b"x")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "met"),
    [(0.85, 0.85, True, True), (0.849, 0.85, True, False), (6, 6, False, True), (7, 6, False, False)],
)
def test_a_target_is_met_at_its_limit(value, limit, at_least, met):
    assert Target("speed", value, limit, "x", at_least=at_least).met is met


def test_the_report_names_what_was_missed():
    found = a_report(Target("write", 0.9, 0.85, "x"), Target("read", 0.5, 0.85, "x"))
    assert [target.text for target in found.missed] == ["read"]
    text = text_of(found)
    for words in (
        "One < two & three",
        "a & b",
        "<c>",
        "x & y",
        "A method.",
        "A note.",
        "MISSED",
        "1 of 2 targets missed.",
    ):
        assert words in text


def test_a_quick_run_says_that_its_figures_are_a_hint():
    assert "a hint, no measure" in text_of(a_report(Target("write", 1.0, 0.85, "x"), quick=True))


def test_the_json_holds_rows_targets_and_machine(tmp_path):
    path = tmp_path / "deep" / "report.json"
    report.write_json(a_report(Target("write", 0.5, 0.85, "x")), path)
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("beam-envelope benchmark", 1)
    assert document["machine"] == {"cpu": "x & y", "cores": "2"}
    (measurement,) = document["measurements"]
    assert [row["value"] for row in measurement["rows"]] == [200.0, 100.0]
    assert measurement["targets"] == [
        {"text": "write", "value": 0.5, "limit": 0.85, "unit": "x", "at_least": True, "met": False}
    ]


def test_the_chart_is_well_formed_and_its_bars_are_as_long_as_the_figures():
    root = ET.fromstring(chart.svg(a_report()))  # noqa: S314  # our own text
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("class") in {"ours", "peer"}]
    assert [bar.get("class") for bar in bars] == ["ours", "peer"]
    first, second = (float(bar.get("width")) for bar in bars)
    assert first == pytest.approx(2 * second, rel=0.01)
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"One < two & three", "a & b", "<c>", "200", "100"} <= texts


# ------------------------------------------------------------------------------------------------ the command


def run(tmp_path, *words):
    return command.main([*words, "--json", str(tmp_path / "r.json"), "--svg", str(tmp_path / "r.svg")])


@pytest.fixture
def measured(monkeypatch):
    """Let `shards` find what the test says, without measuring."""

    def set_targets(*targets):
        monkeypatch.setitem(command.MEASUREMENTS, "shards", lambda settings, say: a_report(*targets).measurements[0])

    return set_targets


def test_the_command_measures_and_writes_both_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "QUICK", TINY)
    assert run(tmp_path, "--quick", "--only", "shards", "--only", "random", "--rounds", "1") == 0
    document = json.loads((tmp_path / "r.json").read_text())
    assert [measurement["name"] for measurement in document["measurements"]] == ["shards", "random"]
    assert document["quick"] is True
    ET.parse(tmp_path / "r.svg")  # noqa: S314
    captured = capsys.readouterr()
    assert "Shards, memory to memory, 1 MiB" in captured.out
    assert "s] shards: reading" in captured.err


def test_a_missed_target_ends_with_status_1(tmp_path, measured):
    measured(Target("write", 0.5, 0.85, "x"))
    assert run(tmp_path, "--only", "shards") == 1
    assert run(tmp_path, "--only", "shards", "--quick") == 0


def test_met_targets_end_with_status_0(tmp_path, measured):
    measured(Target("write", 0.9, 0.85, "x"))
    assert run(tmp_path, "--only", "shards") == 0


def test_a_missing_peer_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_PEERS", ("no_such_peer",))
    with pytest.raises(SystemExit):
        run(tmp_path, "--only", "files")
    assert "no_such_peer is not installed; run: pip install -e '.[bench]'" in capsys.readouterr().err


def test_the_arguments_change_the_settings(tmp_path):
    parse = command._parser().parse_args
    assert command.settings_of(parse([])) == FULL
    assert command.settings_of(parse(["--quick"])) == QUICK
    changed = command.settings_of(parse(["--size", "16MiB", "--rounds", "3", "--folder", str(tmp_path)]))
    assert changed == dataclasses.replace(
        FULL, size=16 * MIB, slow_size=16 * MIB, rounds=3, job_rounds=3, folder=tmp_path
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "1.5KiB"], "--size is a whole number of MiB, not 1.5KiB"),
        (["--size", "much"], "'much' is not a size"),
        (["--rounds", "0"], "--rounds is 1 or more, not 0"),
        (["--folder", "/no/such/folder"], "--folder is a folder that exists, not /no/such/folder"),
    ],
)
def test_wrong_arguments_are_explained(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--only", "shards", *words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
