"""What `bench_head.py` times: the head, bare products, plain autograd, libraries if installed.

A rival is a function of the problem that runs forward and backward; gradients are left in `.grad`.
Liger (`liger-kernel`) and TRL (`trl`) are optional installs. Liger's scaled cross-entropy is its
SM90 kernel on Hopper, and elsewhere a torch path after verl's; on a GPU that path has its own row.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megadistill.head import VocabularyHead, jsd, logprobs, reverse_kl, score, weighted_nll
from megadistill.losses import top_k
from megadistill.types import MicroBatch

PRODUCTS = ("product: logits", "product: dh", "product: dW")
RECOMPUTE_CHUNK = 256
TRL_VOCABULARY_CHUNK = 32768
TOP_K, TEMPERATURE = 512, 1.5
"""RAFT's."""
SCALED = "liger_kernel.ops.fused_linear_scaled_cross_entropy"


class Problem:
    """Inputs of one size and type, and everything that is timed on them."""

    def __init__(self, num_tokens: int, hidden: int, vocab_size: int, dtype: torch.dtype) -> None:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape, dtype=dtype).normal_(std=scale)

        torch.manual_seed(0)
        spread = 2.0 / hidden**0.5
        self.hidden_TD = normal(num_tokens, hidden).requires_grad_()
        self.weight_VD = normal(vocab_size, hidden, scale=spread).requires_grad_()
        # What Megatron allocates once, and zeroes once a step.
        self.weight_VD.main_grad = torch.zeros(vocab_size, hidden)  # type: ignore[attr-defined]
        self.targets_T = torch.randint(vocab_size, (num_tokens,))
        self.weights_T = torch.randn(num_tokens)
        self.teacher_TD = normal(num_tokens, hidden)
        self.head = VocabularyHead(
            weight_VD=self.weight_VD, vocab_size=vocab_size, accumulate_into_main_grad=True
        )
        self.teacher = VocabularyHead(
            weight_VD=normal(vocab_size, hidden, scale=spread), vocab_size=vocab_size
        )

    @cached_property
    def batch(self) -> MicroBatch:
        """The rows of RAFT's loss, with what it needs of the teacher."""
        size = min(TOP_K, self.head.vocab_size)
        targets_T = self.targets_T
        top = score(
            self.teacher,
            self.teacher_TD,
            targets_T[:, None][:, :0],
            temperature=TEMPERATURE,
            top_k=size,
        )
        return MicroBatch(
            token_ids_T=targets_T,
            position_ids_T=targets_T,
            cu_seqlens=targets_T,
            rows_W=targets_T,
            targets_W=targets_T,
            weights_W=self.weights_T,
            divergence_weights_W=self.weights_T,
            sample_ids=(),
            top_ids_WK=top.top_ids_TK,
            top_logprobs_WK=top.top_logprobs_TK,
        )

    def clear(self) -> None:
        self.hidden_TD.grad = self.weight_VD.grad = None

    def implementations(
        self, group: dist.ProcessGroup | None = None
    ) -> dict[str, Callable[[], object]]:
        head = VocabularyHead(
            weight_VD=self.weight_VD,
            vocab_size=self.head.vocab_size,
            group=group,
            accumulate_into_main_grad=True,
        )
        teacher = VocabularyHead(
            weight_VD=self.teacher.weight_VD, vocab_size=head.vocab_size, group=group
        )
        ids_T1, batch = self.targets_T[:, None], self.batch
        pair = head, self.hidden_TD, teacher, self.teacher_TD, self.weights_T

        def backward(loss: Tensor) -> None:
            torch.autograd.backward(loss)

        return {
            "one-pass": lambda: backward(
                weighted_nll(head, self.hidden_TD, self.targets_T, self.weights_T)[0]
            ),
            "two-pass": lambda: backward(
                (logprobs(head, self.hidden_TD, ids_T1)[:, 0] * self.weights_T).sum()
            ),
            "score": lambda: score(teacher, self.teacher_TD, ids_T1),
            "score top-64": lambda: score(teacher, self.teacher_TD, ids_T1, top_k=64),
            "reverse KL": lambda: backward(reverse_kl(*pair)[0]),
            "JSD": lambda: backward(jsd(*pair)[0]),
            "top-512 KL": lambda: backward(
                top_k(head, self.hidden_TD, batch, temperature=TEMPERATURE)[0]
            ),
        }

    def products(self) -> dict[str, Callable[[], object]]:
        """Three bare products into memory that is there already."""
        hidden_TD, weight_VD = self.hidden_TD.detach(), self.weight_VD.detach()
        tile_TV = hidden_TD.new_empty(len(hidden_TD), len(weight_VD)).normal_()
        out_TV, out_TD = torch.empty_like(tile_TV), torch.empty_like(hidden_TD)
        out_VD = torch.empty_like(weight_VD)
        return {
            PRODUCTS[0]: lambda: torch.mm(hidden_TD, weight_VD.t(), out=out_TV),
            PRODUCTS[1]: lambda: torch.mm(tile_TV, weight_VD, out=out_TD),
            PRODUCTS[2]: lambda: torch.mm(tile_TV.t(), hidden_TD, out=out_VD),
        }

    def error(self) -> float:
        """Largest difference of a log-prob from float64 on the same inputs, over up to 2048 rows."""
        hidden_TD, targets_T = self.hidden_TD.detach()[:2048], self.targets_T[:2048]
        found_T = score(self.head, hidden_TD, targets_T[:, None]).logprobs_TK[:, 0]
        weight_VD, worst = self.weight_VD.detach().double(), 0.0
        for start in range(0, len(found_T), 64):
            rows = slice(start, start + 64)
            logits = hidden_TD[rows].double() @ weight_VD.t()
            expected = logits.log_softmax(-1).gather(1, targets_T[rows, None]).squeeze(1)
            worst = max(worst, float((found_T[rows] - expected).abs().max()))
        return worst


