"""What a user can get wrong."""


class UserError(ValueError):
    """Wrong arguments or input files: one line that says what, where, and the remedy (exit code 2)."""
