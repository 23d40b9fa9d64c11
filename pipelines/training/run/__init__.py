"""One run on one rank: the choice of models in; trainables, frozen encoders and checkpoints out.

`model_choice` names the models, `frozen_encoders` and `model` build them. What a checkpoint holds and when it may be
resumed stands in `checkpoint`; how it is written while training goes on, in `checkpoint_writer`. `vocabulary` learns a
tokenizer from the captions.
"""
