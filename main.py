"""BiSup quantization of large language models: `python main.py fit --config configs/demo.yaml`."""

import sys

from bisup_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
