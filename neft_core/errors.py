"""The one exception that a user's mistake raises, and how it is told."""

import sys


class NeftError(Exception):
    """A mistake in input, params or environment, said in one line.

    The text reads `<where>: <what was found>; <what is allowed or what to do>`. The command line
    prints it alone and exits with 2; any other exception is a defect of this package and exits
    with 1.
    """


def say(message: str, code: int) -> int:
    """Tell a user what went wrong, on stderr; the exit status, for the caller to return."""
    for line in message.splitlines():
        # What a stage said in a process of its own has the prefix already.
        print(f"neft: {line.removeprefix('neft: ')}", file=sys.stderr)
    return code
