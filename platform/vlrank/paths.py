"""Paths that mean the same on every node of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlrank.config import Config, PrepareConfig
from vlrank.errors import UserError

WORKDIR = "VLRANK_WORKDIR"
"""Environment variable: the folder that a job's relative paths are taken from."""


def absolute_paths(config: Config, workdir: str | None) -> dict[str, Any]:
    """The config as plain values, with every path absolute.

    A job's working directory is a temporary copy on one node: a relative path would be read from there, and its results
    thrown away with it.

    Raises:
        UserError: a relative path, and no absolute ``workdir`` to take it from.
    """
    if workdir is not None and not workdir.startswith("/"):
        raise UserError(f"--workdir {workdir!r} is not an absolute path", "Give a folder that every node sees.")

    def resolved(key: str, path: Path) -> str:
        if path.is_absolute():
            return str(path)
        if workdir is None:
            raise UserError(
                f"`{key}` is {path}, a relative path, which would lie in the job's temporary folder",
                "Give an absolute path on storage that every node sees, or --workdir FOLDER.",
            )
        return str(Path(workdir) / path)

    values = config.model_dump(mode="json", exclude_unset=True)
    places = {key: getattr(config, key) for key in values}
    if isinstance(config, PrepareConfig) and config.dataset_code:  # these have relative defaults
        places |= {"raw_dir": config.raw_dir, "out": config.folder}
    for key, value in places.items():
        if isinstance(value, Path):
            values[key] = resolved(key, value)
        elif isinstance(value, tuple) and any(isinstance(part, Path) for part in value):
            values[key] = [resolved(key, part) if isinstance(part, Path) else str(part) for part in value]
    return values
