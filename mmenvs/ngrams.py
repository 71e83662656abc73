"""Compiled counting of n-grams, under the caption scores of ``mmenvs.rewards``.

Captions are rows of word ids padded with 0, ``(m, L)`` int64; references ``(m, R, L)`` int64, and a
reference that begins with 0 is missing, and so are those after it. Results go into ``out`` (m,) float64.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, uint64

from mmenvs.text import END

ORDER = 4  # longest n-gram
ID_BITS = 16  # bits of a word id within an n-gram's key


@njit(cache=True, nogil=True)
def caption_length(ids, count_end):
    """Number of words before the padding; before the end token unless it counts as a word."""
    for i in range(ids.size):
        if ids[i] == 0 or (ids[i] == END and not count_end):
            return i
    return ids.size


@njit(cache=True, nogil=True)
def ngrams(ids, length, keys, counts):
    """Write the distinct n-grams of a caption, as ascending keys, with their counts; returns how many.

    A key holds the words' ids side by side, the last word lowest, so shorter n-grams have smaller keys.
    """
    total = 0
    for i in range(length):
        key = uint64(0)
        for n in range(min(ORDER, length - i)):
            key = (key << uint64(ID_BITS)) | uint64(ids[i + n])
            keys[total] = key
            total += 1
    keys[:total].sort()
    distinct = 0
    for i in range(total):
        if distinct and keys[distinct - 1] == keys[i]:
            counts[distinct - 1] += 1
        else:
            keys[distinct] = keys[i]
            counts[distinct] = 1
            distinct += 1
    return distinct


@njit(inline="always")
def order_of(key):
    """Number of words of the n-gram with this key, less one."""
    if key < uint64(1 << 16):
        return 0
    if key < uint64(1 << 32):
        return 1
    return 2 if key < uint64(1 << 48) else 3


@njit(cache=True, nogil=True)
def bleu_rows(captions, references, out):
    room = ORDER * max(captions.shape[1], references.shape[2])
    keys, counts = np.empty(room, np.uint64), np.empty(room, np.int64)
    ref_keys, ref_counts = np.empty(room, np.uint64), np.empty(room, np.int64)
    clip = np.empty(room, np.int64)
    correct = np.empty(ORDER, np.int64)
    for j in range(captions.shape[0]):
        length = caption_length(captions[j], False)
        n_keys = ngrams(captions[j], length, keys, counts)
        clip[:n_keys] = 0
        closest = -1
        for r in range(references.shape[1]):
            if references[j, r, 0] == 0:
                break
            ref_length = caption_length(references[j, r], False)
            gap, best = abs(ref_length - length), abs(closest - length)
            if closest < 0 or gap < best or (gap == best and ref_length < closest):
                closest = ref_length
            n_ref = ngrams(references[j, r], ref_length, ref_keys, ref_counts)
            b = 0
            for a in range(n_keys):
                while b < n_ref and ref_keys[b] < keys[a]:
                    b += 1
                if b < n_ref and ref_keys[b] == keys[a]:
                    clip[a] = max(clip[a], ref_counts[b])
        correct[:] = 0
        for a in range(n_keys):
            correct[order_of(keys[a])] += min(clip[a], counts[a])
        # The two constants are those of the COCO caption evaluation, so that scores are comparable.
        product = 1.0
        for n in range(ORDER):
            product *= (correct[n] + 1e-15) / (max(0, length - n) + 1e-9)
        ratio = (length + 1e-15) / (closest + 1e-9)
        out[j] = product ** (1.0 / ORDER) * (math.exp(1.0 - 1.0 / ratio) if ratio < 1.0 else 1.0)


@njit(cache=True, nogil=True)
def rouge_rows(captions, references, out):
    beta2 = 1.2 * 1.2
    before = np.empty(captions.shape[1] + 1, np.int64)
    here = np.empty(captions.shape[1] + 1, np.int64)
    for j in range(captions.shape[0]):
        length = caption_length(captions[j], False)
        precision = 0.0
        recall = 0.0
        for r in range(references.shape[1]):
            if references[j, r, 0] == 0:
                break
            ref_length = caption_length(references[j, r], False)
            # Longest common subsequence, one row of the table at a time.
            before[:] = 0
            here[0] = 0
            for b in range(ref_length):
                for a in range(length):
                    if captions[j, a] == references[j, r, b]:
                        here[a + 1] = before[a] + 1
                    else:
                        here[a + 1] = max(here[a], before[a + 1])
                before[: length + 1] = here[: length + 1]
            if length and ref_length:
                precision = max(precision, before[length] / length)
                recall = max(recall, before[length] / ref_length)
        if precision > 0.0:
            out[j] = (1.0 + beta2) * precision * recall / (recall + beta2 * precision)
        else:
            out[j] = 0.0


@njit(cache=True, nogil=True)
def repetition_rows(captions, order, out):
    room = ORDER * captions.shape[1]
    keys, counts = np.empty(room, np.uint64), np.empty(room, np.int64)
    for j in range(captions.shape[0]):
        length = caption_length(captions[j], False)
        distinct = 0
        for a in range(ngrams(captions[j], length, keys, counts)):
            if order_of(keys[a]) == order - 1:
                distinct += 1
        total = length - order + 1
        out[j] = 1.0 - distinct / total if total > 0 else 0.0


@njit(cache=True, nogil=True)
def document_ngrams(references, out):
    """Write the distinct n-grams of every document into ``out``, one document after the other."""
    room = ORDER * references.shape[1] * references.shape[2]
    document = np.empty(room, np.uint64)
    counts = np.empty(ORDER * references.shape[2], np.int64)
    written = 0
    for j in range(references.shape[0]):
        total = 0
        for r in range(references.shape[1]):
            length = caption_length(references[j, r], True)
            total += ngrams(references[j, r], length, document[total:], counts)
        document[:total].sort()
        for a in range(total):
            if a == 0 or document[a] != document[a - 1]:
                out[written] = document[a]
                written += 1
    return written


@njit(cache=True, nogil=True)
def weigh(ids, df_keys, df_counts, log_documents, keys, weights, counts, norms):
    """Write the tf-idf weights of a caption's n-grams and their norms; returns the number of n-grams."""
    n_keys = ngrams(ids, caption_length(ids, True), keys, counts)
    norms[:] = 0.0
    for a in range(n_keys):
        place = np.searchsorted(df_keys, keys[a])
        documents = 1
        if place < df_keys.size and df_keys[place] == keys[a]:
            documents = df_counts[place]
        weights[a] = counts[a] * (log_documents - math.log(documents))
        norms[order_of(keys[a])] += weights[a] * weights[a]
    norms[:] = np.sqrt(norms)
    return n_keys


