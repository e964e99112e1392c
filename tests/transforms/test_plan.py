"""Which file becomes which: worked out before anything is written."""

import os
import pickle
import re

import pytest
from apache_beam import coders
from apache_beam.io.filesystem import FileMetadata

from beam_envelope import AlreadyEncryptedError, DecryptedFile, EncryptedFile, FailedFile
from beam_envelope.transforms import plan as module
from beam_envelope.transforms.plan import DecryptPlan, EncryptPlan, Task, as_folder, checked_if_exists, unique_task
from tests.memory import peak_of
from tests.running import write_files


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of sources, which is the working directory's `data`."""
    monkeypatch.chdir(tmp_path)
    return write_files(tmp_path / "data", {"a.csv": b"12345", "sub/a.csv": b"1", "sub/b.csv": b""})


def targets(plan, source):
    """Return what becomes of each source."""
    return {task.source: task.target for task in plan.tasks(source)}


# -------------------------------------------------------------------------------------------------- encrypt


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("data/a.csv", {"data/a.csv": "sealed/a.csv"}),
        ("data/sub/a.csv", {"data/sub/a.csv": "sealed/a.csv"}),
        ("data/*", {"data/a.csv": "sealed/a.csv"}),
        ("data/s*/a.csv", {"data/sub/a.csv": "sealed/sub/a.csv"}),
        ("data/sub/*", {"data/sub/a.csv": "sealed/a.csv", "data/sub/b.csv": "sealed/b.csv"}),
        ("data/**a.csv", {"data/a.csv": "sealed/a.csv", "data/sub/a.csv": "sealed/sub/a.csv"}),
        ("./data", {f"./data/{name}": f"sealed/{name}" for name in ("a.csv", "sub/a.csv", "sub/b.csv")}),
        (FileMetadata("data/sub/a.csv", 1), {"data/sub/a.csv": "sealed/a.csv"}),
    ],
)
def test_paths_are_kept_below_the_fixed_part_of_the_pattern(data, source, expected):
    assert targets(EncryptPlan("sealed/"), source) == expected


def test_paths_are_kept_below_the_folder_that_the_caller_names(data):
    plan = EncryptPlan("sealed/", relative_to="data/")
    assert targets(plan, "data/sub/a.csv") == {"data/sub/a.csv": "sealed/sub/a.csv"}
    assert targets(plan, FileMetadata("data/sub/a.csv", 1)) == {"data/sub/a.csv": "sealed/sub/a.csv"}
    message = "data/a.csv is not below data/sub/; relative_to= (--relative-to) must name a folder above every source"
    with pytest.raises(ValueError, match=re.escape(message)):
        list(EncryptPlan("sealed/", relative_to="data/sub/").tasks("data/a.csv"))


def test_a_task_covers_the_whole_file(data):
    assert list(EncryptPlan("sealed/").tasks("data/a.csv")) == [Task("data/a.csv", 5, "sealed/a.csv", 0, 5)]


def test_the_parts_of_a_split_file_are_numbered_before_the_ending(data):
    tasks = list(EncryptPlan("sealed/", part_bytes=2).tasks("data/**"))
    assert [(task.target.removeprefix("sealed/"), task.start, task.end) for task in tasks] == [
        ("a-00000-of-00003.csv", 0, 2),
        ("a-00001-of-00003.csv", 2, 4),
        ("a-00002-of-00003.csv", 4, 5),
        ("sub/a-00000-of-00001.csv", 0, 1),
        ("sub/b-00000-of-00001.csv", 0, 0),
    ]


@pytest.mark.parametrize(
    ("name", "part"),
    [("noext", "noext-00000-of-00001"), (".hidden", "-00000-of-00001.hidden"), ("a.b.c", "a-00000-of-00001.b.c")],
)
def test_names_without_an_ending_are_numbered_too(data, name, part):
    write_files(data, {name: b"x"})
    assert targets(EncryptPlan("sealed/", part_bytes=9), f"data/{name}") == {f"data/{name}": f"sealed/{part}"}


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("data", "data"),
        ("data", "data/sealed"),
        ("data/**", "data/sealed"),
        ("data/*", "data"),
        ("data/*.csv", "data"),
        ("data/a.csv", "data"),
        ("data/*/*.csv", "data"),
        (FileMetadata("data/a.csv", 5), "data"),
        # The same places under other names.
        ("data", "./data/sealed"),
        ("./data", "data/sealed"),
        ("data", "{cwd}/data/sealed"),
        ("{cwd}/data", "data/sealed"),
        ("data", "data/sub/../sealed"),
        ("data/*", "./data"),
        ("data/a.csv", "./data"),
        ("data/a.csv", "alias"),
        ("alias/**", "data/sealed"),
        (FileMetadata("data/a.csv", 5), "./data"),
    ],
)
@pytest.mark.parametrize("if_exists", ["error", "overwrite", "skip"])
def test_an_output_inside_the_input_is_refused(data, source, output, if_exists):
    (data.parent / "alias").symlink_to("data")
    source, output = (
        value.replace("{cwd}", str(data.parent)) if isinstance(value, str) else value for value in (source, output)
    )
    plan = EncryptPlan(as_folder(output), if_exists=if_exists)
    with pytest.raises(ValueError, match=r"Choose an output folder outside the pattern$"):
        list(plan.tasks(source))


