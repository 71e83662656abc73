"""Photographs: decoding, the cache of decoded pictures, and pictures that are missing or broken."""

import multiprocessing
import os
import struct
import warnings
import zlib

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

import mmenvs  # noqa: F401
from mmenvs.datasets import CocoCaptions, ImageStore, VQAv2, images
from mmenvs.datasets.images import decode
from tests import photos

READERS = (VQAv2, CocoCaptions)
both = pytest.mark.parametrize("reader", READERS)


@pytest.fixture
def small(tmp_path):
    return photos.small(tmp_path / "data")


@pytest.fixture
def decoded(monkeypatch):
    """Paths in the order in which they are decoded."""
    calls = []

    def counting(path, size):
        calls.append(os.path.basename(path))
        return decode(path, size)

    monkeypatch.setattr(images, "decode", counting)
    return calls


def everything(store, size):
    out = np.zeros((len(store), size, size, 3), np.uint8)
    rows = np.arange(len(store))
    store.read(rows, size, out, rows)
    return out


def three(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (9, 7), (40 * i, 0, 0)).save(path)
    return paths


# Decoding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 512])
def test_decode(tmp_path, size):
    # Four quarters of one colour each, 640 x 480.
    colours = np.array([[(250, 10, 10), (10, 250, 10)], [(10, 10, 250), (250, 250, 10)]], np.uint8)
    path = tmp_path / "quarters.jpg"
    Image.fromarray(colours.repeat(240, 0).repeat(320, 1)).save(path, quality=95)
    picture = decode(path, size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    quarter = size // 4
    for y in (0, 1):
        for x in (0, 1):
            at = picture[quarter + y * size // 2, quarter + x * size // 2]
            np.testing.assert_allclose(at.astype(int), colours[y, x], atol=6)


def test_orientation(tmp_path):
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, :20] = 255  # bright at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright: bright at the top
    Image.fromarray(picture).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = decode(tmp_path / "turned.jpg", 32)
    assert upright[:8].min() > 230 and upright[16:].max() < 25


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes(tmp_path, mode):
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (50, 40), (255, 255, 255)).convert(mode).save(path)
    np.testing.assert_array_equal(decode(path, 32), np.full((32, 32, 3), 255, np.uint8))


