"""The errors that a person meets: wrong input, and a package that is not installed."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Wrong input by a person, reported in one line: `"{name}: expected {what}, got {what}"`.

    The command line prints it without a traceback and exits with status 2.
    """


@contextmanager
def about(name: str, *instead_of: str) -> Iterator[None]:
    """Call the value that a UserError of the block is about by `name`, as a person gave it, where it is another's."""
    try:
        yield
    except UserError as error:
        called, _, rest = str(error).partition(": ")
        if called not in instead_of:
            raise
        raise UserError(f"{name}: {rest}") from error


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message says what to run."""


def require_extra(extra: str, *packages: str) -> None:
    """Raise a MissingExtra that names the extra to install, unless all of its packages can be imported.

    The ops need torch (and Triton on a GPU) only; models, training and plots are extras of this package.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: run {how_to_install(extra)}"
        )


def how_to_install(extra: str) -> str:
    """The commands that install an extra."""
    return f"`pip install -e '.[{extra}]'` in a clone, or `pip install 'WHEEL[{extra}]'`"
