"""Evaluation: metrics with intervals, rivals on the same lists, paired tests, data checks and the report.

Needs only the dataset folder: importing this room loads neither torch nor Ray.
"""
