"""`beam-envelope inspect` with what an auditor asks for: what it prints and writes, and its exit status."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from apache_beam.io.filesystems import FileSystems

from beam_envelope import LocalKms, cli, create_records, create_shard
from beam_envelope.keys.local import generate_local_key
from tests.running import read_files, write_files

KEY = "local-kms://keyring.json"
CONTENTS = {"a": b"a" * 60_000, "b": b"b", "sub/c": b""}


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Run `inspect` in this process, in a folder with three shards in `sealed`: exit status, stdout, stderr."""
    monkeypatch.setattr(FileSystems, "_pipeline_options", FileSystems._pipeline_options)
    monkeypatch.chdir(tmp_path)
    generate_local_key(LocalKms("keyring.json"))
    for path, content in read_files(write_files("data", CONTENTS)).items():
        Path("sealed", path).parent.mkdir(parents=True, exist_ok=True)
        with create_shard(f"sealed/{path}", key=KEY, context={"n": "x"}) as shard:
            shard.write(content)

    def run_words(*words):
        try:
            status = cli.main(["inspect", *(str(word) for word in words)])
        except SystemExit as ended:
            status = ended.code
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return run_words


def rows_of(out):
    return [re.split(r" {2,}", line.strip()) for line in out.splitlines() if line]


def test_an_audit_tells_of_keys_and_contexts(run):
    status, out, err = run("sealed", "--audit")
    assert (status, err) == (0, "")
    keys, key, contexts, context, summary = rows_of(out)
    assert keys == ["KMS key", "files", "stored", "oldest", "newest"]
    assert re.fullmatch(r"local-kms:default/[0-9a-f]{32}", key[0])
    assert key[1:3] == ["3", "60.3 kB"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", key[3])
    assert (contexts, context) == (["context", "files", "stored"], ["n=x", "3", "60.3 kB"])
    assert summary == ["3 files, 60.3 kB; of these 3 encrypted, 60.3 kB, under 1 KMS key. No findings."]


def test_findings_come_first_and_the_status_stays_0_unless_told(run):
    write_files("sealed", {"[red]plain\x1b.csv": b"1,2\n", "_TMP_1": b"x"})
    status, out, err = run("sealed", "--audit")
    assert (status, err) == (0, "")
    heads, plain, unfinished, *_, summary = rows_of(out)
    assert heads == ["finding", "files", "stored", "such as"]
    assert plain == [
        "critical",
        "Plaintext beside encrypted files",
        "1",
        "4 bytes",
        "sealed/[red]plain\\x1b.csv: it looks like text",
    ]
    assert unfinished == ["note", "Unfinished file", "1", "1 byte", "sealed/_TMP_1"]
    assert summary[0].endswith("under 1 KMS key. 1 critical finding, 1 note.")


def test_a_scheduler_gets_status_1_for_what_is_more_than_a_note(run):
    write_files("sealed", {"_TMP_1": b"x"})
    assert run("sealed", "--fail-on-findings")[0] == 0
    write_files("sealed", {"_KEY_FOR_gone.json": b"{}"})
    status, _, err = run("sealed", "--fail-on-findings")
    assert (status, err) == (1, "beam-envelope inspect: 1 warning, 1 note\n")
    status, out, _ = run("sealed", "--fail-on-findings", "--json")
    assert (status, json.loads(out)["totals"]["findings"]) == (1, {"critical": 0, "warning": 1, "note": 1})


def test_keys_are_due_when_they_are_older(run):
    os.utime("sealed/_KEY_FOR_a.json", (1_700_000_000, 1_700_000_000))
    status, out, _ = run("sealed", "--older-than", "30", "--fail-on-findings")
    assert status == 1
    assert "Data key due for rotation" in out
    assert "sealed/a: last wrapped 2023-11-14T22:13:20Z" in out
    assert run("sealed", "--older-than=20000", "--fail-on-findings")[0] == 0


def test_the_state_of_keys_is_asked_where_the_keyring_is_named(run):
    status, out, _ = run("sealed", "--ask-kms", "--key", KEY, "--fail-on-findings")
    assert status == 0
    heads, key, *_ = rows_of(out)
    assert (heads[1], key[1]) == ("state", "enabled")
    status, out, _ = run("sealed", "--ask-kms", "--fail-on-findings")
    assert (status, "KMS key whose state is not known" in out) == (1, True)
    generate_local_key(LocalKms("other.json"))
    status, out, _ = run("sealed", "--ask-kms", "--key", "local-kms://other.json")
    assert (status, "KMS key not found" in out) == (0, True)


def test_json_is_the_list_or_the_document(run):
    status, out, _ = run("sealed", "--json")
    entries = json.loads(out)
    assert (status, [entry["path"] for entry in entries]) == (0, ["sealed/a", "sealed/b", "sealed/sub/c"])
    for words in (("--audit",), ("--ask-kms",), ("--older-than=9999",), ("--html", "p.html"), ("--fail-on-findings",)):
        status, out, _ = run("sealed", "--json", *words)
        document = json.loads(out)
        assert (document["format"], document["totals"]["files"]) == ("beam-envelope inventory", 3)
        assert document["kms_asked"] == (words == ("--ask-kms",))


def test_a_page_is_written_whole_and_never_over_another_file(run):
    status, out, _ = run("sealed", "--html", "audit/[b]page.html")
    assert (status, out.splitlines()[-1]) == (0, "The page: audit/[b]page.html")
    page = Path("audit/[b]page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert page.endswith("</html>\n")
    assert os.listdir("audit") == ["[b]page.html"]
    before = Path("sealed/a").read_bytes()
    status, out, err = run("sealed", "--html", "sealed/a")
    assert (status, out) == (1, "")
    assert err == "beam-envelope inspect: sealed/a: the page exists, and is kept; name another\n"
    assert Path("sealed/a").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none", "--audit"), "none: no file matches"),
        (("sealed", "--older-than=-1"), "--older-than is a number of days from 0 to 36500, not -1"),
        (("sealed", "--older-than=nan"), "--older-than is a number of days from 0 to 36500, not nan"),
        (("sealed", "--older-than=1e9"), "--older-than is a number of days from 0 to 36500, not 1e+09"),
        (("sealed", "--key", KEY), "--key says where to ask for the state of KMS keys. Give --ask-kms with it"),
        (("sealed", "--ask-kms", "--key", "nonsense"), "the key 'nonsense' does not start with a scheme"),
    ],
)
def test_a_mistake_is_one_clear_line_and_status_1(run, words, message):
    status, out, err = run(*words)
    assert (status, out) == (1, "")
    assert err.startswith(f"beam-envelope inspect: {message}")
    assert len(err.splitlines()) == 1


