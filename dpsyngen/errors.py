"""The one exception that stands for bad input: a bad config, a missing file, a wrong shape."""


class InputError(Exception):
    """Something the user gave can't be used.

    The message is one line that names the field or the file and what was expected. The scripts print it to
    stderr and exit with status 2 (`dpsyngen.cli.run_script`); anything else that escapes is a bug and keeps its traceback.
    """


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C, raised where nothing is half done. The message says how to go on; `status` is 128 + the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number
