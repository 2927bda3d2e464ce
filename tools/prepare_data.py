"""`megadistill prepare` under the name that a recipe's reader looks for: tools/prepare_data.py CONFIG."""

import sys

from megadistill.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
