"""EncryptColumns and DecryptColumns: tables, record batches and rows, on several runners, and what fails."""

import collections
import logging
import os
import pickle
import typing

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.internal.cloudpickle import cloudpickle
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms import window
from apache_beam.transforms.display import DisplayData
from apache_beam.transforms.error_handling import CollectingErrorHandler
from apache_beam.typehints.row_type import RowTypeConstraint

import beam_envelope
from beam_envelope import DataKeyPolicy, DecryptColumns, EncryptColumns, jobs
from beam_envelope.testing import find_plaintext
from beam_envelope.transforms.columns import _DecryptDoFn, _EncryptDoFn
from beam_envelope.transforms.elements import FailedRecord

CONTEXT = {"dataset": "orders"}
CANARY = "CANARY-7f3a-4111111111111111"
_results = []


def _keep(result):
    _results.append(result)


def run(transform, elements, handler=False, options=()):
    """Return what a transform makes of elements, and our metrics; with a handler also what fails."""
    _results.clear()
    pipeline = jobs.make_pipeline(PipelineOptions(list(options)), 1, 0)
    created = pipeline | beam.Create(elements)
    if handler:
        with CollectingErrorHandler() as errors:
            _ = created | "Columns" >> transform.with_error_handler(errors) | "Keep" >> beam.Map(_keep)
        _ = errors.output() | "Failed" >> beam.Map(_keep)
    else:
        _ = created | "Columns" >> transform | "Keep" >> beam.Map(_keep)
    result = pipeline.run()
    result.wait_until_finish()
    return list(_results), jobs.counters(result)


@pytest.fixture
def places(local_key, tmp_path):
    return {"key": local_key, "keys": str(tmp_path / "keys"), "context": CONTEXT}


TABLE = pa.table({"email": [CANARY, None, "", "b"], "n": [1, 2, None, 1], "plain": ["p", "q", None, "r"]})


@pytest.mark.parametrize("form", [lambda table: table, lambda table: table.to_batches()[0]])
@pytest.mark.parametrize("settings", [{}, {"deterministic": ["n"]}, {"layout": "raw"}])
def test_tables_and_batches_come_back_as_what_they_were(places, form, settings):
    (sealed,), counters = run(EncryptColumns(["email", "n"], **places, **settings), [form(TABLE)])
    assert type(sealed) is type(form(TABLE))
    assert sealed.column("plain").equals(form(TABLE).column("plain"))
    assert sealed.schema.field("email").type == pa.binary()
    assert counters["rows_encrypted"] == 4
    assert counters["cells_encrypted"] == 6
    (back,), opened = run(DecryptColumns(["email", "n"], **places), [sealed])
    assert back.equals(form(TABLE))
    assert back.schema.equals(TABLE.schema, check_metadata=True)
    assert (opened["rows_decrypted"], opened["cells_decrypted"]) == (4, 6)
    assert opened["bytes_plaintext"] == counters["bytes_plaintext"]
    assert opened["bytes_ciphertext"] == counters["bytes_ciphertext"] > counters["bytes_plaintext"]
    assert opened.get("records_failed", 0) == 0


def test_a_bundle_calls_the_kms_once_for_all_columns_and_tables(fake_kms, tmp_path):
    key = "aws-kms://" + fake_kms.create_key("alias/etl").replace("alias/etl", "")
    places = {"key": key, "keys": str(tmp_path / "keys")}
    before = collections.Counter(fake_kms.calls)
    sealed, _ = run(EncryptColumns(["email", "n", "plain"], **places), [TABLE] * 5)
    assert fake_kms.calls - before == {"GenerateDataKey": 1}
    before = collections.Counter(fake_kms.calls)
    back, _ = run(DecryptColumns(["email", "n", "plain"], **places), sealed)
    assert fake_kms.calls - before == {"Decrypt": 1}
    assert all(table.equals(TABLE) for table in back)
    assert len(os.listdir(tmp_path / "keys")) == 1


def test_nonces_never_repeat_across_batches_of_a_bundle(places):
    sealed, _ = run(EncryptColumns(["email", "n"], **places, policy=DataKeyPolicy(max_records=5)), [TABLE] * 20)
    cells = [cell for table in sealed for name in ("email", "n") for cell in table.column(name).to_pylist() if cell]
    assert len({cell[1:29] for cell in cells}) == len(cells) == 120
    assert len({cell[1:17] for cell in cells}) >= 24


