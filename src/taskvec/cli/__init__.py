"""The command line: parse arguments, call, print. `taskvec --help` loads neither torch nor transformers."""

import sys

from taskvec.errors import TaskvecError


def main() -> None:
    """Entry point. Exit codes: 0 done; 2 the input, the usage, or what was asked of a model is wrong; 1 our bug."""
    from taskvec.cli.app import app

    try:
        app()
    except TaskvecError as error:
        print(f"taskvec: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
