"""Settings where a path is all that a caller gives: arguments first, then the environment."""

import pytest

from beam_envelope import ANY_CONTEXT, FormatError
from beam_envelope.keys.local import LocalKms
from beam_envelope.settings import Settings, settings_of

KEY = "local-kms:///ring.json"


def test_arguments_are_taken_as_they_come():
    assert settings_of(key=KEY, context={"a": "1"}, missing="") == Settings((LocalKms("/ring.json"),), {"a": "1"})
    assert settings_of(key=[KEY, LocalKms("/b.json")], context=["a=1", "b=2"], missing="").context == {
        "a": "1",
        "b": "2",
    }
    assert settings_of(key=LocalKms("/b.json"), context="a=1,b=2", missing="").context == {"a": "1", "b": "2"}


def test_the_environment_gives_what_arguments_do_not(monkeypatch):
    monkeypatch.setenv("BEAM_ENVELOPE_KEY", f"{KEY} local-kms:///b.json")
    monkeypatch.setenv("BEAM_ENVELOPE_CONTEXT", "a=1,b=2")
    monkeypatch.setenv("BEAM_ENVELOPE_ANY_CONTEXT", "1")
    keys = (LocalKms("/ring.json"), LocalKms("/b.json"))
    assert settings_of(missing="") == Settings(keys, {"a": "1", "b": "2"}, any_context=True)
    assert settings_of(key="local-kms:///c.json", context={}, any_context=False, missing="") == Settings(
        (LocalKms("/c.json"),), {}
    )


def test_readers_expect_the_context_or_any():
    assert settings_of(key=KEY, context={"a": "1"}, missing="").expected_context == {"a": "1"}
    assert settings_of(key=KEY, any_context=True, missing="").expected_context is ANY_CONTEXT


@pytest.mark.parametrize("key", [None, "", []])
def test_without_a_key_it_says_what_is_missing(key):
    with pytest.raises(ValueError, match=r"^give a key$"):
        settings_of(key=key, missing="give a key")


def test_what_is_wrong_is_refused():
    with pytest.raises(FormatError, match="does not start with a scheme that is known"):
        settings_of(key="kms://a", missing="")
    with pytest.raises(ValueError, match="write NAME=VALUE, each name once"):
        settings_of(key=KEY, context="a", missing="")
