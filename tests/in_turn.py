"""Scripts one after another in the processes of one launch, since a launch takes seconds: in_turn.py '[["train", "--config", ...], ...]'"""

import json

from accelerate import PartialState
from running import script

from dpsyngen.cli import run_script


def main(argv: list[str]) -> None:
    for name, *arguments in json.loads(argv[0]):
        script(name)(arguments)
        PartialState().wait_for_everyone()  # the next one reads what the main process wrote


if __name__ == "__main__":
    run_script(main)
