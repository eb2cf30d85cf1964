"""Weights for a user: from pairs that they prefer, or from a sweep that somebody scores."""
