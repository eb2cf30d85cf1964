"""Measures the decoding engine against its unguided base, transformers and a naive two-model loop, in one run.

`shapes` names the models; `models` makes them of random weights and `agreement` makes pairs that agree as much as is
wanted; `contestants` are what is timed, `timing` times them in turn; `counting` counts what speculation does; `memory`
weighs; `decode` runs it all and `report` writes it down.
"""
