"""The engine: student and teachers on all trainer ranks, behind a handful of collective calls.

Every trainer process builds one `Engine` and calls the same methods with the same arguments.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megadistill.config.schema import ModelConfig, Precision, RunConfig
from megadistill.convert.families import ModelSpec, read_spec
from megadistill.data.packing import PackingRules, num_inputs
from megadistill.head import VocabularyHead
from megadistill.megatron import checkpoint, export
from megadistill.megatron.model import build_model, check_model, load_hf, output_weight
from megadistill.megatron.offload import TeacherOffloader
from megadistill.megatron.schedule import Loss as RowLoss
from megadistill.megatron.scoring import (
    Scorable,
    mean_divergences,
    own_batches,
    read_spans,
    token_divergences,
)
from megadistill.megatron.sketch import gradient_sketch
from megadistill.megatron.training import Student
from megadistill.megatron.world import connect, disconnect, most_memory_gib, pick_device
from megadistill.resolve import resolve
from megadistill.types import (
    FloatArray,
    Int32Array,
    MicroBatch,
    Sample,
    ScoreRequest,
    StepResult,
    Switch,
    TeacherRows,
    TokenScores,
    TokenSpan,
)

STUDENT = "student"

Loss = Callable[[VocabularyHead, Tensor, MicroBatch], tuple[Tensor, Mapping[str, Tensor]]]
"""`(head, hidden_WD, micro-batch) -> (sum over rows, named sums over rows)`."""

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound="Engine")

SLACK = timedelta(minutes=30)
"""How long ranks wait for each other, beyond the time that rank 0 may spend on rollouts."""
FP8_MULTIPLE = 16
"""Transformer Engine's fp8 products want lengths that this divides."""


