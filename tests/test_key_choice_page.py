"""docs/key-choice.md: its first example runs as it stands, and every key that the page shows is one."""

import re
import shlex
from pathlib import Path

import pytest

from beam_envelope import cli
from beam_envelope.keys.allowed import Allowed
from beam_envelope.keys.template import KeyTemplate
from beam_envelope.keys.uri import open_key
from tests.running import read_files, write_files

PAGE = (Path(__file__).parents[1] / "docs" / "key-choice.md").read_text(encoding="utf-8")
TRY_IT = PAGE.partition("## Try it")[2].partition("\n## ")[0]
BLOCKS = [block.partition("\n")[2] for block in PAGE.split("```")[1::2]]
COMMANDS = re.findall(r"^    beam-envelope (.*)$", TRY_IT, re.MULTILINE)
KEYS = sorted(set(re.findall(r"[`'\"]((?:aws-kms|hcvault|local-kms)://[^`'\" ]+)[`'\"]", PAGE)))


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "key-choice.md", "exec"), {})  # noqa: S102  # our own page
    shown = capsys.readouterr().out.splitlines()
    assert sorted(shown) == ["{'tenant': 'acme', 'card': '4111'}", "{'tenant': 'bolt', 'card': '5500'}"]
    files = {f"tenant={tenant}/part-0.csv": tenant.encode() for tenant in ("acme", "bolt")}
    write_files("data", files)
    assert len(COMMANDS) == 2
    for words in COMMANDS:
        assert cli.main(shlex.split(words)) == 0
    assert read_files("opened") == files


def test_the_list_is_one():
    exec(compile(BLOCKS[1], "key-choice.md", "exec"), {})  # noqa: S102


@pytest.mark.parametrize("uri", KEYS)
def test_every_key_of_the_page_is_one(uri):
    key = open_key(uri)
    assert isinstance(key, KeyTemplate) == ("{" in uri)
    assert isinstance(key, Allowed) == ("*" in uri)
