"""The one error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user gave: settings, paths, data, model names.

    The message is one line that names the value, the place it came from and the fix. Commands print it without a
    stack trace and exit with code 2.
    """
