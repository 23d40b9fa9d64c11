"""The Q-Former model library: plain torch, no Ray. Import from its modules, e.g. `qformer.objectives.stage1`."""
