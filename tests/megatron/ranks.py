"""What the ranks of a test world do: build engines in many layouts, compare, report the largest gaps.

Runs in the spawned processes, so it imports no transformers; references come ready-made in files.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megadistill.config.algorithm import CamopdConfig, SelectiveBranchConfig, SftConfig
from megadistill.config.schema import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PoolConfig,
    RunConfig,
)
from megadistill.convert import mapping
from megadistill.convert.families import ModelSpec
from megadistill.head import VocabularyHead, weighted_nll
from megadistill.losses import (
    answer_conditioned,
    full_vocabulary,
    policy_gradient,
    policy_gradient_and,
    top_k,
)
from megadistill.megatron import export, training
from megadistill.megatron.engine import STUDENT, Engine
from megadistill.types import (
    FloatArray,
    MicroBatch,
    Prompt,
    Rollout,
    Sample,
    Scored,
    ScoreRequest,
    TokenScores,
    TokenSpan,
    TopK,
)
from tests.megatron.reference import (
    TEMPERATURE,
    TOP_K,
    Reference,
    asked_ids,
    random_samples,
    reversed_top_k,
    teacher_of,
)
from tests.megatron.worlds import renew_world

Layout = dict[str, Any]
"""Arguments of ParallelConfig."""
MICRO_BATCH_TOKENS = 48


def run_config(model_dir: Path, layout: Layout, **changes: Any) -> RunConfig:
    """A run of one model, which is also its own teacher."""
    settings: dict[str, Any] = {
        "name": "parity",
        "steps": 1,
        "device": "cpu",
        "precision": "fp32",
        "student": ModelConfig(path=str(model_dir)),
        "teachers": {"same": ModelConfig(path=str(model_dir))},
        "algorithm": SftConfig(pool="pool"),
        "data": DataConfig(pools={"pool": PoolConfig(sources=[])}),
        "optimizer": OptimizerConfig(lr=1e-3, beta2=0.999, weight_decay=0.0, clip_grad=1.0),
        "batch": BatchConfig(micro_batch_tokens=MICRO_BATCH_TOKENS),
        "parallel": ParallelConfig(**layout),
    }
    return RunConfig(**{**settings, **changes})


def read_reference(directory: Path, model_name: str) -> Reference:
    """What the oracle wrote for this model."""
    found = torch.load(directory / f"{model_name}.reference", weights_only=False)
    assert isinstance(found, Reference)
    return found


def nll(
    head: VocabularyHead, hidden_WD: Tensor, batch: MicroBatch
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The loss of the tests, and two metrics."""
    loss, statistics = weighted_nll(head, hidden_WD, batch.targets_W, batch.weights_W)
    return loss, {
        "rows": torch.tensor(float(len(batch.rows_W))),
        "logprob": statistics.logprobs_T.sum(),
    }


def compare(
    directory: Path, cases: Sequence[tuple[str, Layout, str]]
) -> dict[tuple[str, str], dict[str, float]]:
    """Largest gaps from the reference over all ranks, by (layout name, model name).

    `cases` are (layout name, layout, model name); `directory` holds models and references.
    """
    found = {}
    for layout_name, layout, model_name in cases:
        model_dir = directory / model_name
        reference = read_reference(directory, model_name)
        names = {"same": model_name, "shallow": "shallow", "wide": "wide"}
        teachers = {key: ModelConfig(path=str(directory / name)) for key, name in names.items()}
        engine = Engine(run_config(model_dir, layout, teachers=teachers))
        gaps = {
            **_scoring(engine, reference),
            **_distilling(engine, reference),
            **_training(engine, reference, model_dir),
        }
        found[layout_name, model_name] = worst(gaps)
        engine.close()
        renew_world()
    return found


def select(directory: Path, student: str, teacher: str) -> tuple[list[int], list[FloatArray]]:
    """What CaMOPD keeps of random responses to `student`, and its weights; equal on all ranks."""
    from tests.tiny import camopd_of  # takes transformers along

    size = dist.get_world_size()
    models = {name: ModelConfig(path=str(directory / name)) for name in (student, teacher)}
    engine = Engine(
        run_config(directory / student, {"dp": size}, teachers={"general": models[teacher]})
    )
    scored = scored_by(engine, "general", "general", read_reference(directory, student).spans)
    branch = SelectiveBranchConfig(pool="p", teacher="general", mass=0.6)
    selection = camopd_of(CamopdConfig(general=branch, domain=branch)).select(scored)
    engine.close()
    weights = [sample.weights_R for sample in selection.samples]
    everywhere: list[bytes] = [b""] * size
    dist.all_gather_object(everywhere, b"".join(one.tobytes() for one in weights))
    assert set(everywhere) == {everywhere[0]}
    return list(selection.selected), weights


