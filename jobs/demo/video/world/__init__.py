"""The video demo's corpus: stories drawn at random in, clips with sound and captions out."""
