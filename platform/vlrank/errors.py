"""The one exception that the command line turns into a message instead of a traceback."""


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
