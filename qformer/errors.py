"""Errors that others tell apart."""


class UserError(ValueError):
    """A mistake in what the user gave: settings, paths, data, model names.

    The message is one line that names the value, the place it came from and the fix. Commands print it without a
    stack trace and exit with code 2.
    """


class NotFiniteError(ValueError):
    """Features or a step hold NaN or infinity: of these samples, not of what the user gave."""
