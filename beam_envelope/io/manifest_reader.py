"""Manifests on the read side: what a pattern finds is held against what they list."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast

from beam_envelope.arguments import MANIFEST_MODES
from beam_envelope.errors import ContextMismatchError, FormatError, KeyAccessError, ManifestError, WrongKeyError
from beam_envelope.formats.keyfile import MANIFEST_NAME, KeyFile, is_internal, is_unfinished
from beam_envelope.formats.manifest import Manifest
from beam_envelope.io.manifest import canonical, nearest, parents, read_manifest, verify_section
from beam_envelope.io.store import existing, glob_matcher, literal_path, same_place, same_places, split_glob, split_path
from beam_envelope.keys.cache import shared
from beam_envelope.keys.choice import KeyChoice, PathFields
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.provider import KeyProvider
from beam_envelope.settings import PathSettings, Settings

ManifestMode: TypeAlias = Literal["require", "use", "ignore"]

MISSING: Final = (
    "listed by the manifest, and not there. Restore it from a copy; if it was removed on purpose, take it from the "
    "list (beam-envelope manifest --forget), or read with manifest='ignore' (--manifest=ignore)"
)
EXTRA: Final = (
    "not listed by the manifest: put there by somebody, or by a job that was stopped before its end. Run that job "
    "again, take it away, list it (beam-envelope manifest --add), or read with manifest='ignore' (--manifest=ignore)"
)

_TTL_S: Final = 60.0
_MAX_RUNS: Final = 4
_LISTED: Final = 3


def checked_mode(manifest: str) -> ManifestMode:
    """Return `manifest` if it is one of the choices. Raises ValueError."""
    if manifest not in MANIFEST_MODES:
        msg = f"manifest is one of {', '.join(MANIFEST_MODES)}, not {manifest!r}"
        raise ValueError(msg)
    return cast("ManifestMode", manifest)


def may_be_listed(path: str) -> bool:
    """Whether a file is one that `ManifestReader.check` is to be told of: a shard, or a manifest."""
    name = split_path(path)[1]
    return not is_unfinished(path) and (name == MANIFEST_NAME or not is_internal(name))


@dataclass(frozen=True)
class ManifestReader:
    """Holds what is read against the manifests that speak for it. Configuration only, so it travels.

    Attributes:
        mode: `require`: a manifest has to list every file. `use`: where there is one, it has to. `ignore`: none is
            looked for.
        keys: the allowed KMS keys, templates among them.
        context: the encryption context that the caller expects; its values may be templates.
        path_fields: where in a path is what fills those.
        run: a random UUID: each reader reads a manifest once in a minute, and never takes what another has read.
    """

    mode: ManifestMode
    keys: tuple[KeyProvider, ...]
    context: Mapping[str, str] | AnyContext
    path_fields: str | None = None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def check(
        self, pattern: str, paths: Sequence[str], failures: dict[str, ManifestError] | None = None
    ) -> Mapping[str, str]:
        """Compare what a pattern finds with what the manifests list.

        Args:
            pattern: the glob that finds the shards.
            paths: the shards that it found; manifests may be among them, and speak also for shards that are all gone.
                Where no manifest is required, shards that are below none pass.
            failures: takes what is wrong with single shards, by their paths, instead of raising it.

        Returns:
            The shard id that each has to have, as hexadecimal digits; empty where no manifest speaks for them.

        Raises:
            ManifestError: a shard is missing, or is not listed; a manifest was changed; or is missing (`require`).
            WrongKeyError, ContextMismatchError: what is listed belongs to another dataset.
            FormatError, KeyAccessError, KmsUnavailableError, OSError: from reading the manifests.
        """
        survey = self.survey(pattern, paths)
        for problem, names in ((MISSING, survey.missing), (EXTRA, survey.extra)):
            if failures is not None:
                failures |= {name: ManifestError(f"{name}: {problem}") for name in names}
            elif names:
                more = f" (and {len(names) - _LISTED} more)" if len(names) > _LISTED else ""
                raise ManifestError(f"{', '.join(sorted(names)[:_LISTED])}{more}: {problem}")
        return survey.shard_ids

    def survey(self, pattern: str, paths: Sequence[str]) -> Survey:
        """Compare, and return what is missing or not listed instead of raising for it. Otherwise as `check`."""
        if self.mode == "ignore":
            return Survey((), {}, (), ())
        run = _runs().of(self.run)
        known = run.used
        with contextlib.suppress(*([ManifestError] if known else [])):
            found = self._survey(pattern, paths, run)
            if not known or not (found.missing or found.extra):
                return found
        # What this reader has read may be a minute old: a job may have added to it.
        return self._survey(pattern, paths, _runs().of(self.run, anew=True))

    def _survey(self, pattern: str, paths: Sequence[str], run: _Run) -> Survey:
        folder = split_glob(pattern)[0]
        below = canonical(folder)
        places = same_places(paths)
        folders = {split_path(place)[0] for place in places.values()}
        places = {path: place for path, place in places.items() if split_path(path)[1] != MANIFEST_NAME}
        listed: dict[str, str] = {}
        context = self.context if isinstance(self.context, AnyContext) else tuple(sorted(self.context.items()))
        choice = KeyChoice(self.keys, context)
        settings = PathSettings(choice, PathFields(choice.names, self.path_fields))
        with run as loaded:
            manifests = loaded.manifests(below, folders)
            if not manifests and self.mode == "require":
                msg = (
                    f"{folder or './'} has no {MANIFEST_NAME}, nor has a folder above it: it was lost, or the shards "
                    "were written without one. Restore it from a copy, or read with manifest='use' (--manifest=use)"
                )
                raise ManifestError(msg)
            for manifest in manifests:
                for place, shard_id in manifest.listed(pattern, settings).items():
                    if listed.setdefault(place, shard_id) != shard_id:
                        msg = (
                            f"{place} is listed by two manifests as two shards: by {manifest.path}, and by one above "
                            "it. Write the dataset anew into one folder, or read with manifest='ignore'"
                        )
                        raise ManifestError(msg)
        if not manifests:
            return Survey((), {}, (), ())
        shard_ids = {path: listed[place] for path, place in places.items() if place in listed}
        missing = sorted(listed.keys() - set(places.values()))
        speaking = tuple(split_path(manifest.path)[0] for manifest in manifests)
        extra = [
            path
            for path, place in places.items()
            if place not in listed and (self.mode == "require" or place.startswith(speaking))
        ]
        as_given = [
            tuple(folder + place[len(below) :] if place.startswith(below) else place for place in group)
            for group in ([manifest.path for manifest in manifests], missing)
        ]
        return Survey(as_given[0], shard_ids, as_given[1], tuple(extra))


class Survey(NamedTuple):
    """How what a pattern finds differs from what the manifests list.

    Attributes:
        manifests: their paths.
        shard_ids: the shard id that each file has to have.
        missing: the files that are listed and were not found.
        extra: the files that were found and are not listed.
    """

    manifests: tuple[str, ...]
    shard_ids: Mapping[str, str]
    missing: Sequence[str]
    extra: Sequence[str]


def check_shard_id(path: str, key_file: KeyFile, shard_id: str) -> None:
    """Compare a shard's id with the manifest's, if it has one.

    Raises:
        ManifestError: it is another shard.
    """
    if shard_id and key_file.shard_id.hex != shard_id:
        raise ManifestError(
            f"{path} is not the shard that its manifest lists: it was swapped, or an older one put in its place. "
            "Restore it from a copy, or read with manifest='ignore' (--manifest=ignore)"
        )


class _Runs:
    """What the last few readers have loaded, in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_run: OrderedDict[str, _Run] = OrderedDict()

    def of(self, run: str, *, anew: bool = False) -> _Run:
        with self._lock:
            found = self._by_run.pop(run, None)
            if found is None or anew or found.expired():
                found = _Run()
            self._by_run[run] = found
            while len(self._by_run) > _MAX_RUNS:
                self._by_run.popitem(last=False)
            return found

    def close(self) -> None:
        """Hold no key."""


