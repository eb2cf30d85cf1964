"""The embedded demonstration: a small world with known truth, and the product applied to it from start to end."""
