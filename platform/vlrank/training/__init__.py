"""One training core for all four modes: samples, exact losses, a transformers Trainer under Ray Train."""
