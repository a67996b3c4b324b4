"""The errors that a person meets: wrong input, and a package that is not installed."""

import importlib.util


class UserError(ValueError):
    """Wrong input by a person, reported in one line: `"{name}: expected {what}, got {what}"`.

    The command line prints it without a traceback and exits with status 2.
    """


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message says what to run."""


def require_extra(extra: str, *packages: str) -> None:
    """Raise a MissingExtra that names the extra to install, unless all of its packages can be imported.

    The ops need torch (and Triton on a GPU) only; models, training and plots are extras of this package.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: run"
            f" `pip install 'moebert_kernels[{extra}]'`, or `pip install -e '.[{extra}]'` in a clone"
        )