def test_the_message_about_an_output_inside_the_input_names_all_three(data):
    message = (
        "data/a.csv would become data/sealed/a.csv, which the input pattern data/** finds as well: a second run would "
        "encrypt shards. Choose an output folder outside the pattern"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        list(EncryptPlan("data/sealed/").tasks("data"))


def test_an_output_beside_the_input_is_fine(data):
    assert targets(EncryptPlan("data/sealed/"), "data/*.csv") == {"data/a.csv": "data/sealed/a.csv"}
    assert targets(EncryptPlan("data2/"), "data/*.csv") == {"data/a.csv": "data2/a.csv"}


@pytest.mark.parametrize("name", ["_KEY_FOR_a.csv.json", "_TMP_0123", "_MANIFEST.json"])
def test_our_own_helper_files_are_not_encrypted(data, name):
    write_files(data, {name: b"{}"})
    message = f"data/{name} is one of our own helper files. Leave it out of the input pattern, or decrypt it first"
    with pytest.raises(AlreadyEncryptedError, match=f"^{re.escape(message)}$"):
        list(EncryptPlan("sealed/").tasks(f"data/{name}"))


def test_a_file_with_a_key_file_beside_it_is_not_encrypted_again(data):
    write_files(data, {"sub/_KEY_FOR_b.csv.json": b"{}"})
    message = (
        "data/sub/b.csv is encrypted already (a key file lies beside it). "
        "Leave it out of the input pattern, or decrypt it first"
    )
    with pytest.raises(AlreadyEncryptedError, match=f"^{re.escape(message)}$"):
        list(EncryptPlan("sealed/").tasks("data/sub/b.csv"))


def test_a_shard_that_exists_is_refused_unless_the_caller_chose(data):
    write_files(data.parent, {"sealed/a.csv": b"old"})
    with pytest.raises(FileExistsError) as caught:
        list(EncryptPlan("sealed/").tasks("data/a.csv"))
    assert (caught.value.strerror, caught.value.filename) == (
        "the output exists; choose to skip or overwrite it",
        "sealed/a.csv",
    )
    assert len(list(EncryptPlan("sealed/", "skip").tasks("data/a.csv"))) == 1
    assert len(list(EncryptPlan("sealed/", "overwrite").tasks("data/a.csv"))) == 1


def test_a_name_that_is_not_utf_8_is_refused(data):
    path = os.fsdecode(os.fsencode(str(data)) + b"/\xff.csv")
    write_files(data, {path: b"x"})
    with pytest.raises(ValueError, match=r"the name of '.*\\udcff.csv' is not valid UTF-8; rename the file"):
        list(EncryptPlan("sealed/").tasks(f"{data}/*.csv"))


def test_a_folder_whose_name_is_not_utf_8_is_refused(data):
    folder = os.fsdecode(os.fsencode(str(data)) + b"/\xff")
    write_files(folder, {"a.csv": b"x"})
    with pytest.raises(ValueError, match="is not valid UTF-8; rename the file"):
        list(EncryptPlan("sealed/").tasks(f"{folder}/a.csv"))


@pytest.mark.parametrize("plan", [EncryptPlan("out/"), DecryptPlan("out/")])
def test_a_name_that_climbs_out_of_the_output_folder_is_refused(monkeypatch, plan):
    # An object store has no folders: whoever may write there can call an object `raw/../../etc/passwd`.
    path = "s3://bucket/raw/../../etc/passwd"

    def found(source):
        return ("s3://bucket/raw/**", [FileMetadata(path, 1)])

    monkeypatch.setattr("beam_envelope.transforms.plan.expand", found)
    monkeypatch.setattr("beam_envelope.transforms.plan.refuse_encrypted", lambda *_, **__: None)
    monkeypatch.setattr("beam_envelope.io.s3.S3Store.size", lambda *_: None)
    message = f"{path} would leave the output folder out/, because of the .. in its name. Rename it or leave it out"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        list(plan.tasks("s3://bucket/raw/"))


@pytest.mark.parametrize("plan", [EncryptPlan, DecryptPlan])
def test_many_files_take_little_memory(tmp_path, monkeypatch, plan):
    found = [FileMetadata(f"{tmp_path}/data/part-{number:05}.csv", number) for number in range(5_000)]
    monkeypatch.setattr(module, "expand", lambda pattern: (pattern, found))

    def count():
        return sum(1 for _ in plan(f"{tmp_path}/output/").tasks(f"{tmp_path}/data/*"))

    count()  # imports what is imported when it is needed
    number, peak = peak_of(count)
    assert number == 5_000
    assert peak < 100 * number  # beyond what was found


# -------------------------------------------------------------------------------------------------- decrypt


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    """A folder of shards and what lies beside them."""
    monkeypatch.chdir(tmp_path)
    names = ("a.csv", "_KEY_FOR_a.csv.json", "_TMP_123", "_MANIFEST.json", "sub/b", "sub/_KEY_FOR_b.json")
    return write_files(tmp_path / "sealed", dict.fromkeys(names, b"x"))


def test_key_files_and_unfinished_files_are_passed_over(sealed):
    expected = {"sealed/a.csv": "opened/a.csv", "sealed/sub/b": "opened/sub/b"}
    assert targets(DecryptPlan("opened/"), "sealed") == expected


def test_a_pattern_that_finds_key_files_only_is_an_error(sealed):
    with pytest.raises(FileNotFoundError) as caught:
        list(DecryptPlan("opened/").tasks("sealed/_KEY*"))
    assert (caught.value.strerror, caught.value.filename) == (
        "only key files and unfinished files match, no shard",
        "sealed/_KEY*",
    )


@pytest.mark.parametrize("output", ["sealed/", "./sealed/", "sealed/sub/../"])
@pytest.mark.parametrize("if_exists", ["error", "overwrite", "skip"])
def test_a_shard_is_not_decrypted_onto_itself(sealed, output, if_exists):
    with pytest.raises(ValueError, match=r"sealed/a.csv would be decrypted onto itself. Choose another output folder"):
        list(DecryptPlan(output, if_exists).tasks("sealed/*"))


def test_an_output_that_exists_is_refused_unless_the_caller_chose(sealed):
    write_files(sealed.parent, {"opened/a.csv": b"old"})
    with pytest.raises(FileExistsError, match="the output exists; choose to skip or overwrite it"):
        list(DecryptPlan("opened/").tasks("sealed/*"))
    for if_exists in ("skip", "overwrite"):
        assert targets(DecryptPlan("opened/", if_exists), "sealed/*") == {"sealed/a.csv": "opened/a.csv"}


# ------------------------------------------------------------------------------------------- what they share


def test_two_sources_of_one_target_are_an_error_that_names_both():
    tasks = [Task(f"{folder}/x.csv", 1, "sealed/x.csv", 0, 1) for folder in ("b", "a")]
    message = (
        "a/x.csv and b/x.csv would both become sealed/x.csv. "
        "Give relative_to= (--relative-to), a folder above both, or run one job for each"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        unique_task("sealed/x.csv", tasks)


def test_the_same_source_named_twice_is_one_task():
    task = Task("a/x.csv", 1, "sealed/x.csv", 0, 1)
    assert unique_task("sealed/x.csv", [task, task]) == task


def test_an_unknown_choice_of_if_exists_is_refused_with_the_known_ones():
    assert [checked_if_exists(choice) for choice in ("error", "skip", "overwrite")] == ["error", "skip", "overwrite"]
    with pytest.raises(ValueError, match=r"^if_exists is one of error, skip, overwrite, not 'replace'$"):
        checked_if_exists("replace")


@pytest.mark.parametrize(
    "row",
    [
        EncryptedFile("a", "b/ä", "c", 2**40, 0, "00ff", skipped=True),
        DecryptedFile("a", "b", 1, 2, "00ff", skipped=False),
        FailedFile("a", "WrongKeyError", "b"),
    ],
)
def test_results_are_rows_with_a_schema_for_any_language(row):
    coder = coders.registry.get_coder(type(row))
    assert isinstance(coder, coders.RowCoder)
    assert coder.decode(coder.encode(row)) == row
    assert [field.name for field in coder.schema.fields] == list(row._fields)
    assert pickle.loads(pickle.dumps(row)) == row
