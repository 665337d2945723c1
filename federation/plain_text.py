"""Words of others on a terminal: they say what they say, and do nothing.

A reason, a holder's name or a note was written by whoever made a request. On a terminal, control
characters and those that turn the direction of writing can hide a line or write another over it, at
the very moment when somebody decides whether to sign.
"""

from __future__ import annotations

import unicodedata

_HIDDEN = ("Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn")  # categories of Unicode


def plain(text: object, *, lines: bool = False) -> str:
    r"""The text with whatever can't be seen written out.

    >>> plain("fine\x1b[2K\rall is well"), plain("a\u202eb\nc")
    ('fine\\x1b[2K\\rall is well', 'a\\u202eb\\nc')
    >>> plain("Zoë, Zürich: 東京"), plain("a\nb", lines=True)
    ('Zoë, Zürich: 東京', 'a\nb')

    Args:
        text: anything.
        lines: whether it may have several lines.
    """
    found = str(text)
    if found.isascii() and found.isprintable():
        return found
    return "".join(
        repr(one)[1:-1]
        if unicodedata.category(one) in _HIDDEN and not (lines and one == "\n")
        else one
        for one in found
    )
