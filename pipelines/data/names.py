"""What a misspelt name was probably meant to be."""

import difflib
from collections.abc import Collection


def suggest(name: str, choices: Collection[str]) -> str:
    """Say what was probably meant, for the end of an error message."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(sorted(choices))}"
