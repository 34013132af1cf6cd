"""Metrics with intervals, baselines, paired comparisons and the report; needs only the data room."""
