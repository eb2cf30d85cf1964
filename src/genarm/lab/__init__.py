"""The laboratory: all that compares. It uses the rest of genarm, and nothing of the rest knows of it."""
