#!/usr/bin/env python3
"""Convert a Megatron-Core distributed checkpoint (torch_dist) to a Hugging Face model."""

import argparse
import sys

from megadistill.convert.conversion import megatron_to_hf

EPILOG = """
The checkpoint may have been saved at any tensor- and pipeline-parallel size; optimizer state in it
is left alone. The result loads in transformers and vLLM. Weights are streamed: memory stays at
about one shard file, whatever the model.

examples:
  %(prog)s checkpoints/qwen3-8b exported/qwen3-8b
  %(prog)s checkpoints/iter_0000100 exported/step-100 --model Qwen/Qwen3-8B
"""


def main() -> None:
    """Parse the arguments, convert, print where the result is."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="checkpoint directory, the one that holds .metadata")
    parser.add_argument("dst", help="model directory to make; must not exist yet")
    parser.add_argument(
        "--model",
        help="model directory or hub name that gives config.json and tokenizer "
        "(default: the copy that hf_to_megatron.py left in the checkpoint)",
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="size of one safetensors file (default: 5)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    try:
        done = megatron_to_hf(
            args.src,
            args.dst,
            model=args.model,
            max_shard_bytes=args.max_shard_gb * 1e9,
            progress=not args.quiet,
        )
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")
    print(done)


if __name__ == "__main__":
    main()
