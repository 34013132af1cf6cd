"""Where compilers keep what they make on this node: one cache for ranking, training runs and the trials of a sweep."""

from __future__ import annotations

import os

from vlrank.storage import cache_folder, writable


def keep_compiled() -> bool:
    """Let compilers keep what they make, for later processes; call it before anything is compiled.

    Settings of the environment stay as they are, and nothing is kept in a cache folder that cannot be written.

    Returns:
        Whether something was kept before.
    """
    folder = cache_folder() / "compiled"
    known = folder.is_dir()
    if not writable(folder):
        return known
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder / "attention"))
    return known
