"""The one exception that the command line turns into a message instead of a traceback, and how to find it in others."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping


class UserError(Exception):
    """Something the user can mend: wrong option, missing file, unusable data.

    The command line prints ``problem`` and ``remedy`` and exits with code 2.

    Args:
        problem: What is wrong, naming the file, row or key and what was expected.
        remedy: What to do about it, as a command where one exists.
    """

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem if remedy is None else f"{problem}\n{remedy}")
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        # Exceptions travel between Ray processes by pickle, which would otherwise call __init__ with one argument.
        return type(self), (self.problem, self.remedy)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what stands behind it, nearest first: causes, contexts, and what Ray wraps and groups collect.

    Ray Core keeps the exception of a task as ``cause``, Ray Train those of its workers as ``worker_failures``.
    """
    waiting, seen = [error], set[int]()
    while waiting:
        error = waiting.pop(0)
        if id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        failures = getattr(error, "worker_failures", None)
        context = None if error.__suppress_context__ else error.__context__
        waiting += [
            inner
            for inner in (
                getattr(error, "cause", None),
                *(failures.values() if isinstance(failures, Mapping) else ()),
                *(error.exceptions if isinstance(error, BaseExceptionGroup) else ()),
                error.__cause__,
                context,
            )
            if isinstance(inner, BaseException)
        ]


def user_error_in(error: BaseException) -> UserError | None:
    """The `UserError` among `causes`, or one for a file that the system refuses; None if there is neither."""
    links = list(causes(error))
    found = [link for link in links if isinstance(link, UserError)]
    # Ray raises an exception of both kinds, whose text is a traceback, with the plain one as its cause.
    plain = [link for link in found if not isinstance(getattr(link, "cause", None), UserError)]
    return next(iter([*plain, *filter(None, map(_of_system, links))]), None)


_OF_SYSTEM = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Have the right to it given to you, or use another place."),
    errno.EROFS: "Use a place that can be written to.",
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT), "Free some space, or use another disk; what was committed is intact."
    ),
}


def _of_system(error: BaseException) -> UserError | None:
    if isinstance(error, OSError) and error.filename and error.errno in _OF_SYSTEM:
        return UserError(f"{error.filename}: {error.strerror}", _OF_SYSTEM[error.errno])
    return None
