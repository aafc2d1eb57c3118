"""Scripts one after another in the processes of one launch, since a launch takes seconds: in_turn.py '[["train", "--config", ...], ...]'"""

import json

from running import script

from dpsyngen.cli import run_script


def main(argv: list[str]) -> None:
    for name, *arguments in json.loads(argv[0]):
        script(name)(arguments)


if __name__ == "__main__":
    run_script(main)
