"""Checks of the head's arguments, each with one clear error."""

import torch
from torch import Tensor

from megadistill.head.vocabulary import VocabularyHead


def check_hidden(head: VocabularyHead, hidden_TD: Tensor, temperature: float) -> None:
    """Require finite `[T, D]` rows in the head's own type, and a positive temperature."""
    hidden_size = head.weight_VD.shape[1]
    if hidden_TD.dim() != 2 or hidden_TD.shape[1] != hidden_size:
        raise ValueError(
            f"hidden_TD must be [tokens, {hidden_size}] like the weight, "
            f"found {tuple(hidden_TD.shape)}"
        )
    if hidden_TD.shape[0] == 0:
        raise ValueError("hidden_TD has no rows; drop empty responses before the head")
    if hidden_TD.dtype != head.weight_VD.dtype:
        raise ValueError(f"hidden_TD is {hidden_TD.dtype} but weight_VD is {head.weight_VD.dtype}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, found {temperature}")
    if not bool(torch.isfinite(hidden_TD.detach()).all()):
        raise ValueError("hidden_TD holds NaN or infinity")


def check_ids(head: VocabularyHead, hidden_TD: Tensor, ids_TK: Tensor) -> None:
    """Require int64 ids, one row of them per hidden row, inside the vocabulary."""
    num_tokens = hidden_TD.shape[0]
    if ids_TK.dim() != 2 or ids_TK.shape[0] != num_tokens:
        raise ValueError(f"ids_TK must be [{num_tokens}, K], found {tuple(ids_TK.shape)}")
    if ids_TK.dtype != torch.int64:
        raise ValueError(f"ids must be int64, found {ids_TK.dtype}")
    if ids_TK.shape[1] > head.vocab_size:
        raise ValueError(f"K is {ids_TK.shape[1]} but the vocabulary has {head.vocab_size} ids")
    if ids_TK.numel() and bool(((ids_TK < 0) | (ids_TK >= head.vocab_size)).any()):
        raise ValueError(
            f"ids must be in 0..{head.vocab_size - 1}, found "
            f"{int(ids_TK.min())}..{int(ids_TK.max())}"
        )


def check_targets(head: VocabularyHead, hidden_TD: Tensor, targets_T: Tensor) -> None:
    """Require one int64 id per hidden row, inside the vocabulary."""
    if targets_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"targets_T must be [{hidden_TD.shape[0]}], found {tuple(targets_T.shape)}"
        )
    check_ids(head, hidden_TD, targets_T[:, None])


def check_weights(hidden_TD: Tensor, weights_T: Tensor) -> None:
    """Require one frozen float weight per hidden row."""
    if weights_T.shape != hidden_TD.shape[:1] or not weights_T.is_floating_point():
        raise ValueError(
            f"weights_T must be float [{hidden_TD.shape[0]}], "
            f"found {weights_T.dtype} {tuple(weights_T.shape)}"
        )
    if weights_T.requires_grad:
        raise ValueError("weights_T must be frozen: detach it, no gradient flows through weights")


def check_top_k(head: VocabularyHead, top_k: int) -> None:
    """Require 0 <= K <= vocabulary size."""
    if not 0 <= top_k <= head.vocab_size:
        raise ValueError(f"top_k must be in 0..{head.vocab_size}, found {top_k}")


def check_pair(
    student: VocabularyHead,
    student_hidden_TD: Tensor,
    teacher: VocabularyHead,
    teacher_hidden_TD: Tensor,
) -> None:
    """Require two heads over the same vocabulary and ranks, and as many rows for both."""
    if student_hidden_TD.shape[0] != teacher_hidden_TD.shape[0]:
        raise ValueError(
            f"student and teacher must have the same rows, found {student_hidden_TD.shape[0]} "
            f"and {teacher_hidden_TD.shape[0]}"
        )
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"student and teacher must share one vocabulary, found vocab_size "
            f"{student.vocab_size} and {teacher.vocab_size}"
        )
    if student.num_ranks != teacher.num_ranks:
        raise ValueError(
            f"student and teacher must share one group, found {student.num_ranks} and "
            f"{teacher.num_ranks} ranks"
        )
