"""Run the command line as `python -m attn_cifar`."""

import sys

from attn_cifar.cli import main

if __name__ == "__main__":
    sys.exit(main())
