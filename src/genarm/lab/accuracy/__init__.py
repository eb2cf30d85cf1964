"""Held-out preference accuracy of rewards: how often the chosen response of a pair scores higher, and why."""
