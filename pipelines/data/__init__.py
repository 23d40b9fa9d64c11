"""From a manifest of media files to batches of pixels, in order and accounted for."""
