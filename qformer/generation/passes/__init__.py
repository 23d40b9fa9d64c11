"""Forward passes of a language model over slots of keys and values."""
