"""One training core for all four modes: Ray Train around the transformers Trainer."""
