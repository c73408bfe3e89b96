"""`python -m emotrain` is the command `emotrain`."""

import sys

from emotrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
