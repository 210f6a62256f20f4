"""Where a continuation ends: stop strings found across token borders, and the text that may already be shown."""

from collections.abc import Callable, Sequence

from megacoder.data.tokenizer import Tokenizer

__all__ = ["StopStrings"]


class StopStrings:
    """Watches one sequence (see `generate`'s watcher): ends it at the first of `stops`, and shows text as it comes.

    Text is decoded a token at a time from bytes, so that a character of several tokens is never split; what may be the
    beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], show: Callable[[str], None] | None = None) -> None:
        self._tokenizer, self._stops, self._show = tokenizer, [stop for stop in stops if stop], show
        self._bytes = bytearray()
        self._shown = 0
        self.text = ""
        """all so far, without the stop string and what follows it"""
        self.stopped = False

    def add(self, token: int) -> bool:
        """Takes the next token; True where a stop string is complete."""
        self._bytes += self._tokenizer.decode_bytes([token])
        whole = self._bytes[: len(self._bytes) - _cut_off(self._bytes)].decode("utf-8", errors="replace")
        from_here = max(0, len(self.text) - max(map(len, self._stops), default=0))
        places = [place for stop in self._stops if (place := whole.find(stop, from_here)) >= 0]
        self.text, self.stopped = (whole[: min(places)], True) if places else (whole, False)
        self._hand_out(self.text if self.stopped else self.text[: len(self.text) - self._held_back()])
        return self.stopped

    def finish(self) -> str:
        """Shows the rest; returns the text."""
        if not self.stopped:
            self.text = self._bytes.decode("utf-8", errors="replace")
        self._hand_out(self.text)
        return self.text

    def _hand_out(self, text: str) -> None:
        if self._show is not None and len(text) > self._shown:
            self._show(text[self._shown :])
            self._shown = len(text)

    def _held_back(self) -> int:
        """The number of characters at the end that may begin a stop string."""
        longest = max(map(len, self._stops), default=0) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stops):
                return size
        return 0


def _cut_off(data: bytearray) -> int:
    """How many bytes at the end of `data` are the beginning of a character that is not all there."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            needed = 2 if byte >> 5 == 0b110 else 3 if byte >> 4 == 0b1110 else 4 if byte >> 3 == 0b11110 else 1
            return back if needed > back else 0
    return 0
