"""Measures the decoding engine against its unguided base, transformers and a naive two-model loop, in one run.

`shapes` names the models; `models` makes them of random weights and `agreement` makes pairs that agree as much as is
wanted; `contestants` are what is timed, `timing` times them in turn; `counting` counts what speculation does; `memory`
weighs; `decode` runs it all and `report` writes it down.

`vllm` does the same for guided folders inside vLLM: `vllm_models` writes the folders, `vllm_engine` runs each in a
process of its own, `vllm_report` writes down what came out.
"""
