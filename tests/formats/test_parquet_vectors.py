"""The stored files open, and the keys in them are those that were stored with them; and the guide's example runs."""

import base64
import json
import re
from pathlib import Path

import pytest

from beam_envelope import LocalKms, create_parquet, open_parquet
from beam_envelope.formats.keyfile import key_file_name
from tests.formats.parquets import SealedParquet
from tests.vectors import make_parquet

VECTORS = json.loads(make_parquet.TARGET.read_bytes())
GUIDE = Path(__file__).parents[2] / "docs" / "parquet.md"


@pytest.fixture
def keys(tmp_path):
    for name, document in VECTORS["keyrings"].items():
        (tmp_path / f"{name}.json").touch(mode=0o600)
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    return {name: LocalKms(tmp_path / f"{name}.json") for name in VECTORS["keyrings"]}


@pytest.mark.parametrize("vector", VECTORS["files"], ids=lambda vector: vector["name"])
def test_a_stored_file_opens(vector, keys, tmp_path):
    path = tmp_path / "f.parquet"
    path.write_bytes(base64.b64decode(vector["file"]))
    path.with_name(key_file_name(path.name)).write_text(vector["key_file"], encoding="utf-8")
    with open_parquet(path, key=list(keys.values()), context=vector["context"]) as reader:
        assert reader.read().to_pylist() == VECTORS["rows"]
        assert reader.schema == make_parquet.SCHEMA
    first = vector["key"] or "second"
    lost = {name.partition(".")[0] for name, key in vector["columns"].items() if key != first}
    with open_parquet(path, key=keys[first], context=vector["context"], on_denied="null") as reader:
        nulls = {leaf for leaf, access in reader.columns.items() if access == "denied"}
        assert {leaf.partition(".")[0] for leaf in nulls} == lost


@pytest.mark.parametrize("vector", VECTORS["files"], ids=lambda vector: vector["name"])
def test_the_keys_in_a_stored_file_are_those_that_the_format_gives(vector, keys):
    sealed = SealedParquet.__new__(SealedParquet)
    sealed.file, sealed.key_file = base64.b64decode(vector["file"]), vector["key_file"].encode()
    footer_key, column_keys = sealed.parquet_keys(list(keys.values()))
    assert footer_key.hex() == vector["footer_key"]
    assert [key.hex() for key in column_keys] == vector["column_keys"]


def test_a_file_that_is_made_now_has_the_form_of_the_stored_ones(keys, tmp_path):
    for vector in VECTORS["files"]:
        columns = {name: keys[key] for name, key in vector["columns"].items()} or None
        path = tmp_path / vector["name"]
        key = keys.get(vector["key"])
        with create_parquet(path, make_parquet.SCHEMA, key=key, columns=columns, context=vector["context"]):
            pass
        now, stored = (
            re.sub(r'"(shard_id|created|name|key_id|wrapped_key)": ".*"', "", text)
            for text in (path.with_name(key_file_name(path.name)).read_text(encoding="utf-8"), vector["key_file"])
        )
        assert now == stored


def test_the_example_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(compile(example, str(GUIDE), "exec"), {})  # noqa: S102  # that is what is tested
    assert f"# {capsys.readouterr().out.strip()}\n" in example
