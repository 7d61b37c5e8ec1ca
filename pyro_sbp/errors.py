"""The error of a request that cannot be met as it was made."""

__all__ = ["RequestError"]


class RequestError(ValueError):
    """The request is wrong: the message says in one line what is, and what would be right."""
