"""What libraries and users say, in the messages of this package."""


def one_line(text: BaseException | str) -> str:
    """Return what an error says, or a text such as the name of a class, in one line of at most 500 characters."""
    return f"{' '.join(str(text).split()):.500}"


__all__ = ["one_line"]
