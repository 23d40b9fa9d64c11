"""One optimizer step and the loop around it: batches in, updated weights and losses out."""
