"""What a step logs of its rollouts and of its loss."""

from collections.abc import Mapping, Sequence

import numpy as np

from megadistill.types import FloatArray, Scored


def branch_metrics(
    group: Sequence[Scored],
    scores: Sequence[float],
    num_kept: int,
    importance_R: Sequence[FloatArray],
    rule_R: Sequence[FloatArray],
) -> dict[str, float]:
    """The diagnostics of a branch at one step, from the weights of each of its responses."""
    importance = np.concatenate(importance_R).astype(np.float64)
    low, median, high = np.quantile(scores, [0.1, 0.5, 0.9])
    return {
        "selected_fraction": num_kept / len(group),
        "score_mean": float(np.mean(scores)),
        "score_p10": float(low),
        "score_p50": float(median),
        "score_p90": float(high),
        "importance": float(importance.mean()),
        "masked_fraction": float((importance == 0).mean()),
        "counted": float(np.concatenate(rule_R).mean(dtype=np.float64)),
        **rollout_metrics(group),
        **_support_metrics(group),
    }


def _support_metrics(group: Sequence[Scored]) -> dict[str, float]:
    """Where both sides' most probable ids are known: how far they overlap, and the teacher's mass."""
    overlaps, masses = [], []
    for item in group:
        student, teacher = item.student.top_k, item.teacher.top_k
        if teacher is not None:
            masses.append(np.exp(teacher.logprobs_RK.astype(np.float64)).sum(axis=1))
        if student is not None and teacher is not None:
            size = min(student.ids_RK.shape[1], teacher.ids_RK.shape[1])
            ids = np.sort(np.hstack([student.ids_RK[:, :size], teacher.ids_RK[:, :size]]))
            overlaps.append((ids[:, 1:] == ids[:, :-1]).sum(axis=1) / size)
    named = {"top_k_overlap": overlaps, "teacher_top_k_mass": masses}
    return {name: float(np.concatenate(v).mean()) for name, v in named.items() if v}


def token_means(sums: Mapping[str, float]) -> dict[str, float]:
    """What a loss has summed over tokens, as means: entropy, divergence in nats, masses."""
    per = {
        "entropy": ("train/entropy_sum", "train/rows"),
        "divergence": ("divergence/nats_sum", "divergence/rows"),
        "student_mass": ("divergence/student_mass_sum", "divergence/rows"),
        "teacher_mass": ("divergence/teacher_mass_sum", "divergence/rows"),
    }
    return {
        name: sums[key] / sums[rows]
        for name, (key, rows) in per.items()
        if sums.get(rows) and key in sums
    }


def rollout_metrics(group: Sequence[Scored]) -> dict[str, float]:
    """Diagnostics of a group of rollouts; token means unless the name says otherwise."""
    gap = np.concatenate([item.gap_R for item in group]).astype(np.float64)
    student = np.concatenate([item.student_logprobs_R for item in group])
    rollout = np.concatenate([item.rollout.logprobs_R for item in group])
    lengths = [len(item.gap_R) for item in group]
    capped = [item.rollout.finish_reason == "length" for item in group]
    return {
        "gap": float(gap.mean()),
        "gap_absolute": float(np.abs(gap).mean()),
        "gap_positive": float(np.maximum(gap, 0).mean()),
        "gap_exp": float(np.exp(gap).mean()),
        "log_ratio_absolute": float(np.abs(student - rollout).mean()),
        "response_tokens": float(np.mean(lengths)),
        "capped_fraction": float(np.mean(capped)),
    }
