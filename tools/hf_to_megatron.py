#!/usr/bin/env python3
"""`megadistill convert megatron`: a Hugging Face model to a Megatron-Core checkpoint."""

import sys

from megadistill.cli import main

if __name__ == "__main__":
    main(["convert", "megatron", *sys.argv[1:]])
