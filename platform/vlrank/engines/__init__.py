"""Inference engines behind one small protocol: `base.Engine`."""
