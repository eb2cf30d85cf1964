"""Training of what an ARM is compared with, by trl."""
