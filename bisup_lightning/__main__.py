"""`python -m bisup_lightning fit …` does what main.py does."""

import sys

from bisup_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
