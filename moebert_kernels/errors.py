"""The error for wrong input by a person: a command line, a file, a checkpoint, a configuration."""


class UserError(ValueError):
    """Wrong input, said in one line: `"{name}: expected {what}, got {what}"`.

    The command line prints it without a traceback and exits with status 2.
    """
