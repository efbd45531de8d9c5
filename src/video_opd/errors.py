"""The error for what a user can get wrong."""


class UserError(ValueError):
    """Wrong arguments or input files. The message is one line: what is wrong, where, and the remedy.

    The command prints it and exits with 2.
    """
