#!/usr/bin/env python3
"""Convert a Hugging Face model to a Megatron-Core distributed checkpoint (torch_dist)."""

import argparse
import sys

from megadistill.convert.conversion import hf_to_megatron

EPILOG = """
The checkpoint loads in Megatron-Core (megatron.core.dist_checkpointing) at any tensor- and
pipeline-parallel size. Llama, Qwen2/2.5 and Qwen3 are known, with tied or untied embeddings and
Llama-3 RoPE scaling. Weights are streamed: memory stays at a few tensors, whatever the model.

example:
  %(prog)s Qwen/Qwen3-8B checkpoints/qwen3-8b
"""


def main() -> None:
    """Parse the arguments, convert, print where the result is."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="model directory with safetensors, or hub name (org/name)")
    parser.add_argument("dst", help="checkpoint directory to make; must not exist yet")
    parser.add_argument(
        "--max-file-gb", type=float, default=5.0, help="size of one .distcp file (default: 5)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    try:
        done = hf_to_megatron(
            args.src, args.dst, max_file_bytes=args.max_file_gb * 1e9, progress=not args.quiet
        )
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")
    print(done)


if __name__ == "__main__":
    main()
