"""Q-Formers that read the frames of a clip, and its sound, in their order."""
