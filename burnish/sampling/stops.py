"""Where an answer has come to a stop string, which may lie across the borders of its tokens."""

from collections.abc import Callable, Sequence

_FRAYED = 8
"""Characters at the start of a piece of text that may not be what they are in the whole: the rest of a character whose
first bytes are in the token before, or a space that tokenizers leave out at the start of a text."""


class Stops:
    """Finds the token in which one of the stop strings is completed."""

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self.strings = tuple(strings)
        self._decode = decode
        self._reach = max(map(len, self.strings)) + _FRAYED

    def find(self, ids: Sequence[int], checked: int) -> int | None:
        """How many of the ids are written when the first stop string is complete; the first `checked` hold none."""
        start = self._start(ids, checked)
        if not self._in(ids[start:]):
            return None
        return next(end for end in range(checked + 1, len(ids) + 1) if self._in(ids[start:end]))

    def _start(self, ids: Sequence[int], checked: int) -> int:
        """From which token on text must be looked at for what a stop string may have begun with."""
        back = self._reach
        while back < checked and len(self._decode(list(ids[checked - back : checked]))) < self._reach:
            back *= 2
        return max(0, checked - back)

    def _in(self, ids: Sequence[int]) -> bool:
        text = self._decode(list(ids))
        return any(string in text for string in self.strings)


def before_stop(text: str, strings: Sequence[str]) -> str:
    """The text before the first of the stop strings in it."""
    places = [place for string in strings if (place := text.find(string)) >= 0]
    return text[: min(places, default=len(text))]
