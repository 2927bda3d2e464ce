#!/usr/bin/env python3
"""`megadistill convert hf`: a Megatron-Core checkpoint to a Hugging Face model."""

import sys

from megadistill.cli import main

if __name__ == "__main__":
    main(["convert", "hf", *sys.argv[1:]])
