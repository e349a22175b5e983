"""Stop strings and the limits of length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot_engine.errors import InvalidRequestError
from kvpilot_engine.frontend.completion import StopStrings, check_length

SMALL = st.text("ab", max_size=30)


@given(pieces=st.lists(SMALL, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_a_stream_where_they_cut_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    """For any pieces the shown text ends before the first stop string that is completed."""
    matcher, shown = StopStrings(stops), ""
    for piece in pieces:
        for character in piece:  # one at a time, as tokens come
            shown += matcher.push(character)
    shown += matcher.finish()
    whole = "".join(pieces)
    ends = [whole.index(stop) + len(stop) for stop in stops if stop in whole]
    if not ends:
        assert (shown, matcher.stopped) == (whole, False)
        return
    first = whole[: min(ends)]
    assert matcher.stopped
    assert shown == first[: min(first.index(stop) for stop in stops if stop in first)]


@given(text=SMALL, stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_shown_text_never_holds_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = "".join(matcher.push(character) for character in text)
    assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        (0, 1, "prompt: at least one token is required"),
        (100, 1, "prompt: 100 tokens do not fit; this model's context is 100 tokens, of which .* 99"),
        (90, 11, "max_tokens: 11 new tokens after a prompt of 90 exceed .* at most 10 are possible"),
    ],
)  # fmt: skip
def test_request_that_does_not_fit_the_context_is_refused(prompt: int, new: int, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check_length("prompt", prompt, "max_tokens", new, 100)
    check_length("prompt", 90, "max_tokens", 10, 100)
