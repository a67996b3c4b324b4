"""`python -m moebert_kernels` and the console script `moebert`."""

import sys

from moebert_kernels.errors import MissingExtra, require_extra


def main() -> None:
    """Run the command line; without the packages that it needs, exit with one line that says what to install."""
    try:
        require_extra("train", "typer", "transformers", "accelerate", "datasets")
    except MissingExtra as error:
        print(f"moebert: {error}", file=sys.stderr)
        sys.exit(2)
    from moebert_kernels.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
