"""vlrank: train, tune and run multimodal listwise rerankers on Ray.

Importing this package is cheap: it loads neither torch nor Ray and never touches the network.
"""

from typing import TYPE_CHECKING, Any

from vlrank.version import __version__

if TYPE_CHECKING:
    from vlrank.data.dataset import load_item_meta
    from vlrank.reranker import Qwen3VLReranker

__all__ = ["Qwen3VLReranker", "__version__", "load_item_meta"]


def __getattr__(name: str) -> Any:
    if name == "Qwen3VLReranker":
        from vlrank.reranker import Qwen3VLReranker

        return Qwen3VLReranker
    if name == "load_item_meta":
        from vlrank.data.dataset import load_item_meta

        return load_item_meta
    raise AttributeError(f"module 'vlrank' has no attribute {name!r}")
