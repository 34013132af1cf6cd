"""Recipes: stages with their settings in order, run as one."""
