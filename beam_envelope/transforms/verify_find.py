"""What a verification looks at: the files that a user names, held against the manifests."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from beam_envelope.errors import EnvelopeError, KeyAccessError, KmsUnavailableError
from beam_envelope.formats.keyfile import KEY_FILE_PREFIX, KEY_FILE_SUFFIX, MANIFEST_NAME, is_key_file
from beam_envelope.io.keyfiles import find_key_files
from beam_envelope.io.manifest_reader import EXTRA, MISSING, ManifestReader, may_be_listed
from beam_envelope.io.store import expand, split_glob, split_path, store_of


class Found(NamedTuple):
    """What is known of a file before it is looked at.

    Attributes:
        size: of the file; None if only its key file was seen, or it is only listed.
        shard_id: the id that the manifest lists it with, in hexadecimal digits, or "".
        problem: what the manifest says against it, or "".
    """

    size: int | None
    shard_id: str = ""
    problem: str = ""


def find_listed(pattern: str, manifest: ManifestReader) -> dict[str, Found]:
    """Return what `find_files` does, held against the manifests, and the manifests themselves. Raises as it.

    Raises:
        KeyAccessError, KmsUnavailableError: from the KMS.
    """
    found = {path: Found(size) for path, size in find_files(pattern).items()}
    data = [path for path, file in found.items() if file.size is not None and may_be_listed(path)]
    try:
        glob = expand(pattern)[0]
    except FileNotFoundError:
        glob = pattern
    try:
        survey = manifest.survey(glob, data)
    except (EnvelopeError, OSError) as error:
        problem = reason_of(error)
        return found | {split_glob(glob)[0] + MANIFEST_NAME: Found(None, problem=problem)}
    found |= {path: Found(found[path].size, shard_id) for path, shard_id in survey.shard_ids.items()}
    found |= {path: Found(found[path].size, problem=f"{path} is {EXTRA}") for path in survey.extra}
    found |= {path: Found(None, problem=f"{path} is {MISSING}") for path in survey.missing}
    return found | {path: Found(None) for path in survey.manifests}


def find_files(pattern: str) -> dict[str, int | None]:
    """Return the files that a user names, and those whose key files lie there: a path and a size, None if not seen.

    A key file stands for the file that it belongs to. So a glob of shards also tells of shards that are missing.

    Raises:
        FileNotFoundError: nothing matches.
        OSError: from the store.
    """
    found: dict[str, int | None] = {}
    missing: FileNotFoundError | None = None
    try:
        for metadata in expand(pattern)[1]:
            folder, name = split_path(metadata.path)
            if is_key_file(name):
                found.setdefault(_data_path(metadata.path), None)
            else:
                found[folder + name] = metadata.size_in_bytes
    except FileNotFoundError as error:
        missing = error
    store = store_of(pattern)
    if not pattern.endswith("/") and not store.is_folder(pattern):  # of a folder, everything is listed already
        try:
            key_files = find_key_files(pattern)
        except FileNotFoundError:
            key_files = []
        if missing is not None:  # a literal path comes back as it is, whether its key file is there or not
            key_files = [path for path in key_files if store.size(path) is not None]
        for path in key_files:
            found.setdefault(_data_path(path), None)
    if not found and missing is not None:
        raise missing
    return found


def printable_name(path: str) -> str:
    """Return a path that any coder takes; what is no UTF-8 in a name of a local disk shows as an escape."""
    return path.encode("utf-8", "backslashreplace").decode()


def _data_path(key_file: str) -> str:
    """Return the path of the file that a key file belongs to."""
    folder, name = split_path(key_file)
    return folder + name.removeprefix(KEY_FILE_PREFIX).removesuffix(KEY_FILE_SUFFIX)


def reason_of(error: EnvelopeError | OSError) -> str:
    """Return what is wrong with a file; errors of the KMS are no file's own."""
    if isinstance(error, (KeyAccessError, KmsUnavailableError)):
        _raise(error)
    if isinstance(error, OSError):
        return f"it cannot be read: {error.strerror or error}"
    return str(error)


def _raise(error: EnvelopeError) -> NoReturn:
    raise error
