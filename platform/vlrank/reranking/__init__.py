"""Modes, prompts, label tries and windows (pure), the reranker, and bulk reranking."""
