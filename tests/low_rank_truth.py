"""What approximations of low rank keep, from outer products and dense eigenvectors: float64."""

import numpy as np

RANK = 3


def second_moment(case_grads, num_cases=None):
    """By one outer product after another."""
    total = 0.0
    for g in case_grads:
        total = total + np.outer(g, g)
    return total / (num_cases or len(case_grads))


def leading(matrix, count):
    """The nearest matrix of that rank."""
    w, v = np.linalg.eigh(matrix)
    count = min(count, len(w))
    return (v[:, -count:] * w[-count:]) @ v[:, -count:].T


def with_diagonal(part, diagonal):
    return part + np.diag(diagonal - np.diag(part))


def low_rank_of(matrix, rank=RANK):
    return with_diagonal(leading(matrix, rank), np.diag(matrix))
