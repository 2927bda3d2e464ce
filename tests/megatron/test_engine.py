"""One engine in this process: what it refuses, and what must not change its numbers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megadistill.algorithms.coherence import coherence, interference
from megadistill.config.algorithm import CamopdConfig, SelectiveBranchConfig
from megadistill.config.schema import BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megadistill.convert.families import read_spec
from megadistill.head import VocabularyHead
from megadistill.losses import answer_conditioned, full_vocabulary, policy_gradient
from megadistill.megatron.engine import STUDENT, Engine
from megadistill.megatron.model import check_model, output_weight
from megadistill.types import FloatArray, MicroBatch, Sample, ScoreRequest, TokenSpan
from tests.megatron import oracle
from tests.megatron.ranks import (
    Layout,
    gradients_of,
    nll,
    read_reference,
    run_config,
    scored_by,
)
from tests.megatron.reference import VOCAB_SIZE, random_samples, random_spans
from tests.tiny import camopd_of

pytestmark = [pytest.mark.megatron, pytest.mark.timeout(600)]

MODEL = "qwen3_untied"


@contextmanager
def opened(models: Path, layout: Layout | None = None, **changes: Any) -> Iterator[Engine]:
    engine = Engine(run_config(models / MODEL, layout or {}, **changes))
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def engine(models: Path) -> Iterator[Engine]:
    with opened(models) as engine:
        yield engine


def largest(a: list[FloatArray], b: list[FloatArray]) -> float:
    return float(max(np.abs(x - y).max(initial=0.0) for x, y in zip(a, b, strict=True)))


def test_it_knows_its_place(engine: Engine) -> None:
    assert (engine.rank, engine.size, engine.is_writer) == (0, 1, True)
    assert engine.broadcast({"a": 1}) == {"a": 1}
    engine.barrier()


def test_nothing_to_score_gives_nothing(engine: Engine) -> None:
    assert engine.score(STUDENT, []) == []


def test_spans_without_scored_tokens_keep_their_place(engine: Engine) -> None:
    spans = random_spans((9, 14))
    empty = TokenSpan(token_ids_N=spans[0].token_ids_N, num_scored=0)
    scores = engine.score(STUDENT, [empty, spans[1], empty])
    assert [len(score) for score in scores] == [0, spans[1].num_scored, 0]
    assert largest([scores[1]], engine.score(STUDENT, spans[1:])) == 0.0
    forward_kl, _ = engine.divergences(STUDENT, "same", [empty, spans[1]])
    assert np.isnan(forward_kl[0])
    assert forward_kl[1] == 0.0


def test_the_top_k_is_that_of_the_whole_vocabulary(engine: Engine) -> None:
    spans = random_spans((9, 14, 60))
    everything = engine.read(STUDENT, spans, ScoreRequest(top_k=VOCAB_SIZE))
    assert largest([one.logprobs_R for one in everything], engine.score(STUDENT, spans)) == 0.0
    few = engine.read(STUDENT, spans, ScoreRequest(top_k=4))
    for span, one, other in zip(spans, everything, few, strict=True):
        assert one.top_k is not None
        assert other.top_k is not None
        top, part = one.top_k, other.top_k
        assert top.ids_RK.shape == (span.num_scored, VOCAB_SIZE)
        assert (np.sort(top.ids_RK) == np.arange(VOCAB_SIZE)).all()
        assert (np.diff(top.logprobs_RK) <= 0).all()
        places = (top.ids_RK == span.token_ids_N[-span.num_scored :, None]).argmax(1)
        chosen = np.take_along_axis(top.logprobs_RK, places[:, None], 1)[:, 0]
        assert np.abs(chosen - one.logprobs_R).max() < 1e-6
        assert (top.ids_RK[:, :4] == part.ids_RK).all()
        assert (top.logprobs_RK[:, :4] == part.logprobs_RK).all()


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_one_reading_answers_everything_as_hugging_face_does(
    engine: Engine, models: Path, temperature: float
) -> None:
    """The entropy and the token's own log-probability stay at temperature 1."""
    spans = random_spans((9, 60, 1, 30))
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, VOCAB_SIZE, (span.num_scored, 3), dtype=np.int32) for span in spans]
    request = ScoreRequest(entropy=True, top_k=4, temperature=temperature, hidden=True)
    found = engine.read("same", spans, request, ids)
    assert largest([one.logprobs_R for one in found], engine.score("same", spans)) == 0.0
    dense = oracle.read_model(models / MODEL)
    for span, one, ids_RK in zip(spans, found, ids, strict=True):
        assert one.hidden_RD is not None
        assert one.hidden_RD.shape == (span.num_scored, 64)
        if not span.num_scored:
            continue
        with torch.no_grad():
            rows = oracle.token_logprobs(dense, span)[-span.num_scored :]
        cooled = (rows / temperature).log_softmax(-1)
        assert one.entropy_R is not None
        assert one.top_k is not None
        assert one.at_ids_RK is not None
        np.testing.assert_allclose(one.entropy_R, -(rows.exp() * rows).sum(-1), atol=1e-5)
        expected = cooled.gather(1, torch.from_numpy(ids_RK.astype(np.int64)))
        np.testing.assert_allclose(one.at_ids_RK, expected, atol=1e-5)
        np.testing.assert_allclose(one.top_k.logprobs_RK, cooled.topk(4).values, atol=1e-5)
        weight_VD = output_weight(engine._scorables["same"].model).detach()[:VOCAB_SIZE]
        remade = (one.hidden_RD @ weight_VD.t()).log_softmax(-1)
        np.testing.assert_allclose(remade, rows, atol=1e-5)


