"""The cache of embeddings: what is stored comes back, whoever wrote it and whatever happened to the files."""

import copy
import errno
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_intdigest

from mmenvs.embeddings import cache as module
from mmenvs.embeddings import shards
from mmenvs.embeddings.cache import EmbeddingCache
from mmenvs.embeddings.keys import hash_rows, pool_keys

ONE, OTHER = "a" * 32, "b" * 32


def some(n, dim, seed=0):
    """Keys and the values that belong to them."""
    keys = np.random.default_rng(seed).integers(0, 2**63, (n, 2), dtype=np.uint64)
    return keys, value_of(keys, dim)


def value_of(keys, dim):
    return ((keys[:, :1] % np.uint64(9973)) + np.arange(dim, dtype=np.uint64)).astype(np.float32)


def files(folder):
    return sorted((folder / ONE).glob("*.shard"))


def holds(section, keys):
    """How many of the keys are there; those that are have their values."""
    values, hit = section.lookup(keys)
    np.testing.assert_array_equal(values[hit], value_of(keys[hit], section.dim))
    assert not values[~hit].any()
    return int(hit.sum())


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 70),
    batches=st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=8),
    asked=st.lists(st.integers(0, 60), max_size=40),
)
def test_it_is_a_dict(dim, batches, asked):
    section, expected = EmbeddingCache().section(ONE, dim), set()
    for batch in batches:
        # Few first halves, so that keys differ in the second one too.
        keys = np.array([(i % 7, i) for i in batch], np.uint64).reshape(-1, 2)
        section.store(keys, value_of(keys, dim))
        expected |= set(batch)
    keys = np.array([(i % 7, i) for i in asked], np.uint64).reshape(-1, 2)
    values, hit = section.lookup(keys)
    assert hit.tolist() == [i in expected for i in asked]
    np.testing.assert_array_equal(values[hit], value_of(keys[hit], dim))
    assert not values[~hit].any() and len(section) == len(expected)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 6), st.integers(1, 9), st.integers(1, 5)),
    dtype=st.sampled_from([np.uint8, np.int64, np.float32]),
    seed=st.integers(0, 99),
)
def test_keys_are_xxh3_of_the_bytes(shape, dtype, seed):
    rows = np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)
    for array in (rows, rows.transpose(0, 2, 1)):
        keys = hash_rows(array)
        assert keys.shape == (len(rows), 2) and keys.dtype == np.uint64
        for key, row in zip(keys, array, strict=True):
            assert int.from_bytes(key.tobytes(), "big") == xxh3_128_intdigest(row.tobytes())


def test_a_folder_without_a_name_is_refused():
    with pytest.raises(ValueError, match="must name a folder, got ''"):
        EmbeddingCache("")


def test_the_first_value_of_a_key_stays():
    section = EmbeddingCache().section(ONE, 2)
    keys = np.array([[1, 1], [1, 1], [2, 2]], np.uint64)
    section.store(keys, np.array([[1, 1], [2, 2], [3, 3]], np.float32))
    section.store(keys[:1], np.array([[9, 9]], np.float32))
    assert section.lookup(keys)[0].tolist() == [[1, 1], [1, 1], [3, 3]] and len(section) == 2


def test_encoders_and_pools_do_not_mix():
    cache = EmbeddingCache()
    keys = pool_keys("train", np.arange(5))
    cache.section(ONE, 3).store(keys, value_of(keys, 3))
    assert not cache.section(OTHER, 3).lookup(keys)[1].any()
    assert not cache.section(ONE, 4).lookup(keys)[1].any()
    assert not cache.section(ONE, 3).lookup(pool_keys("test", np.arange(5)))[1].any()
    assert cache.section(ONE, 3).lookup(keys)[1].all()


@pytest.mark.parametrize("dim", [1, 2, 256])
def test_on_disk_it_outlives_the_process_and_shards_are_filled_up(tmp_path, dim):
    keys, values = some(3000, dim)
    for begin in range(0, 3000, 1000):
        with_some = EmbeddingCache(tmp_path)
        with_some.section(ONE, dim).store(keys[begin : begin + 1000], values[begin : begin + 1000])
        with_some.close()
    assert holds(EmbeddingCache(tmp_path).section(ONE, dim), keys) == 3000
    # Later processes go on with the shard of the first.
    assert len(files(tmp_path)) == 1
    assert EmbeddingCache(tmp_path).nbytes == files(tmp_path)[0].stat().st_size


