"""The one exception that stands for bad input: a bad config, a missing file, a wrong shape."""


class InputError(Exception):
    """Something the user gave can't be used.

    The message is one line that names the field or the file and what was expected. The scripts print it to
    stderr and exit with status 2 (`dpsyngen.cli.run_script`); anything else that escapes is a bug and keeps its traceback.
    """