def test_measuring_a_loss_gives_what_the_step_will_report(engine: Engine) -> None:
    spans = random_spans((9, 14, 60, 12))
    found = engine.read("same", spans, ScoreRequest(top_k=8, temperature=1.5))
    tops = [one.top_k for one in found if one.top_k]
    rng = np.random.default_rng(0)
    shaken = [
        replace(t, logprobs_RK=(t.logprobs_RK + rng.normal(size=t.ids_RK.shape)).astype(np.float32))
        for t in tops
    ]
    samples = [
        Sample(
            span=span,
            weights_R=np.full(span.num_scored, 0.1, dtype=np.float32),
            divergence_weights_R=np.full(span.num_scored, 0.1 * (index % 2), dtype=np.float32),
            top_k=shaken[index] if index % 2 else None,
        )
        for index, span in enumerate(spans)
    ]
    loss = partial(answer_conditioned, balance=2.0, temperature=1.5)
    measured = engine.measure(samples, loss)
    assert measured["divergence/loss"] > 0
    before = dict(engine.hf_tensors())
    assert measured == engine.measure(samples, loss)
    result = engine.step(samples, loss, learning_rate=1e-3)
    assert result.metrics == pytest.approx(measured, rel=1e-6)
    assert result.loss == pytest.approx(
        measured["raft/sft"] + 2 * measured["divergence/loss"], rel=1e-6
    )
    assert set(before) == set(dict(engine.hf_tensors()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.score("nobody", []), r"found 'nobody', expected one of \['same', 'student'\]"),
        (lambda e: e.step([], nll, learning_rate=1e-3), "samples: found none"),
        (
            lambda e: e.step(
                [
                    Sample(
                        span=random_spans((9,))[0],
                        weights_R=np.ones(2, dtype=np.float32),
                    )
                ],
                nll,
                learning_rate=1e-3,
            ),
            r"samples\[0\]\.weights_R: found 2 rows",
        ),
        (
            lambda e: e.step(
                [
                    replace(
                        random_samples((9,))[0],
                        divergence_weights_R=np.ones(6, dtype=np.float32),
                        teacher="same",
                        hidden_RD=torch.zeros(6, 5),
                    )
                ],
                nll,
                learning_rate=1e-3,
            ),
            r"samples\[0\]\.hidden_RD: found a hidden size of 5, expected 64 of teacher 'same'",
        ),
        (
            lambda e: e.read(STUDENT, [], ScoreRequest(top_k=VOCAB_SIZE + 1)),
            f"top_k: found {VOCAB_SIZE + 1}, expected at most the vocabulary's {VOCAB_SIZE}",
        ),
        (
            lambda e: e.read(
                STUDENT, random_spans((9,)), ScoreRequest(), [np.zeros((5, 2), dtype=np.int32)]
            ),
            r"ids\[0\]: found the shape \(5, 2\), .* \(6, 2\)",
        ),
        (
            lambda e: e.score(
                STUDENT, [TokenSpan(token_ids_N=np.arange(4, dtype=np.int32), num_scored=4)]
            ),
            "num_scored: found 4",
        ),
    ],
)
def test_wrong_input_is_refused_with_the_rank(engine: Engine, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(engine)
    assert any("rank 0 of 1" in note for note in caught.value.__notes__)


def test_models_that_the_layout_does_not_divide_are_refused(models: Path) -> None:
    spec = read_spec(models / MODEL)
    for parallel in (ParallelConfig(pp=3), ParallelConfig(tp=3)):
        with pytest.raises(ValueError, match="p: found 3, expected a divisor"):
            check_model(spec, parallel, "fp32", torch.device("cpu"))


def test_the_model_that_the_layout_does_not_divide_is_named(models: Path) -> None:
    teachers = {"same": ModelConfig(path=str(models / MODEL))}
    teachers["small"] = ModelConfig(path=str(models / "shallow"))
    with (
        pytest.raises(ValueError, match=r"^teachers\.small: .*shallow: tp: found 4, .* = 2 \("),
        opened(models, {"tp": 4}, teachers=teachers),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp8 can be had here")
def test_fp8_and_gpus_are_refused_where_there_is_none(models: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"precision: found 'fp8_blockwise'.*expected 'bf16'"),
        opened(models, precision="fp8_blockwise"),
    ):
        pass
    with pytest.raises(ValueError, match="device: found cuda with"), opened(models, device="cuda"):
        pass
    with pytest.raises(ValueError, match="head: found 'triton'"), opened(models, head="triton"):
        pass


def test_a_world_of_another_size_is_refused(models: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"found 1 trainer processes.*expected 2"),
        opened(models, {"tp": 2}),
    ):
        pass


