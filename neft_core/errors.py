"""The one exception that a user's mistake raises."""


class NeftError(Exception):
    """A mistake in input, params or environment, said in one line.

    The text reads `<where>: <what was found>; <what is allowed or what to do>`. The command line
    prints it alone and exits with 2; any other exception is a defect of this package and exits
    with 1.
    """