def test_of_many_rows_some_are_shown_and_the_rest_counted(run):
    for number in range(25):
        with create_shard(f"sealed/{number}", key=KEY, context={"n": str(number)}) as shard:
            shard.write(b"x")
    _, out, _ = run("sealed", "--audit")
    assert sum(line.startswith("n=") for line in out.splitlines()) == 20
    assert "6 more; --html FILE or --json tells of them." in out


def test_record_keys_are_listed_as_such(run):
    create_records(key=KEY, keys="sealed/keys", context={"n": "r"}).encrypt(b"x")
    status, out, _ = run("sealed")
    assert status == 0
    assert "3 shards, 1 record key, " in out
    assert run("sealed", "--fail-on-findings")[0] == 0


def test_the_example_of_the_guide_runs_and_says_what_it_shows(run, capfd):
    guide = (Path(__file__).parents[1] / "docs" / "inspect.md").read_text(encoding="utf-8")
    example = re.search(r"## Try it\n\n(.*?)\n\n(?=\S)", guide, re.DOTALL)[1]
    Path("keyring.json").unlink()
    shutil.rmtree("sealed")
    statuses = []
    for line in example.splitlines():
        words = shlex.split(line.strip(), comments=True)
        if words[0] == "echo":
            Path(words[3]).write_text(words[1] + "\n", encoding="utf-8")
            continue
        assert words.pop(0) == "beam-envelope"
        statuses.append(cli.main(words))
    out = capfd.readouterr().out
    assert statuses == [0, 0, 0, 1]
    shown = guide[guide.index("It prints") : guide.index("## What to give")]
    said = [line.split("  ")[0].strip() for line in re.findall(r"^    (\S.*)", shown, re.MULTILINE)]
    assert len(said) >= 5
    assert [line for line in said if line not in out and not line.startswith("local-kms:")] == []
    page = Path("audit.html").read_text(encoding="utf-8")
    assert "Plaintext beside encrypted files" in page


def test_help_teaches_by_examples(run):
    status, out, _ = run("--help")
    examples = [line for line in out.splitlines() if line.startswith("  beam-envelope inspect ")]
    assert (status, len(examples)) == (0, 4)
    assert "Exit status: 0, or 1 if" in out