def _names_rank(
    method: Callable[Concatenate[E, P], R],
) -> Callable[Concatenate[E, P], R]:
    """Add this process's place to whatever goes wrong in a method."""

    @functools.wraps(method)
    def wrapper(self: E, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            error.add_note(f"in Engine.{method.__name__} on trainer {self.place}")
            raise

    return wrapper


class Engine:
    """Scores with student and teachers, trains the student, exports and saves it."""

    def __init__(self, config: RunConfig) -> None:
        """Join the other processes, build all models and load their Hugging Face weights.

        Raises `ValueError` for a layout, precision or model that cannot be had, before large memory
        is allocated.
        """
        self.config = config
        device = pick_device(config.device, config.cluster.gpus_per_node)
        if config.head == "triton" and device.type != "cuda":
            raise ValueError("head: found 'triton', which needs a GPU; expected 'auto' or 'torch'")
        specs = self._checked_specs(device)
        # Rows past the smallest vocabulary are padding or unused: no model puts probability there.
        self._vocab_size = min(spec.vocab_size for spec in specs)
        rollout_time = timedelta(seconds=config.rollout.timeout_s if config.rollout else 0)
        self.world = connect(
            config.parallel, device=device, seed=config.seed, timeout=rollout_time + SLACK
        )
        self._spec = specs[0]
        student = self._load(config.student)
        self._student = Student(student.model, config.optimizer, self.world)
        self._offloader = TeacherOffloader(self.world.device)
        self._scorables: dict[str, Scorable] = {STUDENT: student, **self._load_teachers()}

    @property
    def rank(self) -> int:
        """This process's number among the trainers."""
        return self.world.rank

    @property
    def size(self) -> int:
        """Number of trainer processes."""
        return self.world.size

    @property
    def is_writer(self) -> bool:
        """Whether this process is the one that writes files and talks to others."""
        return self.rank == 0

    @property
    def place(self) -> str:
        """Rank and position in the layout, for messages."""
        groups = self.world.groups
        return (
            f"rank {self.rank} of {self.size} (dp {groups.dp.rank()}, pp {groups.pp.rank()}, "
            f"cp {groups.cp.rank()}, tp {groups.tp.rank()}; {self.world.device})"
        )

    @_names_rank
    def score(self, model: str, spans: Sequence[TokenSpan]) -> list[FloatArray]:
        """fp32 log-probabilities of each span's scored tail under `student` or a teacher.

        In the order of `spans`, equal on every rank. Raises `ValueError` for an unknown model, or a
        span that scores its first token.
        """
        return [found.logprobs_R for found in self.read(model, spans, ScoreRequest())]

    @_names_rank
    def read(
        self,
        model: str,
        spans: Sequence[TokenSpan],
        request: ScoreRequest,
        ids: Sequence[Int32Array] | None = None,
    ) -> list[TokenScores]:
        """What `request` asks for at each span's scored tail, and the log-probabilities of its `ids`.

        In the order of `spans`, equal on every rank; fp32, hidden states in the model's own type.
        """
        scorable = self._scorable(model)
        with self._offloader.on_device(scorable.model):
            return read_spans(scorable, spans, self._rules, request, ids)

    @_names_rank
    def prefetch(self, model: str) -> None:
        """Begin to fetch a teacher that is scored next, while the student trains."""
        self._offloader.prefetch(self._scorable(model).model)

    def switches(self) -> list[Switch]:
        """The teachers that came to this rank's device since the last call, in order."""
        return self._offloader.switches()

    @_names_rank
    def divergences(
        self, student: str, teacher: str, spans: Sequence[TokenSpan]
    ) -> tuple[FloatArray, FloatArray]:
        """Per span the mean full-vocabulary KL(teacher || student) and KL(student || teacher).

        fp32, one number per span, equal on every rank; NaN for a span without scored tokens.
        """
        return mean_divergences(self.token_divergences(student, teacher, spans))

    @_names_rank
    def token_divergences(
        self, student: str, teacher: str, spans: Sequence[TokenSpan]
    ) -> list[FloatArray]:
        """The same of each scored token, fp32 `[R, 2]` a span."""
        first, second = self._scorable(student), self._scorable(teacher)
        with self._offloader.on_device(first.model, second.model):
            return token_divergences(first, second, spans, self._rules)

    @_names_rank
    def step(self, samples: Sequence[Sample], loss: Loss, *, learning_rate: float) -> StepResult:
        """One optimizer step on the sum of `loss` over all rows of all samples.

        `sample_ids` of the micro-batches index `samples`. Every number returned is a sum over all
        ranks, equal on every rank. Raises `ValueError` for no samples or weights that do not fit,
        and `FloatingPointError`, changing no weight, if the loss or its gradient is not finite.
        """
        self._check_samples(samples)
        total, grad_norm, metrics = self._student.step(
            self._batches(samples), self._with_heads(loss, samples, training=True), learning_rate
        )
        return StepResult(
            loss=total,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=sum(num_inputs(sample.span) for sample in samples),
            metrics=metrics,
        )

    @_names_rank
    def sketch(self, samples: Sequence[Sample], loss: Loss) -> FloatArray:
        """A CountSketch of the gradient of `loss` over all samples; changes no weight.

        fp32, equal on every rank and, up to rounding, in every layout: norms and dot products of
        gradients are those of their sketches. Raises `FloatingPointError` if it is not finite.
        """
        self._check_samples(samples)
        self._student.gradient(
            self._batches(samples), self._with_heads(loss, samples, training=True)
        )
        return gradient_sketch(self._student, self._spec)

    @_names_rank
    def measure(self, samples: Sequence[Sample], loss: Loss) -> dict[str, float]:
        """The named sums of `loss` over all rows of all samples, as `step` would report them."""
        self._check_samples(samples)
        return self._student.measure(
            self._batches(samples), self._with_heads(loss, samples, training=False)
        )

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The student's weights as (Hugging Face name, CPU tensor), on rank 0 only.

        Collective: every rank must exhaust the iterator. One parameter is held at a time; copy a
        tensor to keep it past the next.
        """
        parameters = dict(self._student.model.named_parameters())
        return export.hf_tensors(parameters, self._spec, self.world)

    @_names_rank
    def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Write weights, optimizer, random states and `extra` (JSON) to `directory`.

        Rank 0's `directory` and `extra` count; the directory is on a file system that all share.
        """
        checkpoint.save(self._student, directory, extra)

    @_names_rank
    def load(self, directory: Path) -> dict[str, Any]:
        """Restore what `save` wrote, at any layout, and return `extra`."""
        return checkpoint.load(self._student, directory)

    @_names_rank
    def broadcast(self, value: R) -> R:
        """Rank 0's `value` on every rank; what the others pass is ignored."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    @_names_rank
    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    @_names_rank
    def memory_gib(self) -> float:
        """The most of all ranks: a GPU's peak since the last call, on a CPU the process's now."""
        return most_memory_gib(self.world)

    def close(self) -> None:
        """Leave the other processes; every rank calls it."""
        disconnect(self.world)

    @property
    def _rules(self) -> PackingRules:
        parallel = self.config.parallel
        multiple = parallel.tp if parallel.sequence_parallel else 1
        models = [self.config.student, *self.config.teachers.values()]
        if any(self._precision(model).startswith("fp8") for model in models):
            multiple *= FP8_MULTIPLE
        return PackingRules(
            max_tokens=self.config.batch.micro_batch_tokens,
            multiple=multiple,
            cp=parallel.cp,
            cp_rank=self.world.groups.cp.rank(),
        )

    def _batches(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        return own_batches(samples, self._rules, self.world)

    def _with_heads(self, loss: Loss, samples: Sequence[Sample], *, training: bool) -> RowLoss:
        """`loss` with the student's head, and with the output weights of the samples' teachers.

        Those alone are on the device, whatever became of the rest of the teacher.
        """
        names = {s.teacher for s in samples if s.teacher is not None and s.hidden_RD is not None}
        device, weights = self.world.device, {}
        if self.world.is_last_stage:
            for name in sorted(names):
                weight_VD = output_weight(self._scorable(name).model)
                weights[name] = self._offloader.weight(weight_VD)

        def placed(name: str, rows: TeacherRows) -> TeacherRows:
            return TeacherRows(
                rows_S=rows.rows_S.to(device),
                hidden_SD=rows.hidden_SD.to(device),
                weight_VD=weights[name],
            )

        def with_heads(hidden_WD: Tensor, batch: MicroBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
            teachers = {name: placed(name, rows) for name, rows in batch.teachers.items()}
            head = self._scorables[STUDENT].head(training=training)
            return loss(head, hidden_WD, replace(batch, teachers=teachers))

        return with_heads

    def _check_samples(self, samples: Sequence[Sample]) -> None:
        if not samples:
            raise ValueError("samples: found none, expected at least one")
        for index, sample in enumerate(samples):
            for name, found in _lengths(sample).items():
                if found != sample.span.num_scored:
                    raise ValueError(
                        f"samples[{index}].{name}: found {found} rows, expected one per scored "
                        f"token, {sample.span.num_scored}"
                    )
            if sample.hidden_RD is None:
                continue
            if sample.divergence_weights_R is None:
                raise ValueError(
                    f"samples[{index}].divergence_weights_R: found none beside hidden states of "
                    f"{sample.teacher!r}, expected one weight per scored token"
                )
            size = self._scorable(str(sample.teacher)).model.config.hidden_size
            if sample.hidden_RD.shape[1] != size:
                raise ValueError(
                    f"samples[{index}].hidden_RD: found a hidden size of "
                    f"{sample.hidden_RD.shape[1]}, expected {size} of teacher {sample.teacher!r}"
                )

    def _scorable(self, name: str) -> Scorable:
        if name not in self._scorables:
            raise ValueError(f"model: found {name!r}, expected one of {sorted(self._scorables)}")
        return self._scorables[name]

    def _checked_specs(self, device: torch.device) -> list[ModelSpec]:
        """The shapes of student and teachers; all are cut by the one layout of this world."""
        specs = []
        teachers = {f"teachers.{name}": model for name, model in self.config.teachers.items()}
        for key, model in {"student": self.config.student, **teachers}.items():
            specs.append(read_spec(_directory(model)))
            try:
                check_model(specs[-1], self.config.parallel, self._precision(model), device)
            except ValueError as error:
                raise ValueError(
                    f"{key}: {model.path}: {error} (student and teachers share one layout)"
                ) from error
        return specs

    def _precision(self, model: ModelConfig) -> Precision:
        return model.precision or self.config.precision

    def _load(self, model: ModelConfig) -> Scorable:
        directory = _directory(model)
        spec = read_spec(directory)
        parallel = self.config.parallel
        built = build_model(spec, parallel, self._precision(model), self.world)
        load_hf(built, spec, directory, parallel, self.world)
        return Scorable(
            model=built,
            vocab_size=self._vocab_size,
            world=self.world,
            backend=self.config.head,
        )

    def _load_teachers(self) -> dict[str, Scorable]:
        """Frozen models by name; names with the same path and precision share one."""
        loaded: dict[tuple[Path, Precision], Scorable] = {}
        teachers: dict[str, Scorable] = {}
        for name, model in self.config.teachers.items():
            key = _directory(model), self._precision(model)
            if key not in loaded:
                loaded[key] = self._load(model)
                loaded[key].model.requires_grad_(False)
                self._offloader.park(name, loaded[key].model)
            teachers[name] = loaded[key]
        return teachers


def _directory(model: ModelConfig) -> Path:
    return resolve("model", model.path)


def _lengths(sample: Sample) -> dict[str, int]:
    """Rows of everything that a sample says about its scored tokens."""
    found = {
        "weights_R": sample.weights_R,
        "divergence_weights_R": sample.divergence_weights_R,
        "top_k": sample.top_k.ids_RK if sample.top_k else None,
        "hidden_RD": sample.hidden_RD,
    }
    return {name: len(rows) for name, rows in found.items() if rows is not None}
