"""Retrieval and caption protocols over Ray Data."""
