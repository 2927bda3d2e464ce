"""A run from Python: configure, see what would be submitted, train here, read what it did.

python docs/examples/own_run.py CONFIG [KEY=VALUE ...]
"""

import json
import sys

from megadistill.launch import run_here, submit

config, overrides = sys.argv[1], sys.argv[2:]

# Prints the job script and who would run what where; nothing is submitted.
planned = submit(config, overrides, dry_run=True)

# The same run on this machine. On a cluster: submit(config, overrides), then planned.run_dir.
if code := run_here(config, overrides):
    sys.exit(code)

for line in (planned.run_dir / "metrics.jsonl").read_text().splitlines():
    step = json.loads(line)
    if "loss" in step:
        print(f"step {step['step']}: {step['branch']}, loss {step['loss']:.4f}")
print("the student:", planned.run_dir / "export")
