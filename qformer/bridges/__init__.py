"""All that stands between frozen tokens and the two stages of training.

In: the encoder's tokens of images and clips, instructions, sound (`protocol.BridgeInput`). Out: query outputs, and
losses of a bridge's own (`reading.Reading`). `table` lists the bridges, each of which is one file with its config;
docs/add-a-bridge.md says how to write another.
"""
