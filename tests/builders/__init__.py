"""What tests share: tiny models, invented data, servers that run."""
