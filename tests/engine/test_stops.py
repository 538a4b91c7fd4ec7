"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ernie45.engine.stops import StopChecker


def _whole(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The definition: the stop string complete first wins; of those complete at the same place, the one begun first."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    pieces=st.lists(st.text(alphabet="abé", max_size=4), max_size=12),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
)
def test_any_cutting_gives_the_result_of_the_whole_text(pieces: list[str], stop: list[str]) -> None:
    checker, shown, met = StopChecker(tuple(stop)), "", None
    for piece in pieces:
        text, met = checker.push(piece, armed=True)
        shown += text
        if met is not None:
            break
    if met is None:
        shown += checker.finish()
    assert (shown, met) == _whole("".join(pieces), tuple(stop))


def test_text_that_cannot_stop_is_not_held_back() -> None:
    checker = StopChecker(("END",))
    assert checker.push("hello E", armed=True) == ("hello ", None)
    assert checker.push("ager", armed=True) == ("Eager", None)


def test_before_min_tokens_stop_strings_pass() -> None:
    checker = StopChecker(("x",))
    assert checker.push("axb", armed=False) == ("axb", None)
    assert checker.push("cxd", armed=True) == ("c", "x")


def test_the_stop_string_is_shown_if_asked_for() -> None:
    checker = StopChecker(("END",), included=True)
    assert checker.push("hello E", armed=True) == ("hello ", None)
    assert checker.push("NDless", armed=True) == ("END", "END")
