"""Captions and semantic summaries for a whole catalogue, with Ray Data and vLLM."""
