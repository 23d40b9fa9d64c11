"""The demo learns time: clips whose captions need the order of their frames, and sound."""
