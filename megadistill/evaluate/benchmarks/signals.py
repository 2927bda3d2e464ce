"""Held-out divergences and likelihoods as columns: measured by the training engine, see `measuring`."""

from collections.abc import Mapping
from typing import Any

from megadistill.evaluate.protocol import Benchmark, Item
from megadistill.inference.requests import SamplingParams


def _no_item(row: Mapping[str, Any]) -> Item:
    raise ValueError("this is measured on held-out texts; name it in `signals`")


def _signal(title: str) -> Benchmark:
    return Benchmark(title=title, block="heldout", sampling=SamplingParams(), rows=_no_item)


FORWARD_KL = _signal("KL(teacher ‖ system)")
REVERSE_KL = _signal("KL(system ‖ teacher)")
NLL = _signal("NLL")
