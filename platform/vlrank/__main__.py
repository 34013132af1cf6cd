"""The `vlrank` command; also ``python -m vlrank``, where the package is on the path and not installed.

The supervisor starts before anything else is imported, so that a signal finds it.
"""

from vlrank.supervisor import supervised


def main() -> None:
    """Entry point of the console script."""
    supervised(_work, _report)


def _work() -> None:
    from vlrank.cli import main as command

    command()


def _report(status: str, message: str) -> None:
    from vlrank.options import print_end

    print_end(status, message)


if __name__ == "__main__":
    main()
