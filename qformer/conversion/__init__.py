"""Weights of other layouts into ours and back: LAVIS files, Hugging Face BLIP-2 and InstructBLIP folders."""
