"""Errors that a user can cause and mend."""


class UserError(ValueError):
    """A wrong setting or input. Its message names the setting and the way out; run.py prints the message alone."""