def test_packing_does_not_change_scores(models: Path) -> None:
    spans = random_spans((7, 30, 12, 33, 70, 5))
    found = []
    for max_tokens in (1, 48, 4096):
        with opened(models, batch=BatchConfig(micro_batch_tokens=max_tokens)) as engine:
            found.append(engine.score(STUDENT, spans))
    assert largest(found[0], found[1]) <= 2e-6
    assert largest(found[0], found[2]) <= 2e-6


def test_a_teacher_is_another_model(models: Path, tmp_path: Path) -> None:
    """Log-probabilities and full-vocabulary divergences of two models against dense fp32."""
    other = oracle.write_model(oracle.CASES[0], tmp_path, seed=7)
    spans = random_spans((20, 9))
    dense = [oracle.read_model(path) for path in (models / MODEL, other)]
    teachers = {"other": ModelConfig(path=str(other)), "again": ModelConfig(path=str(other))}
    with opened(models, teachers=teachers) as engine:
        assert engine._scorables["other"] is engine._scorables["again"]
        scores = engine.score("other", spans)
        forward_kl, reverse_kl = engine.divergences(STUDENT, "other", spans)
    for index, span in enumerate(spans):
        with torch.no_grad():
            student, teacher = (oracle.token_logprobs(model, span) for model in dense)
        expected = oracle.scored(teacher, span).numpy()
        np.testing.assert_allclose(scores[index], expected, atol=1e-5)
        student, teacher = student[-span.num_scored :], teacher[-span.num_scored :]
        forward = (teacher.exp() * (teacher - student)).sum(-1).mean()
        reverse = (student.exp() * (student - teacher)).sum(-1).mean()
        assert forward_kl[index] == pytest.approx(forward.item(), abs=1e-5)
        assert reverse_kl[index] == pytest.approx(reverse.item(), abs=1e-5)


def test_bf16_is_close_to_fp32_and_equal_to_itself(models: Path) -> None:
    reference = read_reference(models, MODEL)
    with opened(models, precision="bf16") as engine:
        scores = engine.score(STUDENT, reference.spans)
        same = engine.score("same", reference.spans)
        result = engine.step(reference.samples, nll, learning_rate=1e-3)
    assert largest(scores, same) == 0.0
    assert largest(scores, reference.logprobs) <= 6e-2
    assert result.loss == pytest.approx(reference.losses[0], abs=3e-2)
    assert result.grad_norm == pytest.approx(reference.grad_norms[0], rel=3e-2)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_no_bit(models: Path, recompute: str) -> None:
    samples = random_samples((9, 40, 17))
    results = []
    for how in ("none", recompute):
        with opened(models, {"recompute": how}) as engine:
            steps = [engine.step(samples, nll, learning_rate=1e-3) for _ in range(2)]
            results.append([(step.loss, step.grad_norm, step.metrics) for step in steps])
    assert results[0] == results[1]


