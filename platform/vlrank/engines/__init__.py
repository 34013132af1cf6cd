"""Inference engines behind one small protocol: `scoring.LabelScorer`."""