def overlapped(directory: Path, student: str) -> dict[bool, list[tuple[float, float]]]:
    """Losses and norms of steps where a rank has rows only now and then, with the gradients' reduction
    beside the backward pass as on a GPU, and without."""
    found: dict[bool, list[tuple[float, float]]] = {}
    for overlap in (False, True):
        found[overlap] = []
        with reducing(overlap):
            engine = Engine(run_config(directory / student, {"dp": dist.get_world_size()}))
        if overlap:
            engine._student.model.config.no_sync_func = engine._student.parallel_model.no_sync
        assert engine._student.parallel_model.ddp_config.overlap_grad_reduce == overlap
        for lengths in ((30, 20, 12, 9), (30,), (33, 70, 20, 9), (12,)):
            samples = random_samples(lengths)
            for loss in (nll, partial(full_vocabulary, divergence="forward_kl")):
                result = engine.step(samples, loss, learning_rate=1e-3)
                found[overlap].append((result.loss, result.grad_norm))
        engine.close()
        renew_world()
    return found


@contextmanager
def reducing(overlap: bool) -> Iterator[None]:
    """Students made within it reduce their gradients beside the backward pass, or after it."""
    from megatron.core.distributed import DistributedDataParallelConfig  # after our own Megatron

    def settled(**settings: Any) -> DistributedDataParallelConfig:
        return DistributedDataParallelConfig(**{**settings, "overlap_grad_reduce": overlap})

    with patch.object(training, "DistributedDataParallelConfig", settled):
        yield


def scored_by(
    engine: Engine, teacher: str, branch: str, spans: Sequence[TokenSpan]
) -> list[Scored]:
    """Spans as responses that the student wrote, scored by it and by a teacher of the engine."""
    student = engine.score(STUDENT, spans)
    other = engine.score(teacher, spans)
    return [
        Scored(
            rollout=Rollout(
                prompt=Prompt(
                    id=str(index),
                    pool="p",
                    messages=(),
                    token_ids=tuple(span.token_ids_N[: -span.num_scored].tolist()),
                ),
                response_ids_R=span.token_ids_N[-span.num_scored :],
                logprobs_R=student[index],
                policy_version=0,
                finish_reason="stop",
            ),
            branch=branch,
            student=TokenScores(logprobs_R=student[index]),
            teacher=TokenScores(logprobs_R=other[index]),
        )
        for index, span in enumerate(spans)
    ]


def _scoring(engine: Engine, reference: Reference) -> dict[str, float]:
    scores = engine.score(STUDENT, reference.spans)
    same = engine.score("same", reference.spans)
    entropy = engine.measure(reference.samples, policy_gradient)["train/entropy_sum"]
    forward_kl, reverse_kl = engine.divergences(STUDENT, "same", reference.spans)
    found = engine.read("same", reference.spans, ScoreRequest(top_k=TOP_K, temperature=TEMPERATURE))
    tops = [one.top_k for one in found if one.top_k]
    taught = [
        replace(sample, divergence_weights_R=sample.weights_R, top_k=reversed_top_k(top))
        for sample, top in zip(reference.samples, tops, strict=True)
    ]
    loss = partial(answer_conditioned, balance=1.0, temperature=TEMPERATURE)
    return {
        "top k": _largest_of(
            (a.logprobs_RK, b.logprobs_RK) for a, b in zip(tops, reference.tops, strict=True)
        ),
        "top-k kl": abs(engine.measure(taught, loss)["divergence/loss"] - reference.kl),
        "logprob": _largest_of(zip(scores, reference.logprobs, strict=True)),
        "entropy": abs(entropy - reference.entropy) / reference.entropy,
        "gap to itself": _largest_of(zip(scores, same, strict=True)),
        "kl to itself": float(max(np.abs(forward_kl).max(), np.abs(reverse_kl).max())),
    }


def _distilling(engine: Engine, reference: Reference) -> dict[str, float]:
    """Teachers of other depth and width, two in a micro-batch, over all ids."""
    request = ScoreRequest(entropy=True, temperature=TEMPERATURE, hidden=True)
    ids = asked_ids(reference.spans)
    found = {name: engine.read(name, reference.spans, request, ids) for name in ("shallow", "wide")}
    samples = [
        replace(
            sample,
            teacher=teacher_of(index),
            hidden_RD=found[teacher_of(index)][index].hidden_RD,
        )
        for index, sample in enumerate(reference.samples)
    ]
    loss = partial(
        policy_gradient_and, divergence=partial(full_vocabulary, divergence="jsd", beta=0.5)
    )
    measured = engine.measure(samples, loss)["divergence/loss"]
    heads = engine._with_heads(loss, samples, training=True)
    engine._student.gradient(engine._batches(samples), heads)
    pairs = list(zip(found["shallow"], reference.teacher, strict=True))
    supported = _supported(engine, reference)
    tail = partial(top_k, direction="reverse", tail=True, temperature=TEMPERATURE)
    on_own_ids = engine.measure(supported, tail)["divergence/loss"]
    return {
        "own top-k": abs(on_own_ids - reference.supported),
        "teacher entropy": _largest_of((a.entropy_R, b.entropy_R) for a, b in pairs),
        "teacher at ids": _largest_of((a.at_ids_RK, b.at_ids_RK) for a, b in pairs),
        "jsd": abs(measured - reference.distilled),
        "jsd gradient": _relative(dict(gradients_of(engine)), reference.distilled_gradients),
    }


