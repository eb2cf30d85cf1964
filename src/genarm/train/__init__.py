"""Training of autoregressive reward models (ARMs) on preference pairs."""
