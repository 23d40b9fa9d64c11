"""Diagnosis of a Q-Former: weights, query outputs and losses in; figures of its health out.

`image_use` tests whether a model uses its images, `query_use` finds dead queries, `queries` measures collapse and has
the diversity loss, `weight_changes` compares two states of the weights.
"""
