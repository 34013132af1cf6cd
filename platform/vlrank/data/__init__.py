"""Raw reviews, metadata and pictures become a dataset folder. Pure Polars and PyArrow: neither Ray nor torch."""
