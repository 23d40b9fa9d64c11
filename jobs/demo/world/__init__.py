"""The demo's corpus: scenes drawn at random in, pictures, clips and captions out."""