def _runs() -> _Runs:
    return shared("manifests", _Runs)


class _Run:
    """What one reader has loaded. A context manager: one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.used = False
        self._expires = time.monotonic() + _TTL_S
        self._nearest: dict[str, tuple[str, bytes] | None] = {}
        self._loaded: dict[str, _Loaded | None] = {}

    def expired(self) -> bool:
        return time.monotonic() >= self._expires

    def __enter__(self) -> _Run:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.used = True
        self._lock.release()

    def manifests(self, folder: str, folders: Iterable[str]) -> list[_Loaded]:
        """Return the manifests that speak for some folders below one: at or above that the nearest, below it all."""
        if folder not in self._nearest:
            self._nearest[folder] = nearest(folder)
        top = self._nearest[folder]
        if top is not None and top[0] not in self._loaded:
            self._loaded[top[0]] = _Loaded(*top)
        inner = {parent + MANIFEST_NAME for place in folders for parent in parents(place, folder)}
        unknown = sorted(inner - self._loaded.keys())
        there = existing(unknown, folder) if unknown else set()
        self._loaded |= {path: _Loaded(path, read_manifest(path)) if path in there else None for path in unknown}
        chosen = ([] if top is None else [top[0]]) + sorted(inner)
        return [found for path in chosen if (found := self._loaded[path]) is not None]


class _Loaded:
    """A manifest, as one reader sees it."""

    def __init__(self, path: str, raw: bytes) -> None:
        self.path = path
        self._folder = split_path(path)[0]
        self._manifest = Manifest.from_bytes(raw, path)
        self._latest = self._manifest.latest()
        self._verified: set[tuple[Any, ...]] = set()
        self._vouched = False

    def listed(self, pattern: str, settings: PathSettings) -> dict[str, str]:
        """Return the places that match, and the shard id of each; the sections that say so are authenticated."""
        literal = literal_path(pattern)
        if literal is not None:
            name = same_place(literal)[len(self._folder) :]
            found = {name: self._latest[name]} if name in self._latest else {}
        else:
            matches = glob_matcher(pattern)
            found = {name: said for name, said in self._latest.items() if matches(self._folder + name)}
        if settings.choice.names:
            # What a section says of a path has to be under the keys that the path chooses.
            said_by = {(number, settings.fields(self._folder + name)): name for name, (number, _) in found.items()}
        else:
            said_by = {(number, ()): name for name, (number, _) in found.items()}
        for (number, _), name in sorted(said_by.items()):
            self._verify(number, settings.for_path(self._folder + name))
        if not self._vouched:
            self._vouch(settings)
        return {self._folder + name: entry.shard_id for name, (_, entry) in found.items() if entry is not None}

    def _vouch(self, settings: PathSettings) -> None:
        """Authenticate the last section that can be: it tells if one of those before it was taken out."""
        for number, section in reversed(list(enumerate(self._manifest.sections))):
            with contextlib.suppress(WrongKeyError, ContextMismatchError, KeyAccessError, FormatError):
                self._verify(number, settings.for_path(self._folder + min(section.shards, default="")))
                break
        self._vouched = True

    def _verify(self, number: int, settings: Settings) -> None:
        entry = (number, settings.keys, settings.any_context, *sorted(settings.context.items()))
        if entry not in self._verified:
            verify_section(self._manifest, number, settings.keys, settings.expected_context, self.path)
            self._verified.add(entry)
