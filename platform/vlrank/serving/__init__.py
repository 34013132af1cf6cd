"""The reranker behind an HTTP address, on Ray Serve."""
