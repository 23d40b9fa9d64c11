"""Media bytes in, clips of pixels and sound out; damaged files are decoded in children that may die."""