class SentBytes(TorchDispatchMode):
    """Count the bytes that this rank hands to collectives."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sent = args[1] if "allgather" in func.__name__ else args[0]
            self.total += sum(tensor.nbytes for tensor in sent)
        return func(*args, **(kwargs or {}))


def communication() -> dict[str, float]:
    """Bytes a token and rank for each row; their number does not depend on ranks or shard."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with torch.device("cpu"):
        problem = Problem(64, 16, 512, torch.float32)
        found = {}
        for name, function in problem.implementations(dist.group.WORLD).items():
            with SentBytes() as mode:
                function()
            found[name] = mode.total / 64
    dist.destroy_process_group()
    return found


def library(module: str, name: str) -> Any:  # whatever the library defines there
    """Something of an optional library; ModuleNotFoundError where it is not installed."""
    return getattr(import_module(module), name)


def naive(p: Problem) -> None:
    """`log_softmax().gather()` on all logits."""
    _dense(p, slice(0, len(p.targets_T))).backward()


def naive_top_k(p: Problem) -> None:
    """RAFT's KL from all logits: a soft-max over those at the teacher's ids."""
    logits = (p.hidden_TD @ p.weight_VD.t()).float() / TEMPERATURE
    student_TK = torch.log_softmax(logits.gather(1, p.batch.top_ids_WK), -1)
    teacher_TK = torch.log_softmax(p.batch.top_logprobs_WK, -1)
    kl_T = (teacher_TK.exp() * (teacher_TK - student_TK)).sum(-1)
    (TEMPERATURE**2 * p.weights_T * kl_T).sum().backward()


def chunk_recompute(p: Problem) -> None:
    """The same in chunks that backward makes again."""
    for start in range(0, len(p.targets_T), RECOMPUTE_CHUNK):
        rows = slice(start, start + RECOMPUTE_CHUNK)
        checkpoint(_dense, p, rows, use_reentrant=False).backward()


def _dense(p: Problem, rows: slice) -> Tensor:
    logits = (p.hidden_TD[rows] @ p.weight_VD.t()).float()
    picked_C1 = torch.log_softmax(logits, -1).gather(1, p.targets_T[rows, None])
    return -(p.weights_T[rows] * picked_C1.squeeze(1)).sum()


def liger_scaled_ce(p: Problem) -> None:
    """Per-token NLL and entropy, any upstream gradient."""
    function = library(SCALED, "LigerFusedLinearScaledCrossEntropyFunction")
    nll_T, _ = function.apply(p.hidden_TD, p.weight_VD, p.targets_T, return_entropy=True)
    (nll_T * p.weights_T).sum().backward()


def liger_torch_path(p: Problem) -> None:
    """Liger's torch path, which follows verl's."""
    function = library(SCALED, "_FusedLinearPPOFallbackFunction")
    nll_T, _ = function.apply(p.hidden_TD, p.weight_VD, p.targets_T, 1.0, -100, True)
    (nll_T * p.weights_T).sum().backward()


def liger_jsd(p: Problem) -> None:
    """Mean JSD, one pass, chunks of 1024 rows."""
    loss = library("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")(
        weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False
    )
    loss(p.hidden_TD, p.weight_VD, p.teacher_TD, p.teacher.weight_VD, p.targets_T).backward()


def trl_logprobs(p: Problem) -> None:
    """Per-token log-probs and entropy, any upstream gradient."""
    function = library("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    logprobs_T, *_ = function.apply(
        p.hidden_TD,
        p.weight_VD,
        None,
        p.targets_T,
        1.0,
        TRL_VOCABULARY_CHUNK,
        None,
        1.0,
        ("entropy",),
    )
    (logprobs_T * p.weights_T).sum().backward()


def trl_divergence(p: Problem, beta: float) -> None:
    """Per-token divergence, any upstream gradient."""
    function = library("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    inputs = p.hidden_TD, p.weight_VD, None, p.teacher_TD, p.teacher.weight_VD, None
    values_T, _ = function.apply(*inputs, beta)
    (values_T * p.weights_T).sum().backward()


RIVALS: Mapping[str, Callable[[Problem], None]] = {
    "naive": naive,
    "naive top-512 KL": naive_top_k,
    "chunk-recompute": chunk_recompute,
    "Liger scaled CE": liger_scaled_ce,
    "Liger torch path (verl)": liger_torch_path,
    "Liger JSD": liger_jsd,
    "TRL chunked log-prob": trl_logprobs,
    "TRL chunked reverse KL": lambda p: trl_divergence(p, 1.0),
    "TRL chunked JSD": lambda p: trl_divergence(p, 0.5),
}
