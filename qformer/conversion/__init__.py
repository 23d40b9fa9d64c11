"""Weights of other layouts in, a bridge of this package out, and back: LAVIS, BERT, Hugging Face BLIP-2, InstructBLIP.

`names` maps tensor names, `layouts` describes the Hugging Face classes: a new layout begins there. `lavis` and
`huggingface` import and export whole models by way of `bundle`, `frozen` and `vision`. `initialisation` and `bert`
start a new run from other weights. `checkpoint` is the format of a trained bridge on disk.
"""
