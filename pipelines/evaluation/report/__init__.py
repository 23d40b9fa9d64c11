"""Results in, one HTML file out."""
