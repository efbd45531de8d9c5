"""The error for what a user can get wrong, and a check that raises it."""


class UserError(ValueError):
    """Wrong arguments or input files. The message is one line: what is wrong, where, and the remedy.

    The command prints it and exits with 2.
    """


def need(condition: bool, message: str) -> None:
    """Raises :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)
