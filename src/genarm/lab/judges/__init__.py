"""Judges: an LLM behind an OpenAI-compatible endpoint, and AlpacaEval 2."""
