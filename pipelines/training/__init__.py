"""Ray Train: the loop, optimizer, checkpoints and monitors."""