def test_header_is_as_documented(tmp_path):
    cache = EmbeddingCache(tmp_path)
    cache.section(ONE, 3).store(*some(2, 3))
    cache.close()
    data = files(tmp_path)[0].read_bytes()
    assert data[:8] == b"MMRLEMB1" and data[8:16] == bytes([3, 0, 0, 0, 1, 0, 0, 0])
    assert data[16:48] == ONE.encode() and len(data) == 64 + 2 * 40
    keys, values = some(2, 3)
    assert data[64 + 8 : 64 + 24] == keys[0].tobytes() and data[64 + 24 : 64 + 36] == values[0].tobytes()


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_oldest_go_when_the_budget_is_used_up(tmp_path, on_disk):
    dim = 1000
    cache = EmbeddingCache(tmp_path if on_disk else None, budget_mb=1)
    section, (keys, values) = cache.section(ONE, dim), some(1000, dim)
    for i in range(0, 1000, 50):
        section.store(keys[i : i + 50], values[i : i + 50])
        assert cache.nbytes <= 2**20
        assert holds(section, keys[i : i + 50]) == 50 or i % section.rows
    kept = section.lookup(keys)[1]
    assert 150 < kept.sum() < 260 and kept[-30:].all() and not kept[:500].any()
    assert holds(section, keys) == kept.sum()
    assert (np.diff(kept.astype(int)) >= 0).all()  # the newest, without a gap


def write(folder, begin, end, barrier):
    section = EmbeddingCache(folder).section(ONE, 64)
    keys, values = some(4000, 64)
    barrier.wait()
    for i in range(begin, end, 25):
        section.store(keys[i : i + 25], values[i : i + 25])
        holds(section, keys)


def test_two_processes_write_and_read_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    keys, _ = some(4000, 64)
    # Half of their keys are the same.
    workers = [
        context.Process(target=write, args=(tmp_path, *span, barrier)) for span in ((0, 2500), (1500, 4000))
    ]
    for worker in workers:
        worker.start()
    section, seen = EmbeddingCache(tmp_path).section(ONE, 64), 0
    barrier.wait()
    while any(worker.is_alive() for worker in workers):
        section._refreshed = 0.0
        now = holds(section, keys)
        assert now >= seen
        seen = now
        time.sleep(0.01)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    section._refreshed = 0.0
    assert holds(section, keys) == 4000
    # One of its own for each, unless the first had ended when the second began.
    assert len(files(tmp_path)) in (1, 2)


def test_a_shard_that_ends_while_another_process_begins_is_kept_whole(tmp_path, monkeypatch):
    one, two = (EmbeddingCache(tmp_path).section(ONE, 64) for _ in range(2))
    keys, values = some(500, 64)
    one.store(keys[:10], values[:10])
    read = shards.read_shard

    def read_shard(*arguments):
        records = read(*arguments)
        if one._writer is not None:
            # Just after the other has looked.
            one.store(keys[10:400], values[10:400])
            one.cache.close()
        return records

    monkeypatch.setattr(shards, "read_shard", read_shard)
    two.store(keys[400:], values[400:])
    monkeypatch.undo()
    two.cache.close()
    assert holds(EmbeddingCache(tmp_path).section(ONE, 64), keys) == 500
    assert holds(one, keys[:400]) == 400 and len(files(tmp_path)) == 1


def test_others_are_seen_after_a_second(tmp_path, monkeypatch):
    one, two = (EmbeddingCache(tmp_path).section(ONE, 8) for _ in range(2))
    keys, values = some(30, 8)
    one.store(keys[:10], values[:10])
    assert holds(two, keys) == 0
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 0.0)
    assert holds(two, keys) == 10
    one.store(keys[10:20], values[10:20])
    two.store(keys[20:], values[20:])
    assert holds(two, keys) == holds(one, keys) == 30


