"""Rotation: other wrapped forms for the same data keys. The data they encrypt is neither read nor changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from beam_envelope.errors import FormatError, TamperedError, WrongKeyError
from beam_envelope.formats.keyfile import MAX_WRAPPED_KEYS, KeyFile, WrappedDataKey
from beam_envelope.formats.manifest import Manifest
from beam_envelope.keys.allowed import Allowed
from beam_envelope.keys.provider import KeyProvider, WrappedKey

_Sealed = TypeVar("_Sealed", KeyFile, Manifest)


@dataclass(frozen=True)
class Rotation:
    """Which KMS keys a data key is to be wrapped by afterwards. Hashable; pickles cleanly.

    The same rotation of what it has rotated changes nothing, except where `source` and `to` are one key: that wraps
    anew, under the newest version of the key.

    Attributes:
        source: the KMS keys that open what is there and whose forms can be relied on: a new form is made of theirs. An
            allow-list may stand for many, of which each data key has to have one form.
        to: the KMS key whose new form takes the place of theirs, or None.
        add: KMS keys that are to open it as well.
        remove: KMS keys that are to open it no longer. Something that opens it stays, and that is made sure of first:
            it was made of a form of `source` in the same rotation, or a form that stays, of a key of `source`, is
            opened and compared.
    """

    source: tuple[KeyProvider, ...]
    to: KeyProvider | None = None
    add: tuple[KeyProvider, ...] = ()
    remove: tuple[KeyProvider, ...] = ()

    def __post_init__(self) -> None:
        """Check that it says something, and one thing only. Raises ValueError."""
        if self.to is None and not self.add and not self.remove:
            msg = "nothing to do: give a key to rotate to (--to), to add (--add) or to remove (--remove)"
            raise ValueError(msg)
        if not self.source:
            msg = (
                "give the key that opens what is there (--from): its form is what others are made of, and what stays "
                "when one is removed"
            )
            raise ValueError(msg)
        for key in self.remove:
            if key in {self.to, *self.add}:
                raise ValueError(f"{key} is to be removed, and added as well. Give it once")

    @property
    def keys(self) -> tuple[KeyProvider, ...]:
        """All KMS keys that it names."""
        return (*self.source, *(() if self.to is None else (self.to,)), *self.add, *self.remove)


@dataclass(frozen=True)
class Step:
    """What a rotation does to one data key. Equal steps, in one encryption context, have one result.

    Attributes:
        data_key: what is there.
        origin: the form that new ones are made of, and its key; or the form to try before another goes; or None.
        make: the KMS keys to make new forms under.
        keep: the forms that stay.
        kms_keys: what it is wrapped by afterwards: provider and full name of each KMS key.
    """

    data_key: WrappedDataKey
    origin: tuple[KeyProvider, WrappedKey] | None = None
    make: tuple[KeyProvider, ...] = ()
    keep: tuple[WrappedKey, ...] = ()
    kms_keys: tuple[tuple[str, str], ...] = ()

    @property
    def changes(self) -> bool:
        """Whether it changes anything."""
        return self.origin is not None


class Rotator:
    """Does a rotation, in one process: it asks for the full name of each KMS key once. Safe between threads."""

    def __init__(self, rotation: Rotation) -> None:
        """Make no call yet."""
        self._rotation = rotation
        self._names: dict[KeyProvider, str] = {}
        self._known: dict[tuple[KeyProvider, str, str], bool] = {}

    def rotate(self, key_file: _Sealed, what: str) -> _Sealed:
        """Return a key file, or a manifest, with the new wrapped forms.

        Args:
            key_file: what is there.
            what: its name, for messages.

        Raises:
            As `plan` and `make`.
        """
        steps = self.plan(key_file, what)
        pairs = zip(steps, key_file.contexts, strict=True)
        return key_file.with_wrapped_keys([self.make(step, context) for step, context in pairs])

    def plan(self, key_file: KeyFile | Manifest, what: str) -> tuple[Step, ...]:
        """Work out what is to be done with each data key; asks the KMS for the full names of keys only.

        Of a Parquet file or a manifest, which may have data keys under several KMS keys, those under others stay as
        they are.

        Raises:
            WrongKeyError: no key of the rotation wrapped it (a manifest stays as it is then), or no form that can be
                relied on would be left.
            TamperedError: it has two forms by the key to rotate from.
            FormatError: it would have more forms than a key file holds.
            KeyAccessError, KmsUnavailableError: from the KMS.
        """
        ours = [any(self._forms(data_key, key) for key in self._rotation.keys) for data_key in key_file.data_keys]
        # A manifest is under the keys of footers, so it may be no concern of a rotation of columns' keys.
        if not any(ours) and not isinstance(key_file, Manifest):
            raise self._not_ours(key_file.data_keys, what)
        return tuple(
            self._plan(data_key, what) if concerned else Step(data_key, kms_keys=_names(data_key.wrapped_keys))
            for data_key, concerned in zip(key_file.data_keys, ours, strict=True)
        )

    def make(
        self, step: Step, context: Mapping[str, str], before_request: Callable[[], object] = lambda: None
    ) -> WrappedDataKey:
        """Do what was planned: a request to the KMS for each new form, or one to open what stays.

        Args:
            step: of `plan`.
            context: the encryption context of the key file.
            before_request: called before each request, to wait if need be.

        Raises:
            TamperedError, WrongKeyError, KeyAccessError, KmsUnavailableError: from the KMS.
        """
        if step.origin is None:
            return step.data_key
        key, form = step.origin
        made = []
        for to in step.make:
            before_request()
            made.append(key.rewrap(form, context, to))
            if not self._is_of(made[-1], to):
                raise WrongKeyError(
                    f"the KMS wrapped the data key by {made[-1].kms_key}, and not by {self._full_name(to)}, which "
                    f"{to} was a moment ago. Run the rotation again"
                )
        if not made:
            before_request()
            with key.unwrap(form, context) as opened:
                if opened.key_id != step.data_key.key_id:
                    raise TamperedError(
                        f"what {form.kms_key} opens is another data key, so the other form must stay: the key file was "
                        "changed. Restore it from a copy"
                    )
        forms = [*made, *step.keep] if self._rotation.to in step.make else [*step.keep, *made]
        return WrappedDataKey(step.data_key.key_id, tuple(forms))

    def _plan(self, data_key: WrappedDataKey, what: str) -> Step:
        rotation, forms = self._rotation, data_key.wrapped_keys
        old = [form for key in rotation.source for form in self._forms(data_key, key)]
        going = [form for key in rotation.remove for form in self._forms(data_key, key)]
        replaced = old if rotation.to is not None else []
        make = [rotation.to] if rotation.to is not None and replaced else []
        # A form that is there already may be anyone's work. Where another goes, the KMS makes it anew of that one.
        anew = bool(going and old)
        make += [key for key in rotation.add if key != rotation.to and (anew or not self._forms(data_key, key))]
        made = [(key.provider, self._full_name(key)) for key in make]
        keep = tuple(
            form for form in forms if form not in [*going, *replaced] and (form.provider, form.kms_key) not in made
        )
        if not make and not going:
            if rotation.to is not None and not self._forms(data_key, rotation.to):
                raise self._not_ours([data_key], what)
            return Step(data_key, kms_keys=_names(forms))
        left = [*made, *_names(keep)] if rotation.to in make else [*_names(keep), *made]
        _check_left(left, [form for form in going if (form.provider, form.kms_key) in made], what)
        # What stays untouched has to open before another form goes; else what goes or stays, to make new forms of.
        usable = forms if make else keep
        origin = self._origin(data_key, usable, what)
        if origin is None:
            if make:
                raise self._not_ours([data_key], what)
            raise WrongKeyError(
                f"{what} would be left with {_listed(left)}, which nothing says opens it. Name with --from a key "
                "that stays: its form is tried before another goes"
            )
        return Step(data_key, origin, tuple(make), keep, tuple(left))

    def _origin(
        self, data_key: WrappedDataKey, usable: Sequence[WrappedKey], what: str
    ) -> tuple[KeyProvider, WrappedKey] | None:
        """Return the first form that may be used, and the key given for it."""
        to = self._rotation.to
        for key in (*self._rotation.source, *(() if to is None else (to,))):
            found = self._forms(data_key, key)
            if len(found) > 1 and isinstance(key, Allowed):
                # Which of them can be relied on, nothing says: each may be anyone's work who may encrypt under it.
                raise WrongKeyError(
                    f"{what} is wrapped by several keys of {key}: {_listed(_names(found))}. Allow fewer, or name the "
                    "one to rely on with --from"
                )
            if len(found) > 1:
                raise TamperedError(
                    f"{what} has two forms of one data key by {found[0].kms_key}, of which we write one: it was "
                    "changed. Restore it from a copy"
                )
            if found and found[0] in usable:
                return key, found[0]
        return None

    def _not_ours(self, data_keys: Sequence[WrappedDataKey], what: str) -> WrongKeyError:
        under = _listed(_names([form for data_key in data_keys for form in data_key.wrapped_keys]))
        given = ", ".join(map(str, self._rotation.source))
        return WrongKeyError(f"{what} is wrapped by {under}, and not by {given}. Give the key that it is under")

    def _forms(self, data_key: WrappedDataKey, key: KeyProvider) -> list[WrappedKey]:
        """Return the forms that a KMS key made: one or none, if nobody changed the file."""
        return [form for form in data_key.wrapped_keys if self._is_of(form, key)]

    def _is_of(self, form: WrappedKey, key: KeyProvider) -> bool:
        entry = (key, form.provider, form.kms_key)
        if entry not in self._known:
            # Asking for a name may need a permission, so only where it may be this one.
            if isinstance(key, Allowed):
                # What is under a new key already is done, whether or not that one is on the list too.
                new = (*(() if self._rotation.to is None else (self._rotation.to,)), *self._rotation.add)
                self._known[entry] = key.allows(form) and not any(self._is_of(form, other) for other in new)
            else:
                self._known[entry] = key.may_open(form) and form.kms_key == self._full_name(key)
        return self._known[entry]

    def _full_name(self, key: KeyProvider) -> str:
        if key not in self._names:
            self._names[key] = key.full_name()
        return self._names[key]


def _check_left(left: Sequence[tuple[str, str]], both: Sequence[WrappedKey], what: str) -> None:
    if both:
        raise WrongKeyError(f"{what}: {both[0].kms_key} is to be removed, and added under another name. Give it once")
    if not left:
        raise WrongKeyError(
            f"{what} is wrapped by nothing but the keys to remove, so nobody could open it any more. Add another "
            "key first, or rotate to it"
        )
    if len(left) > MAX_WRAPPED_KEYS:
        raise FormatError(f"{what} would hold {len(left)} forms of a data key; {MAX_WRAPPED_KEYS} are allowed")


def _names(forms: Sequence[WrappedKey]) -> tuple[tuple[str, str], ...]:
    return tuple((form.provider, form.kms_key) for form in forms)


def _listed(names: Sequence[tuple[str, str]]) -> str:
    return ", ".join(dict.fromkeys(kms_key for _, kms_key in names))
