"""`beam-envelope manifest`: how a folder differs from its list of shards, and the way to make the list agree."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from beam_envelope import console
from beam_envelope.arguments import parse_context
from beam_envelope.console import printable
from beam_envelope.errors import ManifestError
from beam_envelope.formats.keyfile import is_internal, is_unfinished
from beam_envelope.io.manifest import WrittenShard, add_to_manifest, compact_manifest, nearest, shard_on_store
from beam_envelope.io.manifest_reader import ManifestReader
from beam_envelope.io.store import quote_glob, split_path
from beam_envelope.keys.provider import KeyProvider
from beam_envelope.keys.uri import open_keys
from beam_envelope.transforms.plan import as_folder
from beam_envelope.transforms.verify_find import Found, find_files
from beam_envelope.transforms.verify_plan import Verifier


def run(arguments: argparse.Namespace) -> int:
    """Compare and change; return the exit status.

    Raises:
        ManifestError: a shard is in another's place, or does not open; the manifest was forged.
        As `ManifestReader.check`, and as writing one.
    """
    folder = as_folder(arguments.folder)
    keys, context = open_keys(arguments.key), parse_context(arguments.context)
    reader = ManifestReader("use", keys, context)
    data = {
        path: size
        for path, size in find_files(folder).items()
        if not is_internal(split_path(path)[1]) and not is_unfinished(path)
    }
    there = [path for path, size in data.items() if size is not None]
    survey = reader.survey(f"{quote_glob(folder)}**", there)
    unlisted = [path for path in there if path not in survey.shard_ids]
    verifier = Verifier(keys, context, reader, quick=True)
    _check(verifier, {path: Found(data[path], shard_id) for path, shard_id in survey.shard_ids.items()})
    changes = []
    if arguments.add:
        _check(verifier, {path: Found(data[path]) for path in unlisted})
        changes += [shard_on_store(path) for path in unlisted]
    if arguments.forget:
        changes += [WrittenShard(path, None) for path in survey.missing]
    _change(folder, changes, keys, context)
    found = nearest(folder)
    sections = 0
    if arguments.compact and found is not None:
        sections = compact_manifest(found[0], keys, context)
    left = {
        "not listed": () if arguments.add else unlisted,
        "not there": () if arguments.forget else survey.missing,
    }
    if arguments.json:
        figures = {"listed": len(survey.shard_ids), "not_listed": list(unlisted), "not_there": list(survey.missing)}
        figures |= {"added": len(unlisted) if arguments.add else 0, "compacted_sections": sections}
        figures["forgotten"] = len(survey.missing) if arguments.forget else 0
        print(json.dumps(figures))  # noqa: T201  # what the command is asked for
    else:
        _show(left)
        n = len(survey.shard_ids)
        done = [f"{n} {'shard is' if n == 1 else 'shards are'} listed and there"]
        done += [f"{len(unlisted)} added"] if arguments.add else []
        done += [f"{len(survey.missing)} taken from the list"] if arguments.forget else []
        done += [f"{sections} sections made one"] if sections else []
        console.output.print(f"{', '.join(done)}.", soft_wrap=True)
    if any(left.values()):
        console.errors.print("The list and the folder differ; --add and --forget make the list agree.", soft_wrap=True)
        return 1
    return 0


def _check(verifier: Verifier, files: Mapping[str, Found]) -> None:
    """Look whether files open, and are the ones that are listed. Raises ManifestError, KeyAccessError, ..."""
    for path, found in files.items():
        for part in verifier.parts(path, found)[:1]:
            result = verifier.check(part, lambda _: None)
            if not result.ok:
                raise ManifestError(f"{path} is not taken for a shard of this dataset: {result.problem}")


def _change(
    folder: str, changes: Sequence[WrittenShard], keys: Sequence[KeyProvider], context: Mapping[str, str]
) -> None:
    """Tell each manifest of what is below it."""
    by_manifest: dict[str, tuple[str, list[WrittenShard]]] = {}
    for shard in changes:
        found = nearest(split_path(shard.path)[0])
        place = folder if found is None else split_path(found[0])[0]
        by_manifest.setdefault(place, (place, []))[1].append(shard)
    for place, shards in by_manifest.values():
        add_to_manifest(place, shards, keys, context)


def _show(left: Mapping[str, Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("", no_wrap=True)
    for text, paths in left.items():
        for path in paths:
            table.add_row(escape(printable(path)), text)
    if table.row_count:
        console.output.print(table)