def test_the_loss_sees_which_sample_a_row_belongs_to(models: Path) -> None:
    samples = random_samples((9, 40, 17, 60))
    seen: dict[int, int] = {}

    def watching(
        head: VocabularyHead, hidden_WD: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert sum(batch.rows_per_sample) == len(hidden_WD)
        seen.update(zip(batch.sample_ids, batch.rows_per_sample, strict=True))
        return nll(head, hidden_WD, batch)

    with opened(models) as engine:
        result = engine.step(samples, watching, learning_rate=1e-3)
    assert seen == {index: sample.span.num_scored for index, sample in enumerate(samples)}
    assert result.num_tokens == 9 + 40 + 17 + 60 - 4
    assert result.metrics["rows"] == sum(seen.values())
    assert result.learning_rate == 1e-3


def broken_gradient(
    head: VocabularyHead, hidden_WD: Tensor, batch: MicroBatch
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Zero, with a gradient of NaN."""
    return (hidden_WD * 0.0).sum().sqrt(), {}


@pytest.mark.parametrize(
    ("loss", "weight", "message"),
    [
        (nll, float("nan"), "the step's loss, .* is nan"),
        (broken_gradient, 1.0, "the step's gradient norm before clipping is nan"),
    ],
)
def test_what_is_not_finite_changes_no_weight(
    models: Path, loss: Any, weight: float, message: str
) -> None:
    sample = random_samples((12,))[0]
    sample = replace(sample, weights_R=np.full_like(sample.weights_R, weight))
    with opened(models) as engine:
        before = {name: tensor.clone() for name, tensor in engine.hf_tensors()}
        with pytest.raises(FloatingPointError, match=message):
            engine.step([sample], loss, learning_rate=1e-3)
        after = dict(engine.hf_tensors())
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert np.isfinite(engine.step(random_samples((12,)), nll, learning_rate=1e-3).loss)


BRANCH = SelectiveBranchConfig(pool="p", teacher="same", mass=1.0)


def test_a_student_that_is_its_teacher_has_no_gradient(models: Path) -> None:
    """T1-8: one engine, so that every gap is exactly 0, and what follows from that."""
    with opened(models) as engine:
        scored = scored_by(engine, "same", "domain", random_spans((9, 60, 30)))
        algorithm = camopd_of(CamopdConfig(general=BRANCH, domain=BRANCH))
        selection = algorithm.select(scored)
        assert list(selection.scores.values()) == [0.0, 0.0, 0.0]
        before = {name: tensor.clone() for name, tensor in engine.hf_tensors()}
        result = engine.step(selection.samples, policy_gradient, learning_rate=1e-3)
        assert (result.loss, result.grad_norm) == (0.0, 0.0)
        assert all(torch.equal(before[name], tensor) for name, tensor in engine.hf_tensors())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_that_is_its_teacher_diverges_nowhere(models: Path, divergence: Any) -> None:
    """Over all ids, with hidden states that went through the host in bf16."""
    samples = random_samples((9, 60, 30))
    spans = [sample.span for sample in samples]
    loss = partial(full_vocabulary, divergence=divergence)
    with opened(models, precision="bf16") as engine:
        engine.prefetch("same")  # on a CPU all models stay where they are
        found = engine.read("same", spans, ScoreRequest(hidden=True))
        assert engine.switches() == []
        taught = [
            replace(sample, teacher="same", hidden_RD=one.hidden_RD)
            for sample, one in zip(samples, found, strict=True)
        ]
        assert {one.hidden_RD.dtype for one in found if one.hidden_RD is not None} == {
            torch.bfloat16
        }
        before = engine.measure(taught, loss)
        assert before["divergence/rows"] > 0
        assert abs(before["divergence/nats_sum"]) < 1e-6 * before["divergence/rows"]
        engine.step(samples, nll, learning_rate=1e-2)
        assert engine.measure(taught, loss)["divergence/nats_sum"] > 1e-3


def test_the_branch_scale_multiplies_the_gradient_before_clipping(models: Path) -> None:
    """T1-10, through the engine: r_b is invisible after clipping alone."""
    other = {"other": ModelConfig(path=str(models / "llama3_untied"))}
    with opened(models, teachers=other) as engine:
        scored = scored_by(engine, "other", "general", random_spans((9, 60, 30)))
        norms = []
        for scale in (1.0, 2.0, 3.0):
            branch = BRANCH.model_copy(update={"scale": scale})
            algorithm = camopd_of(CamopdConfig(general=branch, domain=branch))
            samples = algorithm.select(scored).samples
            norms.append(engine.step(samples, policy_gradient, learning_rate=0.0).grad_norm)
    assert norms[0] > 0
    np.testing.assert_allclose(norms, [norms[0], 2 * norms[0], 3 * norms[0]], rtol=1e-5)


def test_sketches_keep_coherence_norms_and_dot_products(models: Path) -> None:
    """Within 2 % of the exact ones; and the samples' gradients add up to the batch's."""
    samples = random_samples((9, 14, 60, 12, 5, 33))
    sketches, exact = [], []
    with opened(models, optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0)) as engine:
        for sample in samples:
            sketches.append(engine.sketch([sample], nll))
            exact.append(torch.cat([t.flatten().clone() for _, t in gradients_of(engine)]).numpy())
        together = engine.sketch(samples, nll)
        assert engine.step(samples, nll, learning_rate=0.0).grad_norm > 0
        whole = torch.cat([tensor.flatten().clone() for _, tensor in gradients_of(engine)])
    sketched_NM, exact_NP = np.stack(sketches), np.stack(exact)
    np.testing.assert_allclose(exact_NP.sum(0), whole, atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(sketched_NM.sum(0), together, atol=1e-5)
    for subset in ([0, 1, 2, 3, 4, 5], [1, 3, 5]):
        expected = coherence(exact_NP[subset])
        assert coherence(sketched_NM[subset]) == pytest.approx(expected, rel=0.02)
    norms = np.linalg.norm(exact_NP, axis=1)
    np.testing.assert_allclose(np.linalg.norm(sketched_NM, axis=1), norms, rtol=0.02)
    errors = np.abs(sketched_NM @ sketched_NM.T - exact_NP @ exact_NP.T)
    assert (errors < 0.02 * np.outer(norms, norms)).all()
    (dot, cosine), (sketched, _) = (
        interference(rows[:4].sum(0), rows[2:].sum(0)) for rows in (exact_NP, sketched_NM)
    )
    assert cosine > 0.2, "some samples are in both"
    assert sketched == pytest.approx(dot, rel=0.02)


def test_a_sketch_changes_nothing(models: Path) -> None:
    """The steps before and after it are those of a run without."""
    samples = random_samples((9, 14, 60))
    ends = []
    for sketches in (False, True):
        with opened(models) as engine:
            results = [engine.step(samples, nll, learning_rate=1e-3)]
            if sketches:
                assert np.abs(engine.sketch(samples[:1], nll)).max() > 0
            results.append(engine.step(samples, nll, learning_rate=1e-3))
            ends.append((results, {name: t.clone() for name, t in engine.hf_tensors()}))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(tensor, ends[1][1][name]) for name, tensor in ends[0][1].items())


def test_packing_changes_neither_loss_nor_gradient(models: Path) -> None:
    """T1-11: together in micro-batches, or each sequence alone."""
    samples = random_samples((9, 14, 60, 12, 5))
    results, gradients = [], []
    for tokens in (48, 1):
        with opened(models, batch=BatchConfig(micro_batch_tokens=tokens)) as engine:
            results.append(engine.step(samples, nll, learning_rate=1e-3))
            found = {name: tensor.clone() for name, tensor in gradients_of(engine)}
            gradients.append(found)
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-6)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, packed in gradients[0].items():
        assert float((packed - gradients[1][name]).abs().max() / packed.abs().max()) < 1e-5, name


def test_a_metric_may_have_any_name(models: Path) -> None:
    def named(
        head: VocabularyHead, hidden_WD: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        total, _ = nll(head, hidden_WD, batch)
        return total, {"loss": torch.tensor(7.0)}

    with opened(models) as engine:
        result = engine.step(random_samples((12,)), named, learning_rate=1e-3)
    assert result.metrics == {"loss": 7.0}
    assert result.loss != 7.0


def test_gradients_do_not_leak_into_the_next_step(models: Path) -> None:
    """Two equal steps with learning rate zero report equal losses and norms."""
    samples = random_samples((9, 40))
    with opened(models) as engine:
        first, second = (engine.step(samples, nll, learning_rate=0.0) for _ in range(2))
    assert (first.loss, first.grad_norm) == (second.loss, second.grad_norm)


def test_weight_decay_spares_norms(models: Path) -> None:
    sample = random_samples((12,))[0]
    idle = replace(sample, weights_R=np.zeros_like(sample.weights_R))
    optimizer = OptimizerConfig(weight_decay=0.5, clip_grad=1.0)
    with opened(models, optimizer=optimizer) as engine:
        before = {name: tensor.clone() for name, tensor in engine.hf_tensors()}
        result = engine.step([idle], nll, learning_rate=0.1)
        for name, tensor in engine.hf_tensors():
            kept = 1.0 if "norm" in name else 1.0 - 0.1 * 0.5
            torch.testing.assert_close(tensor, kept * before[name])
    assert (result.loss, result.grad_norm) == (0.0, 0.0)
