"""Makes the video demo's audio encoder and language model."""
