"""The embedded shop's way through every stage, with tiny models made on the spot."""
