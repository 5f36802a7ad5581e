"""Store: what is published is found and read back exactly; damage is noticed; the first entry wins."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from storage.codec import CodecError, decode_png, encode_png
from storage.keys import canonical, digest
from storage.store import Artifact, Damaged, Finished, Store, StoreError

IMAGE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
LABELS = np.array([[0, 11], [255, 3]], np.uint8)
POINTS = np.array([[0.5, -1.25], [3.0, np.pi]], np.float32)


def publish(store: Store, key: str = "k" * 64, image: np.ndarray = IMAGE) -> Artifact:
    values = {"face": ("image", image), "regions": ("labels", LABELS), "points": ("array", POINTS)}
    (artifact,) = store.publish([Finished(key, "align", values)])
    return artifact


def test_values_come_back_exactly(store: Store) -> None:
    publish(store)
    found = store.lookup(["k" * 64, "absent"])
    assert found.keys() == {"k" * 64}
    artifact = found["k" * 64]
    assert np.array_equal(store.read(artifact, "face"), IMAGE)
    assert np.array_equal(store.read(artifact, "regions"), LABELS)
    points = store.read(artifact, "points")
    assert points.dtype == np.float32
    assert np.array_equal(points, POINTS)


def test_scalar_and_half_arrays_keep_shape_and_type(store: Store) -> None:
    values = {"scalar": ("array", np.array(2.5)), "codes": ("array", np.ones((12, 23, 4), np.float16))}
    (artifact,) = store.publish([Finished("s", "encode", values)])
    assert store.read(artifact, "scalar").shape == ()
    assert store.read(artifact, "scalar") == 2.5
    assert store.read(artifact, "codes").dtype == np.float16


def test_failure_is_an_artifact_with_a_reason(store: Store) -> None:
    store.publish([Finished("f", "align", reason="no face found")])
    artifact = store.lookup(["f"])["f"]
    assert artifact.failed
    assert artifact.reason == "no face found"


def test_threads_may_read_and_cancel_at_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    artifacts = [publish(store, key=f"{number:064}", image=IMAGE) for number in range(100)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            for _ in range(3):
                assert all(np.array_equal(points, POINTS) for points in threads.map(lambda found: store.read(found, "points"), artifacts))
                list(threads.map(lambda found: (store.read(found, "points"), store.void(found)), artifacts[:50]))
    finally:
        sys.setswitchinterval(interval)


def test_first_entry_of_a_key_wins(store: Store) -> None:
    publish(store)
    publish(store, image=IMAGE + 1)
    assert np.array_equal(store.read(store.lookup(["k" * 64])["k" * 64], "face"), IMAGE)


@pytest.mark.parametrize("suffix", ["png", "parquet"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_damage_is_noticed_voided_and_repaired(tmp_path: Path, suffix: str, damage: str) -> None:
    store = Store(str(tmp_path))
    artifact = publish(store)
    output = "face" if suffix == "png" else "points"
    path = tmp_path / artifact.payloads[output].file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        place = data.find(POINTS.tobytes()[:6]) if suffix == "parquet" else len(data) // 2
        data[max(place, len(data) // 3)] ^= 1
    path.unlink()
    if damage != "remove":
        path.write_bytes({"flip": data, "truncate": data[:-5], "empty": b""}[damage])
    fresh = Store(str(tmp_path))
    with pytest.raises(Damaged):
        fresh.read(artifact, output)
    fresh.void(artifact)
    assert fresh.lookup([artifact.key]) == {}
    publish(fresh)
    again = Store(str(tmp_path)).lookup([artifact.key])[artifact.key]
    assert np.array_equal(fresh.read(again, output), IMAGE if suffix == "png" else POINTS)


@pytest.mark.parametrize("folder", ["payload", "index"])
def test_any_flipped_byte_is_noticed(tmp_path: Path, folder: str) -> None:
    artifact = publish(Store(str(tmp_path)))
    for path in (tmp_path / folder).rglob("*.*"):
        whole = path.read_bytes()
        for place in range(0, len(whole), 5):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            store = Store(str(tmp_path))
            if folder == "index":
                assert store.lookup([artifact.key]) == {}
            else:
                with pytest.raises(Damaged):
                    for output in artifact.payloads:
                        store.read(artifact, output)
        path.write_bytes(whole)


def test_truncated_index_part_finishes_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store)
    (part,) = (tmp_path / "index").glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    assert store.lookup(["k" * 64]) == {}
    publish(store)
    assert store.lookup(["k" * 64]).keys() == {"k" * 64}


def test_a_cancelled_entry_stays_so_whatever_the_clocks_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    artifact = publish(store)
    monkeypatch.setattr("storage.index.time.time_ns", lambda: 1)  # another machine, whose clock is behind
    store.void(artifact)
    assert store.lookup([artifact.key]) == {}
    monkeypatch.setattr("storage.index.time.time_ns", lambda: 0)
    again = publish(store)
    assert store.lookup([artifact.key]) == {artifact.key: again}


def test_a_store_that_cannot_be_opened() -> None:
    with pytest.raises(StoreError, match="foo"):
        Store("foo://bucket/store")


def test_two_writers_of_one_key_leave_a_readable_artifact(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: publish(Store(str(tmp_path))), range(8)))
    store = Store(str(tmp_path))
    assert np.array_equal(store.read(store.lookup(["k" * 64])["k" * 64], "face"), IMAGE)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_keeps_every_depth_and_channel(shape: tuple[int, ...], dtype: type) -> None:
    image = (np.arange(np.prod(shape)) * 2749).astype(dtype).reshape(shape)
    data = encode_png(image)
    assert np.array_equal(decode_png(data), image)
    assert encode_png(image) == data


def test_codec_refuses_what_is_no_image() -> None:
    with pytest.raises(CodecError, match="float64"):
        encode_png(np.zeros((2, 2)))
    with pytest.raises(CodecError, match="PNG"):
        decode_png(b"no picture")


def test_keys_do_not_depend_on_the_order_of_fields() -> None:
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    assert canonical({"ü": True}) == '{"ü":true}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))
