"""A trained bridge in use, without Ray: media in, text or embeddings out."""
