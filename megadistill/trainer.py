"""One trainer rank as a process: `python -m megadistill.trainer RUN_DIR`.

The launcher sets RANK, WORLD_SIZE and MASTER_*; all ranks run the same loop, `train.py`.
"""

import logging
import os
import sys
from pathlib import Path

from megadistill.imports import quick_imports
from megadistill.rundir import RunDir


def main() -> None:
    """Assemble the run, train, and leave."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("megatron").setLevel(logging.WARNING)  # it lists every parameter
    try:
        # transformers imports it for a way of decoding that no trainer uses.
        with quick_imports("sklearn"):
            from megadistill import assemble, train  # noqa: PLC0415 - inside, to be quick
        parts, state = assemble.assemble(RunDir(Path(sys.argv[1])))
        train.train(parts, state)
        parts.engine.close()
    except Exception:
        # Rollouts that are sampled ahead run in a thread that an ordinary exit would wait for.
        logging.exception("this trainer ends")
        logging.shutdown()
        os._exit(1)


if __name__ == "__main__":
    main()
