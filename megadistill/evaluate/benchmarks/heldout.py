"""Held-out divergences and likelihoods as columns: measured by the training engine, see `heldout_metrics`."""

from megadistill.evaluate.protocol import Benchmark, Fields, Item


def _no_item(row: Fields) -> Item:
    raise ValueError("this is measured on held-out texts; name it in `signals`")


def _metric(title: str) -> Benchmark:
    return Benchmark(
        title=title,
        block="heldout",
        rows=_no_item,
        higher_is_better=False,
    )


FORWARD_KL = _metric("KL(teacher ‖ system)")
REVERSE_KL = _metric("KL(system ‖ teacher)")
NLL = _metric("NLL")
