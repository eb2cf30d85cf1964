"""Preference pairs from a wish: sample responses, score them, keep the best and the worst."""