def png(path, width, height):
    """A PNG file whose header claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(header, 13), (b"IDAT", 0)]
    parts = [
        struct.pack(">I", length) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk, length in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _truncated(path):
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-2000])


BROKEN = {
    "truncated": (_truncated, "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "cannot identify"),
    "text": (lambda path: path.write_text("<html>404</html>"), "cannot identify"),
    "another format": (lambda path: Image.new("RGB", (9, 9)).save(path, "GIF"), "cannot identify"),
    "16 bits": (lambda path: Image.new("I;16", (9, 9)).save(path, "PNG"), "mode I;16"),
    "bomb": (lambda path: png(path, 9000, 8000), "9000 x 8000 pixels, at most 64,000,000"),
    "large bomb": (lambda path: png(path, 10_000, 10_000), "pixels"),
    "huge bomb": (lambda path: png(path, 2**31 - 1, 2**31 - 1), "pixels"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures(small, tmp_path, kind):
    make, reason = BROKEN[kind]
    path = photos.picture(small, 1)
    path.unlink()
    make(path)
    with pytest.raises(ValueError, match=f"{path.name}: .*{reason}"):
        decode(path, 32)
    for reader, id in zip(READERS, ("MMRL/VQA-v0", "MMRL/Captioning-v0"), strict=True):
        for _ in range(2):  # the second time from the cache
            with pytest.raises(
                ValueError, match=rf"{path.name}: .*{reason}.*\(1 of 12 pictures .* on_error='skip'"
            ):
                gym.make(id, source=reader.from_root(small, cache=tmp_path), image_size=32)
        source = reader.from_root(small, cache=tmp_path, on_error="skip")
        assert source.skipped == ()
        with pytest.warns(
            UserWarning, match=rf"1 of 12 pictures can't be used and are left out.*{path.name}"
        ):
            env = gym.make(id, source=source, image_size=32)
        assert [name for name, _ in source.skipped] == [str(path)] and reason in source.skipped[0][1]
        gym.make(id, source=source, image_size=34)  # warns once
        left_out = np.flatnonzero(source.photographs == 0)
        assert not np.isin(left_out, source.select("train")).any() and source.select("train").size == 7
        assert not np.isin(left_out, env.unwrapped.task.pool).any()
        with pytest.raises(ValueError, match=f"{path.name} was left out: .*{reason}"):
            out = np.zeros((1, 32, 32, 3), np.uint8)
            source.pictures(left_out[:1], 32, out, np.zeros(1, np.int64))


@both
def test_missing_pictures(small, tmp_path, reader):
    lost = [photos.picture(small, i) for i in (2, 11)]
    for path in lost:
        path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{lost[0].name}: is missing \(2 of 12 pictures"):
        reader.from_root(small, cache=tmp_path)
    with pytest.warns(UserWarning, match=f"2 of 12 .* the first: .*{lost[0].name}: is missing"):
        source = reader.from_root(small, cache=tmp_path, on_error="skip")
    assert source.skipped == tuple((str(path), "is missing") for path in lost)
    source.prepare(32)
    assert source.select("train").size == 7 and source.select("val").size == 1
    if reader is VQAv2:
        # What can be answered doesn't depend on which pictures are there.
        assert source.answers == ("n0", "n1", "n2")


def test_plain_names(small, tmp_path):
    for path in (small / "train2014").iterdir():
        path.rename(path.with_name(path.name.removeprefix("COCO_train2014_")))
    assert len(VQAv2.from_root(small, cache=tmp_path).store) == 12
    photos.change(small / photos.QUESTIONS, lambda content: content.pop("data_subtype") and None)
    assert VQAv2.from_root(small, cache=tmp_path).store.paths[0].endswith("/000000000001.jpg")


# The cache ------------------------------------------------------------------------------------------------


def test_cache_is_used_again(tmp_path, decoded):
    paths = three(tmp_path)
    store = ImageStore(paths, cache=tmp_path / "cache")
    assert not decoded and len(store) == 3
    first = everything(store, 32)
    assert sorted(decoded) == ["0.png", "1.png", "2.png"]
    np.testing.assert_array_equal(first[:, 0, 0, 0], (0, 40, 80))
    everything(store, 32)
    np.testing.assert_array_equal(everything(ImageStore(paths, cache=tmp_path / "cache"), 32), first)
    assert len(decoded) == 3
    assert everything(store, 48).shape == (3, 48, 48, 3) and len(decoded) == 6
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_changed_pictures_are_decoded_again(tmp_path, decoded):
    paths = three(tmp_path)
    old = ImageStore(paths, cache=tmp_path / "cache")
    before = everything(old, 32)
    Image.new("RGB", (9, 7), (0, 200, 0)).save(paths[1])
    del decoded[:]
    after = everything(ImageStore(paths, cache=tmp_path / "cache"), 32)
    assert decoded == ["1.png"]
    np.testing.assert_array_equal(after[1, 0, 0], (0, 200, 0))
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    np.testing.assert_array_equal(everything(old, 32), before)  # whoever has it open keeps it
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # The same length, another time of modification.
    status = os.stat(paths[2])
    os.utime(paths[2], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    everything(ImageStore(paths, cache=tmp_path / "cache"), 32)
    assert decoded == ["1.png", "2.png"]


def test_mended_and_lost_pictures(tmp_path, decoded):
    paths = three(tmp_path)
    whole = paths[0].read_bytes()
    paths[0].write_bytes(whole[:30])
    with pytest.warns(UserWarning, match="1 of 3"):
        ImageStore(paths, cache=tmp_path / "cache", on_error="skip").prepare(32)
    del decoded[:]
    with pytest.raises(ValueError, match=r"0\.png: "):
        ImageStore(paths, cache=tmp_path / "cache").prepare(32)
    assert not decoded  # it is known to be broken
    paths[0].write_bytes(whole)
    paths[1].unlink()
    with pytest.warns(UserWarning, match=r"1\.png: is missing"):
        store = ImageStore(paths, cache=tmp_path / "cache", on_error="skip")
    store.prepare(32)
    assert decoded == ["0.png", "1.png"] and store.usable.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-100] + b"\0" * 82 + content[-18:],
        lambda content: content[100:],
        lambda content: os.urandom(len(content)),
    ],
)
def test_damaged_cache_is_built_again(tmp_path, damage, decoded):
    paths = three(tmp_path)
    before = everything(ImageStore(paths, cache=tmp_path / "cache"), 32)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    np.testing.assert_array_equal(everything(ImageStore(paths, cache=tmp_path / "cache"), 32), before)
    assert len(decoded) == 6


def damage(file, *places):
    content = bytearray(file.read_bytes())
    for place in places:
        content[place] ^= 255
    file.write_bytes(content)


def test_a_damaged_picture_is_not_taken_over_into_the_next_cache(tmp_path, decoded):
    paths = three(tmp_path)
    before = everything(ImageStore(paths, cache=tmp_path / "cache"), 32)
    (file,) = (tmp_path / "cache").iterdir()
    damage(file, 10)
    Image.new("RGB", (9, 7), (0, 200, 0)).save(paths[2])
    del decoded[:]
    after = everything(ImageStore(paths, cache=tmp_path / "cache"), 32)
    np.testing.assert_array_equal(after[:2], before[:2])
    assert decoded == ["0.png", "2.png"]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_picture_that_is_lost_while_a_cache_is_mended_is_named(tmp_path, on_error):
    paths = three(tmp_path)
    store = ImageStore(paths, cache=tmp_path / "cache", on_error=on_error)
    store.prepare(32)
    (file,) = (tmp_path / "cache").iterdir()
    damage(file, 10, 2 * 32 * 32 * 3 + 10)  # of the first and the last
    paths[2].write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"2\.png"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        everything(store, 32)
    assert store.usable.tolist() == [True, True, on_error == "raise"]


def test_stores_that_find_the_same_damage_mend_it_once(tmp_path, decoded):
    paths = three(tmp_path)
    before = everything(ImageStore(paths, cache=tmp_path / "cache"), 32)
    stores = [ImageStore(paths, cache=tmp_path / "cache") for _ in range(3)]
    for store in stores:
        store.prepare(32)
    (file,) = (tmp_path / "cache").iterdir()
    damage(file, 10)
    del decoded[:]
    for store in stores:
        np.testing.assert_array_equal(everything(store, 32), before)
    assert decoded == ["0.png"]


def test_stopped_in_the_middle(tmp_path, monkeypatch):
    paths = three(tmp_path)

    def stop(path, size):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", stop)
        with pytest.raises(KeyboardInterrupt):
            ImageStore(paths, cache=tmp_path / "cache").prepare(32)
    assert not list((tmp_path / "cache").iterdir())
    assert everything(ImageStore(paths, cache=tmp_path / "cache"), 32).any()


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache='.*file' can't be made a folder: it is a file"):
        ImageStore(three(tmp_path), cache=tmp_path / "file")


def _fill(paths, cache, barrier, results):
    store = ImageStore(paths, cache=cache)
    barrier.wait()
    results.put(everything(store, 32).tobytes())


def test_two_processes(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    paths = three(tmp_path)
    processes = [
        context.Process(target=_fill, args=(paths, tmp_path / "cache", barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    pictures = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert pictures[0] == pictures[1] == np.stack([decode(path, 32) for path in paths]).tobytes()
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"paths": []}, ValueError, "paths must hold at least one picture"),
        ({"on_error": "ignore"}, ValueError, "on_error must be one of 'raise', 'skip', got 'ignore'"),
        ({"paths": ["/nowhere/1.jpg"]}, FileNotFoundError, "/nowhere/1.jpg: is missing"),
    ],
)
def test_store_arguments(tmp_path, arguments, error, match):
    with pytest.raises(error, match=match):
        ImageStore(**{"paths": three(tmp_path), **arguments})


@pytest.mark.parametrize("size", [0, -1, 2000, 32.0, True, "64"])
def test_store_sizes(tmp_path, size):
    with pytest.raises((ValueError, TypeError), match="size must be"):
        ImageStore(three(tmp_path), cache=tmp_path).prepare(size)
