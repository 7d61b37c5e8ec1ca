"""The error of a request that cannot be met as it was made."""

__all__ = ["RequestError", "first_line"]


class RequestError(ValueError):
    """The request is wrong: the message says in one line what is, and what would be right."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
