"""Manifests, mixture, seed and step in, row numbers out: which row is trained when.

`global_batches.Order` computes any step of any epoch by itself, from the permutations of `permutation`. `mixture` joins
several manifests and says how many rows each gives to an epoch; `row_index` reads rows by number.
"""
