"""vlrank: train, tune and run multimodal listwise rerankers on Ray.

Importing this package is cheap: it loads neither torch nor Ray and never touches the network.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlrank.data.dataset import load_item_meta
    from vlrank.reranking.reranker import Qwen3VLReranker

__all__ = ["Qwen3VLReranker", "__version__", "load_item_meta"]

try:
    __version__ = version("vlrank")
except PackageNotFoundError:  # a bare checkout shipped through PYTHONPATH, as Ray jobs do
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "Qwen3VLReranker":
        from vlrank.reranking.reranker import Qwen3VLReranker

        return Qwen3VLReranker
    if name == "load_item_meta":
        from vlrank.data.dataset import load_item_meta

        return load_item_meta
    raise AttributeError(f"module 'vlrank' has no attribute {name!r}")
