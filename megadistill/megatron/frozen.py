"""Models that only score, on this process alone: no optimizer, so two large ones fit side by side."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from megadistill.config.schema import ParallelConfig, Precision
from megadistill.convert.families import read_spec
from megadistill.data.packing import PackingRules, num_inputs
from megadistill.megatron.model import build_model, load_hf
from megadistill.megatron.offload import TeacherOffloader
from megadistill.megatron.scoring import Scorable, mean_divergences, score_spans, token_divergences
from megadistill.megatron.world import connect, disconnect, pick_device
from megadistill.types import FloatArray, TokenSpan

MICRO_BATCH_TOKENS = 2048
ALONE = timedelta(minutes=30)


class FrozenModels:
    """The training engine's scores of several models; on a GPU those not in use wait on the host."""

    def __init__(
        self, models: Mapping[str, tuple[Path, Precision]], *, gpu: bool, threads: int = 1
    ) -> None:
        """Load them; names with the same directory and precision share one."""
        self._parallel = ParallelConfig(dp=1, threads=threads)
        device = pick_device("cuda" if gpu else "cpu", 0)
        self._world = connect(self._parallel, device=device, seed=0, timeout=ALONE)
        self._offloader = TeacherOffloader(device)
        loaded: dict[tuple[Path, Precision], Scorable] = {}
        for key in models.values():
            if key not in loaded:
                loaded[key] = self._load(*key)
        self._models = {name: loaded[key] for name, key in models.items()}

    def score(self, model: str, spans: Sequence[TokenSpan]) -> list[FloatArray]:
        """Log-probabilities of each span's scored tail."""
        scorable = self._models[model]
        with self._offloader.on_device(scorable.model):
            return score_spans(scorable, spans, self._rules(spans))

    def divergences(
        self, student: str, teacher: str, spans: Sequence[TokenSpan]
    ) -> tuple[FloatArray, FloatArray]:
        """Per span the mean full-vocabulary KL(teacher || student) and KL(student || teacher)."""
        first, second = self._models[student], self._models[teacher]
        with self._offloader.on_device(first.model, second.model):
            tables = token_divergences(first, second, spans, self._rules(spans))
        return mean_divergences(tables)

    def close(self) -> None:
        """Undo what the constructor set up in this process."""
        disconnect(self._world)

    def _load(self, directory: Path, precision: Precision) -> Scorable:
        spec = read_spec(directory)
        model = build_model(spec, self._parallel, precision, self._world)
        load_hf(model, spec, directory, self._parallel, self._world)
        model.requires_grad_(False)
        self._offloader.park(directory.name, model)
        return Scorable(model=model, vocab_size=spec.vocab_size, world=self._world)

    def _rules(self, spans: Sequence[TokenSpan]) -> PackingRules:
        longest = max(num_inputs(span) for span in spans)
        return PackingRules(max_tokens=max(MICRO_BATCH_TOKENS, longest))
