"""pipelines/encrypt.py and pipelines/decrypt.py with tables, and a job that is killed."""

import signal

from apache_beam.runners.runner import PipelineState

from beam_envelope import open_parquet
from pipelines import decrypt, encrypt
from tests.formats.parquets import PEOPLE
from tests.running import listing, with_manifest
from tests.tables import CONTEXT, encrypt_tables, random_table, read_tables, same, write_tables

IN_MEMORY = "--direct_running_mode=in_memory"


def test_they_encrypt_and_decrypt_a_dataset(tmp_path, local_key):
    data = write_tables(tmp_path / "data", {"dt=1/a.parquet": PEOPLE, "dt=2/b.parquet": PEOPLE})
    words = ["--key", str(local_key), "--context", "dataset=people", IN_MEMORY]
    result = encrypt.run([str(data), "--output", f"{tmp_path}/sealed", "--format=parquet", *words])
    assert result.wait_until_finish() == PipelineState.DONE
    assert listing(tmp_path / "sealed") == with_manifest("dt=1/a.parquet", "dt=2/b.parquet")
    result = decrypt.run([f"{tmp_path}/sealed/", "--output", f"{tmp_path}/opened", *words])
    assert result.wait_until_finish() == PipelineState.DONE
    assert same(read_tables(data), read_tables(tmp_path / "opened"))


def test_they_do_cells_in_several_processes(tmp_path, local_key):
    data = write_tables(tmp_path / "data", {f"{number}.parquet": PEOPLE for number in range(4)})
    words = ["--key", str(local_key), "--cells", "--keys", f"{tmp_path}/keys"]
    workers = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    sealed, opened = f"{tmp_path}/sealed", f"{tmp_path}/opened"
    columns = ["--format=parquet", "--columns=ssn,name", "--deterministic=ssn"]
    encrypt.run([str(data), "--output", sealed, *columns, *words, *workers]).wait_until_finish()
    ssns = {str(table.column("ssn").to_pylist()) for table in read_tables(sealed).values()}
    assert len(ssns) == 1
    decrypt.run([sealed, "--output", opened, *words, *workers]).wait_until_finish()
    assert same(read_tables(data), read_tables(opened))


def test_a_job_killed_at_any_step_leaves_whole_files_only_and_skip_finishes_it(tmp_path, local_key, forker):
    data = write_tables(tmp_path / "data", {"a.parquet": random_table(500), "b.parquet": random_table(9)})
    sealed = tmp_path / "sealed"
    words = ("encrypt", f"{data}/*", "--output", sealed, "--key", local_key, "--format=parquet", "--if-exists=skip")
    orphans = 0
    for step in range(1, 100):
        status, log = forker.run(*words, "--context", "dataset=people", step=step, below=sealed)
        if status == 0:
            break
        assert status == -signal.SIGKILL, log
        for name in listing(sealed):
            if not name.startswith(("_TMP_", "_KEY_FOR_", "_MANIFEST")):
                with open_parquet(sealed / name, key=local_key, context=CONTEXT) as reader:
                    assert reader.read().num_rows == {"a.parquet": 500, "b.parquet": 9}[name]
        orphans += len(listing(sealed)) > 0
    assert orphans > 2
    results, _ = encrypt_tables(data, sealed, local_key, if_exists="skip")
    assert [result.skipped for result in results] == [True, True]
