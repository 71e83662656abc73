"""Measures of the structure of embeddings within a modality and between two, on plain arrays.

Arrays are ``(n, d)`` with a finite row for each item; row i of two arrays is the same item. Rows are put on
the unit sphere where a docstring says "cosine" or "unit rows"; a row of zeros stays zero there.

All raise ``TypeError`` for what is no array of numbers, and ``ValueError`` for a wrong shape, fewer than two
rows, or values that aren't finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mmenvs.checks import integer_in

Array = npt.NDArray[Any]


# ---------------------------------------------------------------------------------------------------------
# Structure between modalities
# ---------------------------------------------------------------------------------------------------------


def retrieval(
    a: Array, b: Array, ks: Sequence[int] = (1, 5, 10), pool: int = 256, groups: Array | None = None
) -> dict[str, Any]:
    """Recall at k by cosine in both directions (Radford et al. 2021, "Learning transferable visual models").

    Rows are dealt to pools of ``pool`` in their order; rows that don't fill a pool are left out. Equal
    similarities are put in random order, and the expected recall is returned: k / pool if all are equal.

    Args:
        a, b: ``(n, d)`` each, of one width.
        ks: from 1 to ``pool``.
        pool: how many candidates there are, 2 to n.
        groups: ids ``(n,)`` of what is told; any candidate of the query's group is right. By default
            nothing but the query's own row is.

    Returns:
        ``{"a_to_b": {"recall@1": ...}, "b_to_a": {...}, "pool": pool, "queries": rows used}``.
    """
    a, b = _pair(a, b, one_width=True)
    n = len(a)
    integer_in("pool", pool, 2, n)
    for k in ks:
        integer_in("ks", k, 1, pool)
    ids = np.arange(n) if groups is None else np.asarray(groups)
    if ids.shape != (n,):
        raise ValueError(f"groups must have shape ({n},), an id for each row, got {ids.shape}")
    a, b = _unit(a), _unit(b)
    found = np.zeros((2, max(ks)))
    starts = range(0, n - pool + 1, pool)
    for start in starts:
        part = slice(start, start + pool)
        # Rounded, so that equal rows are equal whatever order the products were added in.
        similarity = (a[part] @ b[part].T).round(12)
        right = ids[part, None] == ids[None, part]
        found[0] += _found(similarity, right, max(ks))
        found[1] += _found(similarity.T, right, max(ks))
    queries = len(starts) * pool
    recalls = [{f"recall@{k}": float(row[k - 1] / queries) for k in ks} for row in found]
    return {"a_to_b": recalls[0], "b_to_a": recalls[1], "pool": pool, "queries": queries}


def _found(similarity: Array, right: npt.NDArray[np.bool_], places: int) -> Array:
    """How many queries are expected to meet a right candidate among their first 1, 2, ... ``places``."""
    best = np.where(right, similarity, -np.inf).max(1, keepdims=True)
    ahead = (~right & (similarity > best)).sum(1)
    wrong = (~right & (similarity == best)).sum(1)
    tied = wrong + (right & (similarity == best)).sum(1)
    missed = np.ones(len(similarity))
    found = np.empty(places)
    for place in range(places):
        drawn = place - ahead  # how many of the tied ones stand before this place
        chance = (wrong - drawn) / np.maximum(tied - drawn, 1)
        missed *= np.where(drawn < 0, 1.0, chance.clip(0.0, 1.0))
        found[place] = (1.0 - missed).sum()
    return found


def alignment(a: Array, b: Array) -> float:
    """Mean squared distance of the two unit rows of an item, 0 (best) to 4; 2 for unrelated ones.

    Wang and Isola 2020, "Understanding contrastive representation learning through alignment and
    uniformity on the hypersphere", with their exponent 2.
    """
    a, b = _pair(a, b, one_width=True)
    return float(((_unit(a) - _unit(b)) ** 2).sum(1).mean())


def uniformity(a: Array) -> float:
    """How evenly unit rows fill the sphere: log mean of ``exp(-2 |x - y|^2)`` over pairs (Wang and Isola 2020).

    0 if all rows are the same, about -4 (best) for many rows spread evenly in many dimensions.
    """
    distances = torch.pdist(torch.from_numpy(_unit(_matrix("a", a))))
    return float(distances.square().mul(-2).exp().mean().log())


def modality_gap(a: Array, b: Array) -> float:
    """Distance of the centres of the unit rows of two modalities, 0 to 2.

    Liang et al. 2022, "Mind the gap: understanding the modality gap in multi-modal contrastive
    representation learning".
    """
    a, b = _pair(a, b, one_width=True)
    return float(np.linalg.norm(_unit(a).mean(0) - _unit(b).mean(0)))


def cka(a: Array, b: Array) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, "Similarity of neural network
    representations revisited"), 1 where two embeddings are alike up to rotation, shift and scale.

    Made of the unbiased estimate of HSIC (Song et al. 2012), which is 0 on average for unrelated
    embeddings however wide they are, and so may come out slightly below 0. Widths may differ.
    0 if all rows of one side are equal.

    Args:
        a, b: ``(n, d)`` and ``(n, e)``, n at least 4.
    """
    a, b = (_centred(x) for x in _pair(a, b, least=4))
    if not a.any() or not b.any():
        return 0.0
    a, b = _without_mean(a @ a.T), _without_mean(b @ b.T)
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def _without_mean(gram: Array) -> Array:
    """A Gram matrix without its diagonal, centred so that products of two estimate HSIC without bias."""
    n = len(gram)
    np.fill_diagonal(gram, 0.0)
    rows = gram.sum(0) / (n - 2)
    centred = gram - rows[:, None] - rows[None] + rows.sum() / (n - 1)
    np.fill_diagonal(centred, 0.0)
    return centred


