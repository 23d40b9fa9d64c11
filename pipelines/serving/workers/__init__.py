"""The deployments that do the work: media, encoder, generator, and how they are called."""
