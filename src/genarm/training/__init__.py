"""Training on preference pairs: autoregressive reward models (ARMs), and the baselines they are compared with."""
