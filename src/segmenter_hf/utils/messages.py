"""What libraries and users say, in the messages of this package."""

import re


# Characters that a terminal or a page would act on: control codes such as ESC, line and paragraph separators, and marks that
# turn the direction of what follows. Half a surrogate pair cannot be written as UTF-8 at all.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with its control characters as escapes: `\\x1b` for ESC."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: BaseException | str) -> str:
    """Return what an error says, or a text such as the name of a class, in one printable line of at most 500 characters."""
    return f"{printable(' '.join(str(text).split())):.500}"


def describe_os_error(error: OSError) -> str:
    """Return what the system says of a file, as in `nope.json: no such file or directory`."""
    if error.strerror is None:
        return str(error)
    if error.filename is None:  # the number of the system says nothing to a user
        return str(error.strerror)
    return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"


__all__ = ["describe_os_error", "one_line", "printable"]
