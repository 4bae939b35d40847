"""`python -m hf_eagle3.cli`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
