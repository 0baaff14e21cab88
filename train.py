"""Train a registration network: ``python train.py --config configs/NAME.py``.

The same as ``jaxreg train``; see there for the options.
"""

import sys

from jaxreg.cli import main

if __name__ == "__main__":
    sys.exit(main.main(["train", *sys.argv[1:]]))
