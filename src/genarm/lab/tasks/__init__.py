"""Tasks whose answers can be checked: mathematics by the last number, code by unit tests in a sandbox."""
