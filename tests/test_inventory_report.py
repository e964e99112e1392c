"""The page: nothing of others' becomes HTML, nothing comes from elsewhere, and it says what the document says."""

import base64
import copy
import hashlib
import json
import os
import re
from datetime import datetime, timezone
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from beam_envelope import LocalKms, create_shard, inventory_report
from beam_envelope.inventory_audit import audit
from beam_envelope.inventory_report import render
from beam_envelope.keys.cache import clear_caches
from beam_envelope.keys.local import generate_local_key
from beam_envelope.testing import FakeKms
from tests.running import write_files

NOW = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&amp;\u202e\x1b[31m"
VOID = {"meta", "rect", "path", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Elements with their attributes and text; refuses tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names))
        element = {"tag": tag, "text": "", "parents": [row["tag"] for row in self._open], **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        self.text += data
        for element in self._open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    def tables(self):
        """Return the rows of each table, by its label or caption: lists of texts."""
        found, rows = {}, None
        for element in self.elements:
            if element["tag"] == "table":
                rows = []
                found[element.get("aria-label", "")] = rows
            elif element["tag"] == "caption":
                found[element["text"]] = found.pop("")
            elif element["tag"] == "tr":
                rows.append([])
            elif element["tag"] in {"td", "th"}:
                rows[-1].append(element["text"].strip())
        return found


def seal(path, key, n_bytes=100, context=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with create_shard(path, key=key, context=context) as shard:
        shard.write(b"a" * n_bytes)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The document of a folder with something of everything."""
    folder = tmp_path_factory.mktemp("report") / "sealed"
    key = LocalKms(folder.parent / "keyring.json")
    generate_local_key(key)
    with pytest.MonkeyPatch.context() as patch, FakeKms() as kms:
        for name, value in kms.environment().items():
            patch.setenv(name, value)
        fill(folder, key, kms)
        clear_caches()
        return audit([str(folder)], ask_kms=True, keys=[key], older_than_days=0.5, now=NOW)


def fill(folder, local_key, fake_kms):
    for name in ("etl", "gone"):
        fake_kms.create_key(name)
    for number in range(7):
        seal(folder / f"part-{number}", "aws-kms://alias/etl", 1000 * number, {"dataset": "x"})
    seal(folder / "old/a", "aws-kms://alias/gone", 9000, {"dataset": "y"})
    seal(folder / "local", local_key, 10)
    write_files(folder, {**{f"export-{number}.csv": b"1,2\n" for number in range(12)}, "_TMP_1": b"x"})
    for path in folder.rglob("*"):
        os.utime(path, (NOW.timestamp() - 86_400, NOW.timestamp() - 86_400))
    fake_kms.schedule_key_deletion("alias/gone", 12)


@pytest.fixture
def document(shared):
    """A copy, which a test may change."""
    return copy.deepcopy(shared)


def test_what_others_wrote_is_text_and_never_html(tmp_path, local_key):
    folder = tmp_path / "sealed"
    name = HOSTILE.replace("/", "")
    seal(folder / name, local_key, context={HOSTILE: HOSTILE})
    write_files(folder, {f"{name}.csv": b"text", f"_KEY_FOR_{name}x.json": b"{}", f"_TMP_{name}": b""})
    document = audit([str(folder), f"{folder}/{name[0]}*"], now=NOW, older_than_days=0)
    document["kms_keys"][0] |= {"kms_key": HOSTILE, "detail": HOSTILE, "state": HOSTILE, "oldest_path": HOSTILE}
    document["patterns"].append(HOSTILE)
    for finding in document["findings"]:
        finding["items"][0]["text"] = HOSTILE
    page = render(document)
    parsed = Page(page)
    assert {element["tag"] for element in parsed.elements} & {"script", "img", "iframe", "object", "link"} == set()
    assert not any(name.startswith("on") for element in parsed.elements for name in element if name != "one")
    assert "\x1b" not in page
    assert "\u202e" not in page
    # It is shown as it is, with its control characters escaped.
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert f"{shown}={shown}" in [element["text"] for element in parsed.all("code")]
    assert parsed.text.count("<script>alert('x')</script>") >= 8
    assert parsed.text.count("&amp;") == parsed.text.count("onerror")


def test_nothing_is_fetched_and_nothing_can_run(document):
    page = render(document)
    assert re.findall(r"(?i)https?:|//|url\(|@import|javascript:|<script|\son\w+=| style=", page) == []
    parsed = Page(page)
    assert {element["href"][0] for element in parsed.all("a")} == {"#"}
    assert not any("src" in element for element in parsed.elements)
    (policy,) = [row["content"] for row in parsed.all("meta") if row.get("http-equiv") == "Content-Security-Policy"]
    (style,) = parsed.all("style")
    digest = base64.b64encode(hashlib.sha256(style["text"].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_the_page_says_what_the_document_says(document):
    parsed = Page(render(document))
    tables = parsed.tables()
    keys = tables["Each KMS key, the one with the most data first"]
    assert [row[0] for row in keys] == ["KMS key", *(row["kms_key"] for row in document["kms_keys"])]
    assert [row[2] for row in keys[1:]] == [str(row["files"]) for row in document["kms_keys"]]
    findings = tables["All findings, the most urgent first"]
    assert [row[:3] for row in findings[1:]] == [
        [row["severity"], row["title"], str(row["files"])] for row in document["findings"]
    ]
    kinds = tables["Files by kind; key files beside their files are not among them"]
    assert kinds[-1][:2] == ["all", str(document["totals"]["files"])]
    numbers = [int(element["value"]) for element in parsed.all("data")]
    for rows in (document["kms_keys"], document["contexts"], document["ages"], document["kinds"]):
        for row in rows:
            assert row["bytes"] in numbers
            assert row["files"] in numbers
    assert document["totals"]["bytes"] in numbers
    assert "2 critical findings, 1 warning, 1 note" in parsed.text
    (going,) = [row for row in keys if "pending deletion" in row[1]]
    assert f"goes on {document['kms_keys'][1]['deletion_date'][:10]}" in going[1]


def test_findings_come_first(document):
    parsed = Page(render(document))
    assert next(element["text"] for element in parsed.all("h2")) == "Findings"
    assert [element["text"] for element in parsed.all("h3")] == [row["title"] for row in document["findings"]]
    assert [row["severity"] for row in document["findings"]] == ["critical", "critical", "warning", "note"]


def test_charts_are_drawn_to_scale_and_have_titles(document):
    parsed = Page(render(document))
    titles = [element["text"] for element in parsed.all("title") if "svg" in element["parents"]]
    assert len(titles) == len(parsed.all("svg")) == len(document["kms_keys"]) + len(document["ages"])
    assert titles[0].startswith("arn:aws:kms:")
    assert "under 30 days: 9 files, " in "\n".join(titles)
    widths = [float(row["width"]) for row in parsed.all("rect") if row["class"].startswith("fill") and "y" not in row]
    most = document["kms_keys"][0]["bytes"]
    assert widths == [pytest.approx(max(100 * row["bytes"] / most, 0.7), abs=0.01) for row in document["kms_keys"]]
    looks = [row["class"] for row in parsed.all("rect") if row["class"].startswith("fill") and "y" not in row]
    assert looks == ["fill critical" if row["state"] == "pending deletion" else "fill " for row in document["kms_keys"]]
    assert sum(look == "fill critical" for look in looks) == 1
    columns = [row for row in parsed.all("rect") if "y" in row]
    assert [row["class"] for row in columns] == ["fill ", *["fill warning"] * 6, "fill "]  # older than half a day
    assert [float(row["height"]) for row in columns] == [100, 0, 0, 0, 0, 0, 0, 0]
    assert all(float(row["y"]) + float(row["height"]) == 100 for row in columns)


def test_tables_have_headers_and_regions_have_names(document):
    parsed = Page(render(document))
    heads = parsed.all("th")
    assert {element["scope"] for element in heads} == {"col", "row"}
    assert all(element.get("aria-label") for element in parsed.elements if element.get("role") == "region")
    ids = [element["id"] for element in parsed.elements if "id" in element]
    assert len(ids) == len(set(ids))
    wanted = {element["href"][1:] for element in parsed.all("a")}
    wanted |= {element["aria-labelledby"] for element in parsed.elements if "aria-labelledby" in element}
    assert wanted <= set(ids)
    assert parsed.all("html")[0]["lang"] == "en"


def test_what_is_many_is_cut_with_the_number_that_is_left_out(tmp_path, local_key, monkeypatch):
    monkeypatch.setattr(inventory_report, "MAX_ROWS", 8)
    folder = tmp_path / "sealed"
    for number in range(12):
        seal(folder / f"{number:02}", local_key, context={"n": str(number)})
    write_files(folder, {f"x{number}.csv": b"text" for number in range(20)})
    document = audit([str(folder)], now=NOW)
    for number in range(20):
        document["kms_keys"].append({**document["kms_keys"][0], "kms_key": f"key-{number}"})
    parsed = Page(render(document))
    tables = parsed.tables()
    assert len(tables["Plaintext beside encrypted files: the first"]) == 1 + 5
    assert len(tables["Plaintext beside encrypted files: more"]) == 1 + 3
    assert len(tables["Each KMS key, the one with the most data first"]) == 1 + 8
    assert len(parsed.all("svg")) == 12 + 8
    for said in ("12 more files.", "13 more KMS keys.", "9 more KMS keys.", "4 more encryption contexts."):
        assert said in parsed.text


def test_a_hundred_thousand_findings_make_a_small_page(document):
    finding = document["findings"][1]
    finding["items"] = [{**finding["items"][0], "what": f"{number:06}" + "<" * 2000} for number in range(10_000)]
    finding["files"] = 100_000
    page = render(document)
    assert len(page) < 2_000_000
    assert "99,800 more" in page


def test_the_same_document_gives_the_same_page_and_a_clean_one_says_so(document, tmp_path, local_key):
    assert render(document) == render(json.loads(json.dumps(document)))
    seal(tmp_path / "clean/a", local_key)
    parsed = Page(render(audit([f"{tmp_path}/clean"], now=NOW)))
    assert "All is well, as far as can be told without a key" in parsed.text
    assert "KMS was not asked" in parsed.text


def test_nothing_encrypted_is_a_page_too(tmp_path):
    write_files(tmp_path, {"a.csv": b"text"})
    parsed = Page(render(audit([str(tmp_path)], now=NOW)))
    assert "None: no key file names one." in parsed.text
    assert parsed.all("h3")[0]["text"] == "File with no key file"


def test_a_name_that_is_no_utf_8_is_shown_as_an_escape(tmp_path, local_key):
    seal(tmp_path / "sealed/a", local_key)
    (tmp_path / "sealed" / os.fsdecode(b"caf\xe9.csv")).write_bytes(b"text")
    page = render(audit([f"{tmp_path}/sealed"], now=NOW))
    assert "caf\\udce9.csv" in page
    page.encode()


# ------------------------------------------------------------------------------------------------------- colours


def _luminance(colour):
    """WCAG 2.2, "relative luminance"."""
    digits = colour[1:] * (2 if len(colour) == 4 else 1)
    digits = "".join(digit * 2 for digit in colour[1:]) if len(colour) == 4 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one, other):
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_text_is_readable_on_its_ground(theme):
    style = files("beam_envelope").joinpath("inventory_page.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[theme]))
    for ground in ("page", "card"):
        for ink in ("ink", "soft", "bar", "critical", "warning", "note", "good"):
            assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for ink in ("critical", "warning", "note", "good"):
        assert _contrast(colours[ink], colours[f"{ink}-wash"]) >= 4.5, ink