def test_equal_values_are_equal_cells_in_all_bundles_and_columns_of_a_scope(places):
    table = pa.table({"a": ["x", "y"], "b": ["y", "x"]})
    transform = EncryptColumns(["a", "b"], **places, deterministic={"a": "s", "b": "s"})
    rows = [run(transform, [table])[0][0].to_pydict() for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0]["a"] == rows[0]["b"][::-1]
    back, _ = run(DecryptColumns(["a", "b"], **places, deterministic={"a": "s", "b": "s"}), run(transform, [table])[0])
    assert back[0].equals(table)


# ------------------------------------------------------------------------------------------------------ rows


class Order(typing.NamedTuple):
    email: typing.Optional[str]  # noqa: UP045  # Beam has no columns for str | None
    n: typing.Optional[int]  # noqa: UP045
    plain: str


class ModernOrder(typing.NamedTuple):
    email: str | None


ORDERS = [Order(f"user-{number}" if number % 3 else None, number, str(number)) for number in range(10)]
ROW_TYPES = {"email": pa.string(), "n": pa.int64()}


def test_rows_become_rows_with_bytes_and_come_back(places):
    with beam.Pipeline() as pipeline:
        rows = pipeline | beam.Create(ORDERS).with_output_types(Order)
        sealed = rows | EncryptColumns(["email", "n"], **places)
        kinds = dict(RowTypeConstraint.from_user_type(sealed.element_type)._fields)
        assert kinds == {"email": typing.Optional[bytes], "n": typing.Optional[bytes], "plain": str}  # noqa: UP045
        back = sealed | DecryptColumns(ROW_TYPES, **places)
        plain = back | beam.Map(lambda row: (row.email, row.n, row.plain))
        assert_that(plain, equal_to([tuple(order) for order in ORDERS]))
        shown = sealed | beam.Map(lambda row: (type(row.email), type(row.n), row.plain))
        kinds = [(bytes if order.email else type(None), bytes, order.plain) for order in ORDERS]
        assert_that(shown, equal_to(kinds), label="sealed")


