"""Ray Tune with ASHA over the training core."""
