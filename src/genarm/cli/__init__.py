"""The `genarm` command: one module per verb, none of which imports anything heavy until it runs."""