KILLED = """
import sys, numpy as np
from tests.test_cache import ONE, some
from mmenvs.embeddings.cache import EmbeddingCache
section = EmbeddingCache(sys.argv[1]).section(ONE, 4096)
keys, values = some(2000, 4096)
section.store(keys[:1], values[:1])
print("begun", flush=True)
while True:
    for i in range(1, 2000, 100):
        section.store(keys[i:i + 100], values[i:i + 100])
        print(min(i + 100, 2000), flush=True)
    break
print("end", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("after", [1, 3, 7])
def test_kill_9_in_the_middle_of_writing(tmp_path, after):
    worker = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    stored = 0
    for _ in range(after):
        stored = int(worker.stdout.readline().replace("begun", "1"))
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    keys, values = some(2000, 4096)
    section = EmbeddingCache(tmp_path).section(ONE, 4096)
    there = section.lookup(keys)[1]
    assert holds(section, keys) >= stored and there[:stored].all()
    # Whole up to where it stopped, and work goes on in the same shard.
    assert there.sum() == there.argmin() or there.all()
    section.store(keys, values)
    assert holds(section, keys) == 2000 and len(files(tmp_path)) == 1
    section.cache.close()
    assert holds(EmbeddingCache(tmp_path).section(ONE, 4096), keys) == 2000


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 10 * 56), seed=st.integers(0, 9))
def test_a_write_cut_anywhere_loses_one_entry_at_most(tmp_path_factory, cut, seed):
    folder = tmp_path_factory.mktemp("cut")
    keys, values = some(12, 7, seed)
    cache = EmbeddingCache(folder)
    cache.section(ONE, 7).store(keys[:10], values[:10])
    cache.close()
    path = files(folder)[0]
    os.truncate(path, 64 + cut)
    section = EmbeddingCache(folder).section(ONE, 7)
    assert section.lookup(keys)[1].tolist() == [i < cut // 56 for i in range(12)]
    section.store(keys, values)
    section.cache.close()
    assert holds(EmbeddingCache(folder).section(ONE, 7), keys) == 12


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 64 + 10 * 56 - 1), bit=st.integers(0, 7))
def test_corrupted_bytes_are_found_named_and_mended(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("corrupt")
    keys, values = some(10, 7)
    cache = EmbeddingCache(folder)
    cache.section(ONE, 7).store(keys, values)
    cache.close()
    path = files(folder)[0]
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=f"{path.name}' is corrupt"):
        section = EmbeddingCache(folder).section(ONE, 7)
    lost = [] if place < 64 else [(place - 64) // 56]
    assert section.lookup(keys)[1].tolist() == [place >= 64 and i not in lost for i in range(10)]
    holds(section, keys)
    section.store(keys, values)
    section.cache.close()
    assert holds(EmbeddingCache(folder).section(ONE, 7), keys) == 10  # without a warning


def test_files_of_others_stay(tmp_path):
    section = EmbeddingCache(tmp_path).section(ONE, 7)
    section.store(*some(2, 7))
    section.cache.close()
    theirs = tmp_path / ONE / "mine.shard"
    theirs.write_text("something else")
    (tmp_path / ONE / "folder.shard").mkdir()
    cache = EmbeddingCache(tmp_path, budget_mb=1)
    cache.section(ONE, 7).store(*some(40_000, 7, 1))  # more than the budget: the oldest go
    cache.close()
    assert theirs.read_text() == "something else" and (tmp_path / ONE / "folder.shard").is_dir()


def test_another_embedding_is_refused(tmp_path):
    for fingerprint, dim in ((OTHER, 7), (ONE, 8)):
        cache = EmbeddingCache(tmp_path / "other")
        cache.section(fingerprint, dim).store(*some(2, dim))
        cache.close()
    folder = tmp_path / "mine"
    (folder / ONE).mkdir(parents=True)
    source = next((tmp_path / "other" / OTHER).glob("*.shard"))
    (folder / ONE / source.name).write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match=f"belongs to embedding {OTHER} of 7 numbers, not to {ONE}"):
        EmbeddingCache(folder).section(ONE, 7)
    # A width of its own has its own fingerprint; the same one with another width is somebody's mistake.
    with pytest.raises(ValueError, match="of 8 numbers"):
        EmbeddingCache(tmp_path / "other").section(ONE, 7)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("can't mount a tmpfs here")
    yield disk
    # Lazily: what the test read is still mapped.
    subprocess.run(["umount", "-l", disk], check=True)


def goes_on_in_memory(folder, says):
    section, (keys, values) = EmbeddingCache(folder).section(ONE, 256), some(1000, 256)
    with pytest.warns(UserWarning, match=f"nothing more is written to the cache .*{says}.*stay in memory"):
        for i in range(0, 1000, 100):
            section.store(keys[i : i + 100], values[i : i + 100])
    assert holds(section, keys) == 1000
    assert section.cache.folder is None
    return keys


def test_a_full_disk(small_disk):
    keys = goes_on_in_memory(small_disk, os.strerror(errno.ENOSPC))
    # As many as fit, all of them whole.
    assert 200 <= holds(EmbeddingCache(small_disk).section(ONE, 256), keys) <= 250


def test_a_limit_on_the_size_of_files(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        keys = goes_on_in_memory(tmp_path, os.strerror(errno.EFBIG))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 100 <= holds(EmbeddingCache(tmp_path).section(ONE, 256), keys) < 200


def test_a_write_that_fails_takes_nothing_from_those_who_read(tmp_path, monkeypatch):
    """They have mapped what was written of it: a file that shrank would end their process."""
    keys, values = some(20, 256)
    mine, other = EmbeddingCache(tmp_path).section(ONE, 256), EmbeddingCache(tmp_path).section(ONE, 256)
    mine.store(keys[:10], values[:10])
    write, seen = os.pwrite, []

    def pwrite(file, data, place):
        if seen:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(file, data[: 3 * 1048 + 100], place)  # three records and a piece
        other.refresh()
        seen.append(len(other))
        return done

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.warns(UserWarning, match="nothing more is written"):
        mine.store(keys[10:], values[10:])
    assert seen == [13] and holds(other, keys) == 13 and holds(mine, keys) == 20
    assert holds(EmbeddingCache(tmp_path).section(ONE, 256), keys) == 13


def test_a_budget_that_others_use_up(tmp_path):
    caches = [EmbeddingCache(tmp_path, budget_mb=1) for _ in range(9)]
    for i, cache in enumerate(caches[:8]):
        keys = pool_keys(str(i), np.arange(3))
        cache.section(ONE, 64).store(keys, value_of(keys, 64))
    with pytest.warns(UserWarning, match="other processes use up its budget"):
        caches[8].section(ONE, 64).store(*some(3, 64))
    assert holds(caches[8].section(ONE, 64), some(3, 64)[0]) == 3


def test_copies_and_forks_write_shards_of_their_own(tmp_path):
    cache, (keys, values) = EmbeddingCache(tmp_path), some(40, 8)
    cache.section(ONE, 8).store(keys[:10], values[:10])
    twins = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    for i, twin in enumerate(twins):
        twin.section(ONE, 8).store(keys[10 + 10 * i : 20 + 10 * i], values[10 + 10 * i : 20 + 10 * i])
    worker = multiprocessing.get_context("fork").Process(
        target=lambda: cache.section(ONE, 8).store(keys[30:], values[30:])
    )
    worker.start()
    worker.join()
    cache.section(ONE, 8).store(keys[10:15], values[10:15])
    assert worker.exitcode == 0
    assert holds(EmbeddingCache(tmp_path).section(ONE, 8), keys) == 40
    assert len(files(tmp_path)) == 4


def test_a_folder_that_is_deleted_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 0.0)
    one, two = (EmbeddingCache(tmp_path).section(ONE, 8) for _ in range(2))
    keys, values = some(10, 8)
    one.store(keys, values)
    assert holds(two, keys) == 10
    files(tmp_path)[0].unlink()
    two.lookup(some(1, 8, seed=1)[0])  # a miss makes it look
    assert holds(two, keys) == 0
    one.cache.close()
    assert holds(one, keys) == 0


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: EmbeddingCache(budget_mb=0), ValueError, "budget_mb must be from 1"),
        (lambda: EmbeddingCache(budget_mb=0.5), TypeError, "budget_mb"),
        (lambda: EmbeddingCache(__file__), ValueError, "folder='.*' can't be made a folder: it is a file"),
        (lambda: EmbeddingCache(__file__ + "/x"), ValueError, "folder='.*' can't be made a folder: Not a directory"),
        (lambda: EmbeddingCache().section("../x", 3), ValueError, "32 hex digits"),
        (lambda: EmbeddingCache().section(ONE, 0), ValueError, "dim must be from 1"),
        (lambda: EmbeddingCache(budget_mb=1).section(ONE, 10**6), ValueError, "needs 31 at least"),
        (lambda: EmbeddingCache().section(ONE, 3).lookup(np.zeros((2, 2))), TypeError, "uint64 array"),
        (lambda: EmbeddingCache().section(ONE, 3).lookup([1]), TypeError, "got list"),
        (lambda: EmbeddingCache().section(ONE, 3).store(some(2, 3)[0], some(2, 4)[1]), ValueError, r"shape \(2, 3\)"),
        (lambda: hash_rows(np.zeros(3)), ValueError, "two axes"),
        (lambda: hash_rows(np.zeros((3, 0))), ValueError, "something in them"),
    ],
)  # fmt: skip
def test_errors(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_record_bytes_are_a_multiple_of_eight():
    assert [shards.record_bytes(dim) for dim in (1, 2, 3, 256)] == [32, 32, 40, 1048]
