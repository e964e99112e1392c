"""What kills or hangs a process that uses pyarrow as it is: proof that it does, and that it does not happen here.

Everything runs in processes of its own. A release of pyarrow that mends one of these makes its proof a skip.
"""

import signal

import pytest

from beam_envelope.formats.parquet import create_parquet
from tests.formats.alone import run_alone
from tests.formats.parquets import PEOPLE

BARE = """
import faulthandler, threading
import pyarrow.compute as pc, pyarrow.parquet as pq, pyarrow.parquet.encryption as pe
from beam_envelope.formats.parquet import open_parquet
path, *keys = sys.argv[1:]
reader = open_parquet(path, key=keys, on_denied="null")  # here for the same keys that pyarrow gets
client = reader._keys.client
def properties():
    return pe.CryptoFactory(lambda _: client).file_decryption_properties(pe.KmsConnectionConfig())
"""


@pytest.fixture
def path(tmp_path, keys):
    path = tmp_path / "part-0.parquet"
    table = PEOPLE.select(["ssn", "id", "name", "address"])
    with create_parquet(path, table.schema, key=keys[0], columns={"ssn": keys[1], "address.zip": keys[1]}) as writer:
        writer.write_table(table, 2)
    return path


DEADLY = {
    "metadata": "pq.ParquetFile(path, decryption_properties=properties()).metadata.row_group(0).column(0)",
    "to_dict": "pq.ParquetFile(path, decryption_properties=properties()).metadata.to_dict()",
}


@pytest.mark.parametrize("call", DEADLY)
def test_pyarrow_aborts_when_it_looks_at_a_column_without_key(path, keys, call):
    status, output = run_alone(f"{BARE}print('alive', flush=True)\n{DEADLY[call]}\nprint('mended')", path, keys[0])
    if status == 0 and output.endswith("mended\n"):
        pytest.skip("this pyarrow does not abort")
    assert output.startswith("alive\n")
    assert status == -signal.SIGABRT


def test_pyarrow_hangs_when_it_filters_by_a_column_without_key(path, keys):
    call = "pq.read_table(path, decryption_properties=properties(), filters=[('ssn', '=', 'x')], columns=['id'])"
    program = f"""{BARE}
print("alive", flush=True)
faulthandler.dump_traceback_later(15, exit=True)
try: {call}
except Exception: print("mended")"""
    status, output = run_alone(program, path, keys[0])
    if status == 0 and output.endswith("mended\n"):
        pytest.skip("this pyarrow does not hang")
    assert output.startswith("alive\n")
    assert status == -signal.SIGABRT or "Timeout (0:00:15)!" in output


def test_pyarrow_demands_the_keys_of_columns_that_are_not_read(path, keys):
    call = "pq.ParquetFile(path, decryption_properties=properties()).read(['id'], use_threads=False)"
    program = f"{BARE}try: {call}; print('mended')\nexcept Exception as error: print(error)"
    status, output = run_alone(program, path, keys[0])
    assert status == 0
    if output == "mended\n":
        pytest.skip("this pyarrow asks for the right keys")
    assert "is not open here" in output


def test_here_every_way_to_read_gives_data_or_a_named_error(path, keys):
    program = """
import faulthandler, json
import pyarrow.compute as pc
from beam_envelope.errors import WrongKeyError
from beam_envelope.formats.parquet import open_parquet
faulthandler.enable()
path, *keys = sys.argv[1:]
outcomes = []
for on_denied in ("error", "null", "drop"):
    with open_parquet(path, key=keys, on_denied=on_denied) as reader:
        for act in (
            lambda: reader.columns,
            lambda: reader.schema,
            lambda: (reader.num_rows, reader.num_row_groups, reader.metadata),
            lambda: reader.read(),
            lambda: reader.read(["id"]),
            lambda: reader.read(["ssn"]),
            lambda: reader.read(["address"]),
            lambda: reader.read(["id"], pc.field("ssn") == "x"),
            lambda: reader.read(["id"], [("ssn", "=", "x")]),
            lambda: reader.read(["id"], pc.field("address", "zip") == "x"),
            lambda: reader.read(None, pc.field("id") > 3),
            lambda: list(reader.iter_batches(batch_size=1)),
            lambda: list(reader.iter_batches([1], ["name", "ssn"])),
            lambda: reader.read_row_group(3),
        ):
            try:
                act()
                outcomes.append("data")
            except WrongKeyError:
                outcomes.append("error")
print(json.dumps(outcomes))
"""
    status, output = run_alone(program, path, keys[0])
    assert status == 0, output
    data, error = '"data"', '"error"'
    strict = [data] * 3 + [error, data] + [error] * 9
    lenient = [data] * 7 + [error] * 3 + [data] * 4
    assert output == f"[{', '.join([*strict, *lenient, *lenient])}]\n"


THREADS = """
import faulthandler, threading
path, *keys = sys.argv[1:]
from beam_envelope.formats.parquet import open_parquet
def run(*works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""


def test_here_threads_that_share_a_reader_do_not_wait_for_each_other_forever(path, keys):
    program = f"""{THREADS}
reader = open_parquet(path, key=keys, on_denied="null")
def read():
    for _ in range(150): reader.read(["id", "ssn"])
def look():
    for _ in range(1500): reader.columns, reader.schema, reader.num_rows
run(read, look, read, look)
def alone():
    for _ in range(100):
        with open_parquet(path, key=keys, on_denied="drop") as mine: mine.read()
run(alone, alone, alone)
print("done")
"""
    assert run_alone(program, path, keys[0]) == (0, "done\n")


def test_here_a_process_ends_while_a_stream_is_being_read(path, keys):
    program = f"""{THREADS}
stream = open(path, "rb")
key_file = open(path.replace("part-0", "_KEY_FOR_part-0") + ".json", "rb").read()
batches = open_parquet(stream, key=keys, key_file=key_file, on_denied="null").iter_batches(batch_size=1)
next(batches)
print("done")
"""
    assert run_alone(program, path, keys[0]) == (0, "done\n")


def test_here_a_writer_that_fails_midway_ends_well(path, keys):
    program = """
import gc, io, pyarrow as pa
from beam_envelope.formats.parquet import create_parquet
path, *keys = sys.argv[1:]
class Full(io.RawIOBase):
    left = 20_000
    def write(self, data):
        self.left -= len(data)
        if self.left < 0: raise OSError(28, "the disk is full")
        return len(data)
table = pa.table({"a": [str(n) * 50 for n in range(50_000)], "b": range(50_000)})
for columns in (None, {"a": keys[1]}):
    for last in ("write", "close", "drop"):
        try:
            with create_parquet(Full(), table.schema, key=keys[0], columns=columns, key_file=io.BytesIO(),
                                compression="none", use_dictionary=False) as writer:
                writer.write_table(table.slice(0, 10) if last == "close" else table)
                if last == "close": writer._sink._output._stream.left = -1
        except OSError as error: print(error.errno, end=" ")
        del writer; gc.collect()
print("done")
"""
    assert run_alone(program, path, *keys[:2]) == (0, "28 28 28 28 28 28 done\n")
