"""The installed version."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vlrank")
except PackageNotFoundError:  # a bare checkout shipped through PYTHONPATH, as Ray jobs do
    __version__ = "0+unknown"
