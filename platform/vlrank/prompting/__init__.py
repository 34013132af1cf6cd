"""Modes, prompts, label tries and token encoding: pure, without torch and Ray."""