@njit(cache=True, nogil=True)
def cider_rows(captions, references, df_keys, df_counts, log_documents, sigma, out):
    room = ORDER * max(captions.shape[1], references.shape[2])
    keys, weights = np.empty(room, np.uint64), np.empty(room, np.float64)
    ref_keys, ref_weights = np.empty(room, np.uint64), np.empty(room, np.float64)
    counts = np.empty(room, np.int64)
    norms, ref_norms, dots = np.empty(ORDER), np.empty(ORDER), np.empty(ORDER)
    for j in range(captions.shape[0]):
        n_keys = weigh(captions[j], df_keys, df_counts, log_documents, keys, weights, counts, norms)
        length = caption_length(captions[j], True)
        total = 0.0
        n_references = 0
        for r in range(references.shape[1]):
            if references[j, r, 0] == 0:
                break
            n_references += 1
            n_ref = weigh(
                references[j, r], df_keys, df_counts, log_documents, ref_keys, ref_weights, counts, ref_norms
            )
            dots[:] = 0.0
            b = 0
            for a in range(n_keys):
                while b < n_ref and ref_keys[b] < keys[a]:
                    b += 1
                if b < n_ref and ref_keys[b] == keys[a]:
                    dots[order_of(keys[a])] += min(weights[a], ref_weights[b]) * ref_weights[b]
            # Lengths are compared in bigrams, which differs from words for captions of no word only.
            gap = max(length - 1, 0) - max(caption_length(references[j, r], True) - 1, 0)
            penalty = math.exp(-(gap * gap) / (2.0 * sigma * sigma))
            for n in range(ORDER):
                if norms[n] > 0.0 and ref_norms[n] > 0.0:
                    total += dots[n] / (norms[n] * ref_norms[n]) * penalty
        out[j] = 10.0 * total / (ORDER * n_references)
