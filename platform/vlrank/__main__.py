"""``python -m vlrank`` is ``vlrank``, for machines on which the package is on the path and not installed."""

from vlrank.cli import main

if __name__ == "__main__":
    main()