def test_rows_keep_their_windows_and_timestamps(places):
    with beam.Pipeline() as pipeline:
        rows = pipeline | beam.Create(ORDERS).with_output_types(Order)
        timed = rows | beam.Map(lambda row: window.TimestampedValue(row, row.n * 10)).with_output_types(Order)
        opened = (
            timed
            | beam.WindowInto(window.FixedWindows(30))
            | EncryptColumns(["email"], **places)
            | DecryptColumns({"email": pa.string()}, **places)
        )
        times = opened | beam.Map(
            lambda row, t=beam.DoFn.TimestampParam, w=beam.DoFn.WindowParam: (row.n, int(t), w.end)
        )
        assert_that(times, equal_to([(n, n * 10, (n // 3 + 1) * 30) for n in range(10)]))


@pytest.mark.parametrize("layout", ["compact", "raw"])
def test_parquet_becomes_encrypted_parquet_and_back_without_a_row_in_python(places, tmp_path, monkeypatch, layout):
    from apache_beam.typehints.arrow_type_compatibility import PyarrowBatchConverter

    def no_rows(*_):
        raise AssertionError

    monkeypatch.setattr(PyarrowBatchConverter, "explode_batch", no_rows)
    monkeypatch.setattr(PyarrowBatchConverter, "produce_batch", no_rows)
    struct = pa.array([{"street": CANARY, "zip": 1}, None, {"street": None, "zip": 2}, {"street": "S", "zip": None}])
    table = TABLE.append_column("address", struct)
    pq.write_table(table, tmp_path / "in.parquet")
    names = ["email", "n", "address.street"]
    with beam.Pipeline() as pipeline:
        rows = pipeline | beam.io.ReadFromParquet(str(tmp_path / "in.parquet"), as_rows=True)
        sealed = rows | EncryptColumns(names, **places, layout=layout)
        _ = sealed | beam.io.WriteToParquet(str(tmp_path / "sealed"), file_name_suffix=".parquet", num_shards=1)
    (path,) = tmp_path.glob("sealed*.parquet")
    assert find_plaintext(path, CANARY.encode()) == []
    assert pq.read_schema(path).field("email").type == pa.binary()
    assert ("email_key_id" in pq.read_schema(path).names) == (layout == "raw")
    with beam.Pipeline() as pipeline:
        rows = pipeline | beam.io.ReadFromParquet(str(path), as_rows=True)
        types = {**ROW_TYPES, "address.street": pa.string()}
        opened = rows | DecryptColumns(types, **places)
        _ = opened | beam.io.WriteToParquet(str(tmp_path / "opened"), file_name_suffix=".parquet", num_shards=1)
    (path,) = tmp_path.glob("opened*.parquet")
    assert pq.read_table(path).to_pylist() == table.to_pylist()
    assert pq.read_schema(path).types == table.schema.types


def test_rows_want_to_know_their_types_when_the_pipeline_is_built(places):
    pipeline = beam.Pipeline()
    sealed = pipeline | beam.Create(ORDERS).with_output_types(Order) | EncryptColumns(["email"], **places)
    with pytest.raises(ValueError, match=r"give columns=\{'email': pyarrow.string\(\)\}"):
        _ = sealed | "Names" >> DecryptColumns(["email"], **places)
    with pytest.raises(ValueError, match="Beam's rows cannot have such a column: Unrecognized arrow type"):
        _ = sealed | "Types" >> DecryptColumns({"email": pa.timestamp("us")}, **places)
    for work in (EncryptColumns, DecryptColumns):
        with pytest.raises(ValueError, match="there is no column 'nope'; there are 'email', 'n', 'plain'"):
            _ = sealed | f"No column {work}" >> work({"nope": pa.string()}, **places)


def test_rows_that_beam_has_no_columns_for_are_refused_with_advice(places):
    rows = beam.Pipeline() | beam.Create([]).with_output_types(ModernOrder)
    with pytest.raises(ValueError, match=r"Beam cannot make columns of these rows: .*\. Write Optional\[str\]"):
        _ = rows | EncryptColumns(["email"], **places)


def test_a_column_that_a_table_lacks_fails_on_the_first_table(places):
    for transform in (EncryptColumns(["nope"], **places), DecryptColumns(["nope"], **places)):
        with pytest.raises(Exception, match="there is no column 'nope'; there are 'email', 'n', 'plain'"):
            run(transform, [TABLE])


def test_other_elements_are_refused(places):
    with pytest.raises(Exception, match=r"requires PCollections of type .*RecordBatch.* but was applied to"):
        _ = beam.Pipeline() | beam.Create([{"email": "x"}]) | EncryptColumns(["email"], **places)
    dofn = _EncryptDoFn(EncryptColumns(["email"], **places)._work)
    dofn.start_bundle()
    with pytest.raises(
        TypeError, match=r"an element is a dict; .* For dicts there are EncryptFields and DecryptFields"
    ):
        list(dofn.process({"email": "x"}))


# ---------------------------------------------------------------------------------------------------- failures


def spoilt(sealed, row, name="email"):
    """Return a table with one byte of a cell changed."""
    cells = sealed.column(name).to_pylist()
    cells[row] = cells[row][:-1] + bytes([cells[row][-1] ^ 1])
    number = sealed.schema.get_field_index(name)
    return sealed.set_column(number, sealed.schema.field(name), pa.array(cells, pa.binary()))


def test_a_bad_cell_costs_its_row_and_nothing_else(places):
    (sealed,), _ = run(EncryptColumns(["email", "n"], **places), [TABLE])
    bad = spoilt(sealed, 2)
    results, counters = run(DecryptColumns(["email", "n"], **places), [bad, sealed], handler=True)
    failed = [one for one in results if isinstance(one, FailedRecord)]
    tables = sorted((one for one in results if not isinstance(one, FailedRecord)), key=len)
    assert [table.to_pylist() for table in tables] == [TABLE.take([0, 1, 3]).to_pylist(), TABLE.to_pylist()]
    assert [(one.error, one.field, one.ciphertext) for one in failed] == [
        ("TamperedError", "email", bad.column("email").to_pylist()[2])
    ]
    assert (counters["rows_decrypted"], counters["records_failed"]) == (7, 1)
    assert CANARY not in repr(failed)


def test_without_an_error_handler_a_bad_cell_fails_the_job(places, caplog):
    (sealed,), _ = run(EncryptColumns(["email"], **places), [TABLE])
    with caplog.at_level(logging.DEBUG), pytest.raises(Exception, match="the column 'email': a cell, under") as caught:
        run(DecryptColumns(["email"], **places), [spoilt(sealed, 0)])
    assert CANARY not in caplog.text + str(caught.value)


@pytest.mark.parametrize("options", [(), ("--direct_running_mode=multi_processing", "--direct_num_workers=2")])
def test_rows_with_a_bad_cell_go_to_the_handler_from_batches_too(places, tmp_path, options):
    (sealed,), _ = run(EncryptColumns(["email", "n"], **places), [TABLE])
    pq.write_table(spoilt(sealed, 3, "n"), tmp_path / "sealed.parquet")
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        rows = pipeline | beam.io.ReadFromParquet(str(tmp_path / "sealed.parquet"), as_rows=True)
        with CollectingErrorHandler() as errors:
            opened = rows | DecryptColumns(ROW_TYPES, **places).with_error_handler(errors)
        lines = opened | beam.Map(lambda row: f"{row.email} {row.n}")
        _ = lines | beam.io.WriteToText(str(tmp_path / "good"), num_shards=1)
        failures = errors.output() | beam.Map(lambda one: f"{one.error} {one.field} {len(one.ciphertext)}")
        _ = failures | "Failed" >> beam.io.WriteToText(str(tmp_path / "bad"), num_shards=1)
    (good,), (bad,) = tmp_path.glob("good*"), tmp_path.glob("bad*")
    assert sorted(good.read_text().splitlines()) == sorted([f"{CANARY} 1", "None 2", " None"])
    assert bad.read_text().splitlines() == ["TamperedError n 55"]


def test_columns_that_are_encrypted_already_fail_also_with_a_handler(places):
    sealed, _ = run(EncryptColumns(["email"], **places), [TABLE])
    for handler in (False, True):
        with pytest.raises(Exception, match="the column 'email' is encrypted already"):
            run(EncryptColumns(["email"], **places), sealed, handler=handler)


# ------------------------------------------------------------------------------------------- settings, secrets


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"columns": "email"}, TypeError, "columns is a list of names of columns, such as"),
        ({"columns": []}, TypeError, "columns is a list of names"),
        ({"columns": [1]}, TypeError, "columns is a list of names"),
        ({"columns": ["a", "a"]}, ValueError, "the column 'a' is named twice in"),
        ({"columns": ["a.b", "a"]}, ValueError, "the column 'a' is named twice in .*, or with what it is"),
        ({"layout": "other"}, ValueError, "layout is 'compact' or 'raw', not 'other'"),
        ({"layout": "raw", "deterministic": ["a"]}, ValueError, "deterministic= goes with layout='compact' only"),
        ({"deterministic": "a"}, TypeError, "deterministic is a list of columns, or a mapping"),
        ({"deterministic": ["b"]}, ValueError, r"the deterministic column 'b' is not among columns=\['a'\]"),
        ({"deterministic": {"a": ""}}, TypeError, "the scope of the column 'a' is a text, not ''"),
        ({"key": "nope://x"}, Exception, "nope"),
        ({"context": {"a": 1}}, Exception, "context"),
    ],
)
def test_a_wrong_setting_is_found_at_once(places, settings, error, message):
    with pytest.raises(error, match=message):
        EncryptColumns(**{"columns": ["a"], **places, **settings})


def test_a_wrong_type_is_found_at_once(places):
    with pytest.raises(TypeError, match="the type of column 'a' is one of pyarrow's, such as"):
        DecryptColumns({"a": "str"}, **places)


def test_display_data_show_the_settings_and_no_value_of_the_context(places):
    for transform in (
        EncryptColumns(["email"], **places, deterministic=["email"]),
        DecryptColumns(["email"], **places),
    ):
        shown = {item.key: item.value for item in DisplayData.create_from(transform).items}
        assert shown["columns"] == "email"
        assert shown["key"].startswith("local-kms://")
        assert shown["context"] == "dataset"
        assert "orders" not in repr(shown)


def test_nothing_secret_is_in_a_dofn_at_any_time(places):
    encrypt = _EncryptDoFn(EncryptColumns(["email"], **places, deterministic=["email"])._work)
    decrypt = _DecryptDoFn(DecryptColumns(["email"], **places)._work)
    pickled, table = [], TABLE
    for dofn in (encrypt, decrypt):
        pickled.append(cloudpickle.dumps(dofn))
        dofn.start_bundle()
        (table,) = dofn.process(table)
        pickled.append(cloudpickle.dumps(dofn))
        dofn.finish_bundle()
        pickled.append(cloudpickle.dumps(dofn))
    for one in pickled:
        assert CANARY.encode() not in one
        assert not hasattr(pickle.loads(one), "bundle")
    assert len(set(map(len, pickled[:3]))) == len(set(map(len, pickled[3:]))) == 1


def test_no_plaintext_is_in_the_graph_the_key_store_or_the_result(places, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        (sealed,), _ = run(EncryptColumns(["email"], **places), [TABLE])
    pq.write_table(sealed, tmp_path / "keys" / "sealed.parquet")
    assert find_plaintext(tmp_path / "keys", CANARY.encode()) == []
    assert CANARY not in caplog.text


def test_the_names_are_public():
    assert {"EncryptColumns", "DecryptColumns"} <= set(beam_envelope.__all__)
