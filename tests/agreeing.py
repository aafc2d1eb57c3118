"""What several processes of one launch make of their digests, written below argv[1]: agreeing.py FOLDER"""

import sys
from pathlib import Path

from dpsyngen.compute import Compute
from dpsyngen.config import ComputeConfig


def main(folder: Path) -> None:
    compute = Compute.start(ComputeConfig(device="cpu"))
    same, mine = "ab" * 32, f"{compute.rank:064x}"
    joined = [compute.joined_digest(each) for each in (same, mine, same if compute.is_main else mine)]
    (folder / str(compute.rank)).write_text(" ".join(joined))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
