"""The embedded shop, its tiny models, and its way through every stage."""
