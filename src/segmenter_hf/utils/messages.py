"""What errors of libraries say, in the messages of this package."""


def one_line(error: BaseException | str) -> str:
    """Return what an error says in one line of at most 500 characters, as all messages here are."""
    return f"{' '.join(str(error).split()):.500}"


__all__ = ["one_line"]
