"""docs/security.md names tests, vectors and files: they exist."""

import json
import re
from pathlib import Path

from tests.vectors import make

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))

    assert named
    assert {name for name in named if f"def {name}(" not in code} == set()


def test_every_vector_that_the_page_names_exists():
    vectors = json.loads(make.TARGET.read_bytes())
    known = {"vector": vectors["shards"], "refusal": vectors["refusals"]}

    for kind, name in re.findall(r"(vector|refusal) `([\w.-]+)`", PAGE):
        assert name in {vector["name"] for vector in known[kind]}


def test_every_file_that_the_page_names_exists():
    for name in re.findall(
        r"`((?:errors.py|formats/|io/|keys/|transforms/)\S*)`", PAGE.partition("## Requirements")[2]
    ):
        assert (ROOT / "beam_envelope" / name).exists()
