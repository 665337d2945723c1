"""A daily window of local time in which devices install; both sides read the same text.

>>> night = Window.parse("22:00-05:00")
>>> night.opens_in(23 * 60), night.opens_in(12 * 60), night.opens_in(5 * 60)
(0, 600, 1020)
>>> str(night)
'22:00-05:00'
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from protos.errors import WireError

DAY = 24 * 60  # minutes
_TEXT = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])\Z", re.ASCII)


@dataclass(frozen=True)
class Window:
    """From one minute of the day, inclusive, to another, exclusive; may pass midnight."""

    begins: int
    ends: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """A window as people write it.

        Raises:
            WireError: not of the form ``HH:MM-HH:MM``, or empty.
        """
        match = _TEXT.match(text) if isinstance(text, str) else None
        if match is None:
            raise WireError(f"window {str(text)[:40]!r} is not of the form HH:MM-HH:MM")
        hour, minute, end_hour, end_minute = map(int, match.groups())
        begins, ends = 60 * hour + minute, 60 * end_hour + end_minute
        if begins == ends:
            raise WireError(f"window {text!r} never opens; leave it out to install at any time")
        return cls(begins, ends)

    def __str__(self) -> str:
        """As :meth:`parse` reads it."""
        parts = (self.begins // 60, self.begins % 60, self.ends // 60, self.ends % 60)
        return "{:02}:{:02}-{:02}:{:02}".format(*parts)

    def opens_in(self, minute: int) -> int:
        """Minutes until it is open, from a minute of the local day on; 0 while it is open."""
        since = (minute - self.begins) % DAY
        return 0 if since < (self.ends - self.begins) % DAY else DAY - since
