"""Ray pipelines around the model library: data, training, evaluation, serving."""
