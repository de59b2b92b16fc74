"""Text of tokens that are still coming: whole characters, cut at a stop text, nothing twice."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from gmpo.serving.text import TextStream


def bytes_to_text(token_ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are single bytes: the hardest case for whole characters."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def pieces(text: str, *, stop: Sequence[str] = (), sizes: Sequence[int] = (1,)) -> list[str]:
    stream = TextStream(bytes_to_text, stop=stop)
    data, given_pieces, turn = list(text.encode()), [], 0
    while data and not stream.is_stopped:
        size = sizes[turn % len(sizes)]
        given_pieces.append(stream.add(data[:size]))
        data, turn = data[size:], turn + 1
    return [*given_pieces, stream.finish()]


def until_stop(text: str, stop: Sequence[str]) -> str:
    """The obvious reference: all of the text is there."""
    places = [text.find(one) for one in stop if one in text]
    return text[: min(places)] if places else text


def test_a_character_is_given_when_its_last_byte_is_there():
    # "é" is two bytes, "한" three.
    assert pieces("aé한") == ["a", "", "é", "", "", "한", ""]


def test_what_may_begin_a_stop_text_is_held_back():
    # "END" ends it; "E" after "a" may begin it, "Ex" does not.
    assert pieces("aExENDb", stop=["END"]) == ["a", "", "Ex", "", "", "", ""]
    assert "".join(pieces("aE", stop=["END"])) == "aE"


def test_the_earliest_of_several_stop_texts_cuts():
    assert "".join(pieces("one two three", stop=["three", " t"])) == "one"


def test_bytes_that_are_no_character_come_at_the_end():
    stream = TextStream(bytes_to_text)
    assert stream.add([0x61, 0xED]) == ""
    assert stream.finish() == "a\ufffd"


@given(
    text=st.text(alphabet="abé한😀 ", max_size=40),
    stop=st.lists(st.text(alphabet="ab한 ", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_the_pieces_make_up_the_text_before_the_stop(text: str, stop: list[str], sizes: list[int]):
    said = pieces(text, stop=stop, sizes=sizes)
    assert "".join(said) == until_stop(text, stop)
    # What was said early is never taken back.
    assert all(until_stop(text, stop).startswith("".join(said[:end])) for end in range(len(said)))
