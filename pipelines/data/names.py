"""Suggestions for misspelt names."""

import difflib
from collections.abc import Collection


def suggest(name: str, choices: Collection[str]) -> str:
    """End of an error message: the most similar choice, or all of them."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(sorted(choices))}"
