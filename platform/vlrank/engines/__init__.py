"""Inference engines behind one small protocol: vLLM, and transformers where vLLM is not installed."""
