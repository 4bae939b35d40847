"""One of several processes that regenerate, of which the second dies; started by `test_regenerate.py`, not a test by itself."""

import os
import sys
import time
from functools import partial
from pathlib import Path

from hf_eagle3 import cli
from hf_eagle3.training.data import files, regenerate
from hf_eagle3.training.data.answer_shards import name_share


def append(path, rows):
    """Write rows; the second process is gone before its second prompt, once the first has written two of its own."""
    if os.environ["RANK"] == "1" and path.exists():
        other = name_share(Path(sys.argv[-1]), 0)
        while not other.exists() or other.read_text().count("\n") < 2:
            time.sleep(0.01)
        os._exit(9)
    files.append_rows(path, rows)
    if os.environ["RANK"] == "0" and path.read_text().count("\n") == 2:
        time.sleep(600)  # until it is ended


regenerate.regenerate = partial(regenerate.regenerate, window=1, append=append)
sys.exit(cli.main(sys.argv[1:]))
