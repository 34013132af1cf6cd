"""Fixtures and helpers of the data tests."""

from hypothesis import settings

# Times vary on a shared machine; a slow example is no failure.
settings.register_profile("vlrank", deadline=None)
settings.load_profile("vlrank")
