"""Modes, prompts, chat templates, negatives, label tries and token encoding, without torch and Ray."""
