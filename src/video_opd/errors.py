"""The errors for what a user can get wrong, and a check that raises one."""


class UserError(ValueError):
    """Wrong arguments or input files. The message is one line: what is wrong, where, and the remedy.

    The command prints it and exits with 2.
    """


class Unavailable(RuntimeError):
    """Something that the work needs is away. The message is one line: what, since when, and the remedy.

    The command prints it and exits with 1; repeated, it continues.
    """


class ErrorOfFirst(UserError):
    """An error of the first of several processes, raised in the others so that all of them end.

    The first process prints it, so the others do not. ``wrong_input`` is whether it is a :class:`UserError`
    there.
    """

    def __init__(self, message: str, *, wrong_input: bool) -> None:
        super().__init__(message)
        self.wrong_input = wrong_input


def need(condition: bool, message: str) -> None:
    """Raises :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)