def _supported(engine: Engine, reference: Reference) -> list[Sample]:
    """The student's most probable ids, and what the shallow teacher thinks of them."""
    request = ScoreRequest(top_k=TOP_K, temperature=TEMPERATURE)
    own = [one.top_k for one in engine.read(STUDENT, reference.spans, request) if one.top_k]
    plain = ScoreRequest(temperature=TEMPERATURE)
    taught = engine.read("shallow", reference.spans, plain, [top.ids_RK for top in own])
    return [
        replace(sample, top_k=TopK(ids_RK=top.ids_RK, logprobs_RK=one.at_ids_RK))
        for sample, top, one in zip(reference.samples, own, taught, strict=True)
        if one.at_ids_RK is not None
    ]


def _training(engine: Engine, reference: Reference, model_dir: Path) -> dict[str, float]:
    gaps = {"round trip": _differences(engine, model_dir)}
    unclipped = max(reference.grad_norms[0], 1.0)  # what the reference divided its gradients by
    expected_M = unclipped * dense_sketch(reference.gradients, engine._spec)
    found_M = engine.sketch(reference.samples, nll)
    gaps["sketch"] = float(np.abs(found_M - expected_M).max() / np.abs(expected_M).max())
    results = []
    for step in range(len(reference.losses)):
        results.append(engine.step(reference.samples, nll, learning_rate=1e-3))
        if step == 0:
            gradients = dict(gradients_of(engine))
            gaps["gradient"] = _relative(gradients, reference.gradients)
    rows = sum(sample.span.num_scored for sample in reference.samples)
    gaps["rows"] = abs(results[0].metrics["rows"] - rows)
    gaps["loss"] = max(abs(r.loss - x) for r, x in zip(results, reference.losses, strict=True))
    gaps["grad norm"] = max(
        abs(r.grad_norm / x - 1) for r, x in zip(results, reference.grad_norms, strict=True)
    )
    weights = dict(engine.hf_tensors())
    gaps["weights"] = largest_gap(weights, reference.weights)
    # Fewer samples than data-parallel ranks: the others take part without any.
    last = engine.step(reference.samples[:1], nll, learning_rate=1e-3)
    gaps["last loss"] = abs(last.loss - reference.last_loss)
    return gaps


def dense_sketch(gradients: Mapping[str, Tensor], spec: ModelSpec) -> FloatArray:
    """A CountSketch of Hugging Face gradients, straight from its definition in unsigned numbers."""
    total_M = np.zeros(2**16)
    for entry in mapping.entries(spec):
        flat = mapping.merged(spec, entry, gradients.__getitem__).flatten().double().numpy()
        digest = hashlib.sha256(entry.megatron.encode()).digest()
        state = np.arange(1, len(flat) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state += np.uint64(int.from_bytes(digest[:8], "big"))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state ^= state >> np.uint64(31)
        odd = state // np.uint64(2**16) % np.uint64(2) == 1
        np.add.at(total_M, (state % np.uint64(2**16)).astype(int), np.where(odd, -flat, flat))
    return total_M.astype(np.float32)


def _differences(engine: Engine, model_dir: Path) -> float:
    """How many exported tensors are not bit for bit those that were loaded, or are missing."""
    from megadistill.convert.hf_files import SafetensorsReader

    reader = SafetensorsReader(model_dir)
    exported = dict(engine.hf_tensors())
    if not engine.is_writer:
        assert not exported
        return 0.0
    missing = set(reader.names) ^ set(exported)
    return float(len(missing) + sum(not torch.equal(t, reader(n)) for n, t in exported.items()))


def gradients_of(engine: Engine) -> Any:
    """The first step's gradients as Hugging Face tensors, on rank 0."""
    student = engine._student
    for buffer in student.parallel_model.buffers:
        for bucket in buffer.buckets:
            # After the reduction each data-parallel rank holds its own piece of the sum.
            group = engine.world.groups.dp_cp
            pieces = list(bucket.grad_data.chunk(group.size()))
            dist.all_gather(pieces, pieces[group.rank()].clone(), group=group)
    gradients = {name: p.main_grad for name, p in student.model.named_parameters()}
    return export.hf_tensors(gradients, engine._spec, engine.world)


def _largest_of(pairs: Any) -> float:
    return float(max(np.abs(a - b).max() for a, b in pairs))


def largest_gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of any entry of any tensor; on rank 0, which alone has what was exported."""
    if dist.get_rank():
        return 0.0
    assert found
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


def _relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """As `largest_gap`, over that tensor's largest entry."""
    if dist.get_rank():
        return 0.0
    assert found
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in found)


def worst(gaps: dict[str, float]) -> dict[str, float]:
    everywhere: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, gaps)
    return {name: max(part[name] for part in everywhere) for name in gaps}
