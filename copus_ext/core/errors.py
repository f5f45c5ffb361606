"""The one exception a user of the command line is meant to see."""


class UserError(ValueError):
    """Bad input: the message names the flag, what is wrong with it, and what to do. Ends the run with status 2."""
