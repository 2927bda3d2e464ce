"""One trainer rank as a process: `python -m megadistill.trainer RUN_DIR`.

The launcher sets RANK, WORLD_SIZE and MASTER_*; all ranks run the same loop, `train.py`.
"""

import logging
import os
import signal
import sys
import traceback
from pathlib import Path

from megadistill.imports import quick_imports
from megadistill.launch.processes import MISTAKE
from megadistill.rundir import RunDir


def main() -> int:
    """Assemble the run, train, and leave; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in ("megatron", "httpx2"):  # they list every parameter, and every request
        logging.getLogger(name).setLevel(logging.WARNING)
    run = RunDir(Path(sys.argv[1]))
    try:
        # transformers imports it for a way of decoding that no trainer uses.
        with quick_imports("sklearn"):
            from megadistill import assemble, train  # noqa: PLC0415 - inside, to be quick
        parts, state = assemble.assemble(run)
        train.train(parts, state)
        parts.close()
    except KeyboardInterrupt:  # the node ends all roles when one has failed
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:  # mostly something the user can mend
        file = run.log_file(f"trainer-{os.environ.get('RANK', '0')}", _attempt())
        file.with_suffix(".traceback").write_text(traceback.format_exc())
        sys.stderr.write(f"megadistill: {error}\n")
        return MISTAKE
    except Exception:
        logging.exception("this trainer ends")
        return 1
    return 0


def _attempt() -> int:
    return int(os.environ.get("MEGADISTILL_ATTEMPT", "0"))


if __name__ == "__main__":
    code = main()
    # An ordinary exit would wait for the thread that samples rollouts ahead, and take Triton apart,
    # which complains of thirty leaks of its own.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)