# ---------------------------------------------------------------------------------------------------------
# Structure within a modality
# ---------------------------------------------------------------------------------------------------------


def effective_rank(a: Array) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007, "The effective rank").

    From 1, if the rows lie on one line, to d, if they spread evenly in all directions. Rows are centred
    first, so that a common offset is no direction; 0 if all rows are equal.
    """
    centred = _centred(_matrix("a", a))
    if not centred.any():
        return 0.0
    values = np.linalg.svd(centred, compute_uv=False)
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def linear_probe(train_x: Array, train_y: Array, test_x: Array, test_y: Array, l2: float = 1e-4) -> float:
    """Test accuracy of logistic regression on frozen embeddings (Alain and Bengio 2016, "Understanding
    intermediate layers using linear classifier probes"), fitted by L-BFGS on standardised columns.

    Args:
        train_x, test_x: ``(n, d)`` and ``(m, d)``.
        train_y, test_y: class ids ``(n,)``, ``(m,)``; or bool ``(n, c)``, ``(m, c)``, a yes-no question in each
            column, whose accuracies are averaged.
        l2: weight of half the squared weights beside the mean loss.
    """
    train_x, test_x = _both(train_x, test_x)
    train_y, test_y = _answers(train_y, test_y, len(train_x), len(test_x))
    mean, scale = train_x.mean(0), train_x.std(0)
    scale[scale <= 1e-6 * np.abs(train_x).max(0)] = 1.0
    x, x_test = (torch.from_numpy((part - mean) / scale).float() for part in (train_x, test_x))
    y = torch.from_numpy(train_y)
    outputs = train_y.shape[1] if train_y.ndim == 2 else int(max(train_y.max(), test_y.max())) + 1
    weight = torch.zeros(x.shape[1], outputs, requires_grad=True)
    bias = torch.zeros(outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weight + bias
        if y.dim() == 2:
            fit = F.binary_cross_entropy_with_logits(logits, y.float()) * outputs
        else:
            fit = F.cross_entropy(logits, y)
        total = fit + 0.5 * l2 * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        logits = (x_test @ weight + bias).numpy()
    said = logits > 0 if test_y.ndim == 2 else logits.argmax(1)
    return float((said == test_y).mean())


def knn_probe(train_x: Array, train_y: Array, test_x: Array, test_y: Array, k: int = 10) -> float:
    """Test accuracy of the k nearest neighbours by cosine, weighted by ``exp(cosine / 0.07)``.

    Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination". Arguments
    are as for :func:`linear_probe`; k is at most n.
    """
    train_x, test_x = _both(train_x, test_x)
    train_y, test_y = _answers(train_y, test_y, len(train_x), len(test_x))
    integer_in("k", k, 1, len(train_x))
    similarity = _unit(test_x) @ _unit(train_x).T
    near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]  # (m, k)
    weights = np.exp(np.take_along_axis(similarity, near, 1) / 0.07)
    classes = int(max(train_y.max(), test_y.max())) + 1
    votes = train_y if train_y.ndim == 2 else np.eye(classes, dtype=np.bool_)[train_y]
    share = np.einsum("mk,mkc->mc", weights / weights.sum(1, keepdims=True), votes[near])
    said = share > 0.5 if test_y.ndim == 2 else share.argmax(1)
    return float((said == test_y).mean())


# ---------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------


def _matrix(name: str, x: Array, least: int = 2) -> npt.NDArray[np.float64]:
    """``x`` as float64 ``(n, d)`` with at least ``least`` rows, all finite."""
    x = np.asarray(x)
    if x.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of numbers, got dtype {x.dtype}")
    if x.ndim != 2 or len(x) < least or x.shape[1] < 1:
        raise ValueError(f"{name} must have shape (n, d) with n >= {least} and d >= 1, got {x.shape}")
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x).all(1))[0])
        raise ValueError(f"{name} must be finite, row {row} is not")
    return x.astype(np.float64)


def _pair(a: Array, b: Array, one_width: bool = False, least: int = 2) -> tuple[Array, Array]:
    a, b = _matrix("a", a, least), _matrix("b", b, least)
    if len(a) != len(b):
        raise ValueError(f"a and b must have a row for each item, got {len(a)} and {len(b)} rows")
    if one_width and a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be of one width, got {a.shape[1]} and {b.shape[1]}")
    return a, b


def _both(train_x: Array, test_x: Array) -> tuple[Array, Array]:
    train_x, test_x = _matrix("train_x", train_x), _matrix("test_x", test_x)
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            f"train_x and test_x must be of one width, got {train_x.shape[1]} and {test_x.shape[1]}"
        )
    return train_x, test_x


def _answers(train_y: Array, test_y: Array, n: int, m: int) -> tuple[Array, Array]:
    """Class ids ``(n,)`` as int64, or answers to yes-no questions ``(n, c)`` bool."""
    train_y, test_y = np.asarray(train_y), np.asarray(test_y)
    for name, y, rows in (("train_y", train_y, n), ("test_y", test_y, m)):
        ids = y.shape == (rows,) and y.dtype.kind in "iu" and y.min() >= 0
        questions = y.ndim == 2 and len(y) == rows and y.shape[1] >= 1 and y.dtype == np.bool_
        if not ids and not questions:
            raise ValueError(
                f"{name} must be class ids ({rows},) of 0 or more, or bool ({rows}, c), "
                f"got {y.dtype} {y.shape}"
            )
    if train_y.shape[1:] != test_y.shape[1:]:
        raise ValueError(f"train_y and test_y must be alike, got {train_y.shape} and {test_y.shape}")
    return (train_y, test_y) if train_y.ndim == 2 else (train_y.astype(np.int64), test_y.astype(np.int64))


def _unit(x: Array) -> Array:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1.0)


def _centred(x: Array) -> Array:
    """``x`` without its mean row; zeros if all rows are equal but for the rounding of float32."""
    centred = x - x.mean(0)
    return centred if np.abs(centred).max() > 1e-6 * np.abs(x).max() else np.zeros_like(x)
