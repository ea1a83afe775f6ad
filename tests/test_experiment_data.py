"""What the experiments train on: original files, splits, shifts; and the two groups that need most of it."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import math
import os
import pickle
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")

from sam_kernels import SAM, recipes  # noqa: E402
from sam_kernels.experiments import data, self_training, training  # noqa: E402
from sam_kernels.experiments.data import files, pickles, shifted, shifts  # noqa: E402
from sam_kernels.experiments.experiment import Settings, Trial  # noqa: E402
from sam_kernels.experiments.groups import cost_benefit, out_of_distribution  # noqa: E402
from sam_kernels.experiments.groups.cost_benefit import step_times  # noqa: E402
from sam_kernels.experiments.groups.cost_benefit.claims import FAMILIES  # noqa: E402
from sam_kernels.experiments.groups.cost_benefit.findings import front  # noqa: E402

NUMBERS = np.random.default_rng(0)


# ---- digits and wrong labels -----------------------------------------------------------------------


def test_the_split_of_the_digits_is_the_same_for_all_seeds_and_has_no_image_twice():
    one, two = data.digits(seed=1), data.digits(400, noise=0.5, seed=2)
    assert one.x.shape == (1000, 64) and one.x_test.shape == (797, 64)
    assert one.x.dtype == torch.float32 and (one.x.min(), one.x.max()) == (0, 1)
    assert torch.equal(one.x[:400], two.x) and torch.equal(one.x_test, two.x_test)
    assert torch.equal(one.y_test, two.y_test)
    train, test = ({tuple(row) for row in x.tolist()} for x in (one.x, one.x_test))
    assert len(train) == 1000 and not train & test


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    known = {tuple(row): y for row, y in zip(load_digits().data, load_digits().target, strict=True)}
    split = data.digits()
    for x, y in ((split.x, split.y), (split.x_test, split.y_test)):
        assert all(
            known[tuple(row)] == label for row, label in zip((16 * x).tolist(), y.tolist(), strict=True)
        )


def test_wrong_labels_are_as_many_as_asked_and_of_another_class():
    y = torch.arange(9000) % 10
    found = data.flipped(y, 0.3, 10, seed=3)
    wrong = found != y
    assert wrong.sum() == 2700
    shift = ((found - y) % 10)[wrong].bincount(minlength=10)
    assert shift[0] == 0 and shift[1:].min() > 230, "some other class is preferred"
    assert torch.equal(found, data.flipped(y, 0.3, 10, seed=3))
    assert not torch.equal(found, data.flipped(y, 0.3, 10, seed=4))


def test_more_noise_keeps_the_labels_that_were_wrong_before():
    y = torch.arange(500) % 10
    some, more = (data.flipped(y, noise, 10, seed=0) for noise in (0.2, 0.6))
    assert torch.equal(more[some != y], some[some != y])


def test_noise_is_in_the_training_labels_alone():
    clean, noisy = data.digits(), data.digits(noise=0.4, seed=5)
    assert (clean.y != noisy.y).sum() == 400
    assert torch.equal(clean.y_test, noisy.y_test) and torch.equal(clean.x, noisy.x)


def test_bad_numbers_get_a_sentence():
    with pytest.raises(ValueError, match="expected 1 to 1000"):
        data.digits(1001)
    with pytest.raises(ValueError, match="share from 0 to 1"):
        data.digits(noise=1.5)
    with pytest.raises(ValueError, match="3 training samples but 2 labels"):
        data.Split(torch.zeros(3, 4), torch.zeros(2), torch.zeros(1, 4), torch.zeros(1), 2, "odd")
    with pytest.raises(ValueError, match="no image of shape"):
        data.Split(torch.zeros(2, 4), torch.zeros(2), torch.zeros(1, 4), torch.zeros(1), 2, "odd", (1, 3, 3))


# ---- original files --------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content += array.astype("u1").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, train: int = 12, test: int = 5, suffixes=("", ".gz", ".gz", "")) -> list:
    arrays = [
        NUMBERS.integers(0, 256, (train, 28, 28)),
        np.arange(train) % 10,
        NUMBERS.integers(0, 256, (test, 28, 28)),
        np.arange(test) % 10,
    ]
    names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
    names += ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    for name, suffix, array in zip(names, suffixes, arrays, strict=True):
        write_idx(folder / (name + suffix), array)
    return arrays


@pytest.mark.parametrize("place", ["", "MNIST/raw"])
def test_mnist_is_read_from_its_files_gzipped_or_not(tmp_path, place):
    x, y, x_test, y_test = write_mnist(tmp_path / place)
    split = data.mnist(tmp_path)
    order = [
        int(np.flatnonzero((x.reshape(12, -1) == row).all(1))[0]) for row in (255 * split.x).round().numpy()
    ]
    assert sorted(order) == list(range(12))
    assert split.y.tolist() == y[order].tolist()
    assert (
        np.allclose(split.x_test.numpy(), x_test.reshape(5, -1) / 255)
        and split.y_test.tolist() == y_test.tolist()
    )
    assert split.as_images().x.shape == (12, 1, 28, 28) and split.classes == 10
    few = data.mnist(tmp_path, 6, noise=0.5, seed=1, test=2)
    assert torch.equal(few.x, split.x[:6]) and len(few.x_test) == 2
    assert (few.y != split.y[:6]).sum() == 3


def test_what_is_missing_is_named_with_where_it_was_looked_for(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte.*MNIST/raw.*come from http"):
        data.mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder.*python version"):
        data.cifar(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="covtype.data"):
        shifted.shift("covertype", tmp_path)
    with pytest.raises(FileNotFoundError, match="folders F and M"):
        shifted.shift("portraits", tmp_path)


def test_a_damaged_idx_file_gets_a_sentence(tmp_path):
    path = tmp_path / "x"
    write_idx(path, np.ones((3, 4)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x has 23 bytes.*shape \(3, 4\) has 24"):
        files.read_idx(path)
    path.write_bytes(b"PNG and more")
    with pytest.raises(ValueError, match="no IDX file"):
        files.read_idx(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bytes([0, 0, 8, 3, 0, 0, 0]), "x has 7 bytes, but the head of an IDX file of 3 dimensions has 16"),
        (bytes([0, 0, 8, 200]) + bytes(800), "x is no IDX file.*dimensions from 1 to 32"),
        # 2^32 * 2^32 is 0 in 64 bits, as many as there are.
        (struct.pack(">BBBB4I", 0, 0, 8, 4, *4 * [1 << 31]), "x has 20 bytes, but an IDX file of shape"),
        (struct.pack(">BBBB2I", 0, 0, 8, 2, 0, 784), r"shape \(0, 784\), which holds nothing"),
        (gzip.compress(bytes(100))[:-9], "x is gzipped and damaged.*fetch it again"),
        (b"\x1f\x8b" + bytes(30), "x is gzipped and damaged"),
    ],
)
def test_every_damage_of_an_idx_file_gets_a_sentence(tmp_path, content, said):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        files.read_idx(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_table_gets_a_sentence(tmp_path, content):
    (tmp_path / "covtype.data").write_bytes(content)
    with pytest.raises(ValueError, match="covtype.data is empty; expected rows of 55 numbers"):
        shifted.shift("covertype", tmp_path)


def test_idx_values_are_big_endian(tmp_path):
    (tmp_path / "x").write_bytes(struct.pack(">BBBBI2i", 0, 0, 0x0C, 1, 2, 258, -3))
    assert files.read_idx(tmp_path / "x").tolist() == [258, -3]


def old_pickle(content: dict) -> bytes:
    """As numpy 1 wrote it under Python 2, so with the old name of the function that makes arrays."""
    return pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar(folder: Path, names: list[str], key: bytes, n: int = 4) -> list[np.ndarray]:
    folder.mkdir(parents=True)
    arrays = []
    for number, name in enumerate(names):
        arrays.append(NUMBERS.integers(0, 256, (n, 3072), dtype=np.uint8))
        labels = [(number + i) % 10 for i in range(n)]
        (folder / name).write_bytes(old_pickle({b"data": arrays[-1], key: labels, b"batch_label": b"one"}))
    return arrays


def test_cifar_is_read_from_its_pickles(tmp_path):
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    arrays = write_cifar(tmp_path / "cifar-10-batches-py", names, b"labels")
    split = data.cifar(tmp_path)
    rows = np.concatenate(arrays[:5])
    order = [int(np.flatnonzero((rows == row).all(1))[0]) for row in (255 * split.x).round().numpy()]
    assert sorted(order) == list(range(20))
    assert split.y.tolist() == [(i // 4 + i % 4) % 10 for i in order]
    assert np.array_equal((255 * split.x_test).round().numpy(), arrays[5])
    assert split.as_images().x.shape == (20, 3, 32, 32)
    arrays = write_cifar(tmp_path / "cifar-100-python", ["train", "test"], b"fine_labels")
    assert data.cifar(tmp_path, 100).y_test.tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="expected 10 or 100"):
        data.cifar(tmp_path, 20)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_cannot_run_anything(tmp_path, protocol):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({b"data": Evil(tmp_path / "made")}, protocol=protocol))
    with pytest.raises(pickle.UnpicklingError, match="mkdir.*only numpy arrays"):
        pickles.read_pickle(path)
    assert not (tmp_path / "made").exists()


def test_what_is_no_pickle_of_a_dict_gets_a_sentence(tmp_path):
    path = tmp_path / "batch"
    path.write_bytes(b"<html>")
    with pytest.raises(pickle.UnpicklingError, match="batch cannot be read"):
        pickles.read_pickle(path)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(pickle.UnpicklingError, match="holds list; expected a dict"):
        pickles.read_pickle(path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_arrays_come_out_of_pickles_as_they_went_in(tmp_path, protocol):
    arrays = {
        "bytes": NUMBERS.integers(0, 256, (3, 5), dtype=np.uint8),
        "signed": NUMBERS.integers(-99, 99, (2, 3, 2), dtype=np.int8),
        "turned": np.asfortranarray(NUMBERS.integers(0, 256, (4, 3), dtype=np.uint8)),
        "long": NUMBERS.integers(-(1 << 60), 1 << 60, 7),
        "other end": NUMBERS.integers(0, 1 << 60, 3).astype(">i8"),
    }
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({**arrays, "labels": [1, 2]}, protocol=protocol))
    found = pickles.read_pickle(path)
    assert found.pop("labels") == [1, 2]
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name


def test_the_words_of_python_2_are_bytes_and_name_types_too(tmp_path):
    array = NUMBERS.integers(0, 256, (2, 3), dtype=np.uint8)
    raw = array.tobytes()
    (tmp_path / "batch").write_bytes(
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x06" + raw + b"tbs."
    )
    assert np.array_equal(pickles.read_pickle(tmp_path / "batch")[b"data"], array)


class Given:
    """Pickles as a call of a function, as an array does, with a state for what it returns."""

    def __init__(self, *reduced) -> None:
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def array_of(kind: str, state: object, shape: object, data: object) -> Given:
    dtype = Given(np.dtype, (kind, False, True), state)
    reconstruct = np.zeros(1, np.uint8).__reduce__()[0]
    return Given(reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data))


PLAIN = (3, "|", None, None, None, -1, -1, 0)


@pytest.mark.parametrize(
    "content",
    [
        array_of("u1", PLAIN, (1 << 20,), b"abcd"),  # numpy would read what lies behind them
        array_of("u1", PLAIN, (-4,), b"abcd"),
        array_of("u1", PLAIN, (1 << 62, 1 << 62, 1 << 62), b"abcd"),
        array_of("u1", PLAIN, (4,), ["abcd"]),
        array_of("O8", PLAIN, (1,), b"abcdefgh"),  # addresses of objects
        array_of("u1", (3, "|", None, ("x",), {"x": 1}, 8, 1, 0), (4,), b"abcd"),
        array_of("V8", (3, "|", (np.dtype("O"), (1,)), None, None, 8, 1, 0), (1,), b"abcdefgh"),
        array_of("i8", PLAIN, (1,), b"abcdefgh"),
        Given(np.dtype, ("u1",), {"names": ()}),
        Given(codecs.encode, ("abc", "rot13")),
        {(1, 2): 3},
        np.zeros(3, np.float64),
    ],
)
def test_arrays_that_do_not_fit_their_bytes_are_not_made(tmp_path, content):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({b"data": content}, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="batch cannot be read; expected a pickle of a dict"):
        pickles.read_pickle(path)


def test_flipped_bytes_of_a_pickle_end_in_a_sentence_or_in_sound_arrays(tmp_path):
    write_cifar(tmp_path / "cifar-100-python", ["train", "test"], b"fine_labels")
    path = tmp_path / "cifar-100-python" / "train"
    whole = path.read_bytes()
    head = whole.index(b"latin1") if b"latin1" in whole else 200
    told = 0
    for trial in range(400):
        damaged = bytearray(whole)
        # All of the bytes in the head, where names, types and shapes are, and some in the tail.
        places = NUMBERS.integers(0, head, 2) if trial % 3 else -NUMBERS.integers(1, 300, 2)
        damaged[places[0]] = NUMBERS.integers(0, 256)
        damaged[places[1]] ^= 1 << NUMBERS.integers(0, 8)
        path.write_bytes(damaged)
        try:
            split = data.cifar(tmp_path, 100)
        except (pickle.UnpicklingError, ValueError) as error:
            assert str(path) in str(error) and "expected" in str(error) and "\n" not in str(error)
            told += 1
        else:
            assert split.x.shape == (4, 3072) and split.y.min() >= 0 and split.y.max() < 100
    assert 100 < told < 400


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({b"data": np.zeros((2, 3072), np.uint8)}, "has no b'fine_labels'"),
        ({b"data": [1], b"fine_labels": [1]}, "data are no uint8"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"fine_labels": [1, 2]}, "data are no uint8"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, 100]}, "numbers from 0 to 99"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, "2"]}, "numbers from 0 to 99"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1]}, "2 images and 1 labels"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": []}, "1 images and 0 labels"),
    ],
)
def test_a_batch_of_something_else_gets_a_sentence(tmp_path, batch, said):
    write_cifar(tmp_path / "cifar-100-python", ["train", "test"], b"fine_labels")
    (tmp_path / "cifar-100-python" / "train").write_bytes(old_pickle(batch))
    with pytest.raises(ValueError, match=f"train.*{said}.*expected a batch of CIFAR-100"):
        data.cifar(tmp_path, 100)


def test_torchvision_fetches_where_asked_to_and_nowhere_else(tmp_path, monkeypatch):
    class MNIST:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert download
            if train:
                write_mnist(Path(root) / "MNIST/raw")

    fake = ModuleType("torchvision")
    fake.datasets = ModuleType("torchvision.datasets")  # type: ignore[attr-defined]
    fake.datasets.MNIST = MNIST  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    with pytest.raises(FileNotFoundError):
        data.mnist(tmp_path)
    assert len(data.mnist(tmp_path, download=True).x) == 12
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        data.cifar(tmp_path, download=True)


def test_covertype_is_in_the_order_of_the_distance_to_water(tmp_path):
    table = NUMBERS.integers(0, 100, (430, 55)).astype(float)
    table[:, 3] = NUMBERS.permutation(430)
    table[:, 54] = 1 + np.arange(430) % 3
    lines = "\n".join(",".join(f"{v:g}" for v in row) for row in table)
    (tmp_path / "covtype.data.gz").write_bytes(gzip.compress(lines.encode()))
    shift = shifted.shift("covertype", tmp_path)
    kept = table[table[:, 54] < 3]
    kept = kept[kept[:, 3].argsort()]
    x = (kept[:, :54] - kept[:, :54].mean(0)) / kept[:, :54].std(0, ddof=1)
    n = len(kept)
    sizes = [len(part) for part in (shift.x, shift.between, shift.x_target)]
    assert sizes == [n * 10 // 430, n * 400 // 430, n * 20 // 430]
    found = torch.cat([shift.x, shift.between, shift.x_target])
    assert np.allclose(found, x[: len(found)], atol=1e-4)
    labels = torch.cat([shift.y, shift.y_between, shift.y_target])
    assert labels.tolist() == (kept[: len(found), 54] - 1).tolist()
    (tmp_path / "covtype.data.gz").write_bytes(b"1,2,3")
    with pytest.raises(ValueError, match="3 columns; expected 55"):
        shifted.shift("covertype", tmp_path)


def test_portraits_are_in_the_order_of_their_years(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow, which reads portraits, is not installed")
    for number in range(36):
        folder = tmp_path / "portraits" / "FM"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        grey = image.new("L", (40, 50), 5 * number)
        grey.save(folder / f"{1985 - number}_Ohio_School_{number}.png")
    shift = shifted.shift("portraits", tmp_path)
    assert [len(part) for part in (shift.x, shift.between, shift.x_target)] == [4, 28, 4]
    assert (255 * shift.x[:, 0]).round().tolist() == [175, 170, 165, 160]
    assert shift.y.tolist() == [1, 0, 1, 0] and shift.image_shape == (1, 32, 32)
    image.new("L", (4, 4)).save(tmp_path / "portraits" / "F" / "someone.png")
    with pytest.raises(ValueError, match="someone.png has no year"):
        shifted.shift("portraits", tmp_path)


# ---- shifts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 8])
def test_rotation_agrees_with_scipy(size):
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy, the reference, is not installed")
    images = NUMBERS.random((4, 1, size, size), dtype=np.float32)
    degrees = [0.0, 17.0, 60.0, -35.0]
    found = shifts.rotated(torch.from_numpy(images), torch.tensor(degrees))
    for image, angle, ours in zip(images[:, 0], degrees, found[:, 0], strict=True):
        theirs = ndimage.rotate(image, angle, order=1, reshape=False, mode="grid-constant", cval=0.0)
        assert np.allclose(ours, theirs, atol=1e-5), angle


def test_rotation_by_a_quarter_is_exact_and_turns_against_the_clock():
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = shifts.rotated(image, torch.tensor([90.0]))
    assert torch.allclose(found, torch.rot90(image, 1, (2, 3)), atol=1e-5)
    with pytest.raises(ValueError, match="square images"):
        shifts.rotated(image[..., :7], torch.tensor([90.0]))


def test_no_image_is_in_two_parts_of_a_shift_and_the_change_rises():
    from sklearn.datasets import load_digits

    shift = shifted.brighter_digits(seed=3)
    amounts = (torch.arange(800) + 0.5) / 800
    parts = (shift.x, shift.between - amounts[:, None], shift.x_target - 1)
    rows = [tuple(row) for part in parts for row in (16 * part).round().tolist()]
    assert sorted(rows) == sorted(map(tuple, load_digits().data.tolist()))
    known = {tuple(row): y for row, y in zip(load_digits().data, load_digits().target, strict=True)}
    labels = torch.cat([shift.y, shift.y_between, shift.y_target]).tolist()
    assert [known[row] for row in rows] == labels
    assert not torch.equal(shift.x, shifted.brighter_digits(seed=4).x)
    assert torch.equal(shift.x, shifted.brighter_digits(seed=3).x)


def test_rotated_digits_turn_by_their_place_on_the_way():
    still, turned = shifted.brighter_digits(seed=3), shifted.rotated_digits(seed=3)  # the same deal
    assert torch.allclose(turned.x, still.x, atol=1e-5)
    whole = shifts.rotated((still.x_target - 1).reshape(-1, 1, 8, 8), torch.full((397,), 60.0))
    assert torch.allclose(turned.x_target, whole.flatten(1), atol=1e-5)
    last = (still.between[-1] - 799.5 / 800).reshape(1, 1, 8, 8)
    expected = shifts.rotated(last, torch.tensor([60 * 799.5 / 800])).flatten()
    assert torch.allclose(turned.between[-1], expected, atol=1e-5)
    assert torch.equal(torch.cat(turned.domains(5)), turned.between)
    with pytest.raises(ValueError, match="expected 1 to 800"):
        turned.domains(801)


def test_original_sets_take_the_place_of_digits_where_they_are(tmp_path):
    write_mnist(tmp_path, train=100, test=18)
    turned, bright = (shifted.shift(name, tmp_path, seed=1) for name in ("rotated", "brighter"))
    assert [len(part) for part in (turned.x, turned.between, turned.x_target)] == [6, 8, 4]
    assert [len(part) for part in (bright.x, bright.between, bright.x_target)] == [12, 84, 4]
    assert bright.x_target.min() >= 1 and turned.image_shape == (1, 28, 28)
    asked = out_of_distribution.trials(Settings(seeds=1, data=tmp_path))
    assert {trial.options["data"] for trial in asked} == {"rotated", "brighter"}
    assert all(trial.options["original"] for trial in asked)
    assert cost_benefit.trials(Settings(seeds=1, data=tmp_path))[0].options["original"]
    with pytest.raises(ValueError, match="Known: rotated, brighter$"):
        shifted.shift("covertype")


def test_a_set_is_there_where_its_reader_finds_it_and_nowhere_else(tmp_path):
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    (tmp_path / "F").mkdir()
    (tmp_path / "covtype.data.zip").touch()
    for name in shifted.ORIGINAL:
        assert not shifted.is_there(name, tmp_path), name
        with pytest.raises(FileNotFoundError):
            shifted.shift(name, tmp_path)
    write_mnist(tmp_path / "MNIST" / "raw")
    (tmp_path / "M").mkdir()
    (tmp_path / "covtype.data.gz").touch()
    assert all(shifted.is_there(name, tmp_path) for name in shifted.ORIGINAL)


# ---- self-training ---------------------------------------------------------------------------------


def test_the_least_sure_are_dropped_and_the_others_labelled():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4))
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    kept, labels = self_training.self_labelled(model, x)
    out = (x @ model[1].weight.T + model[1].bias).detach().double().numpy()
    shares = np.exp(out) / np.exp(out).sum(1, keepdims=True)
    expected = np.sort(np.argsort(-shares.max(1))[:45])
    assert kept.tolist() == expected.tolist()
    assert labels.tolist() == shares.argmax(1)[expected].tolist()
    assert model.training


def test_adaptation_follows_the_way_without_its_labels():
    shift = shifted.rotated_digits()
    model = nn.Linear(64, 10)
    seen = []

    def learn(model, split):
        seen.append(split)
        with torch.no_grad():
            model.weight[3].add_(0.1)  # the next labels are those of another model
        return training.Trained(model)

    before = [self_training.self_labelled(model, x) for x in shift.domains(5)]
    self_training.adapt(model, shift, 5, learn)
    assert [len(split.x) for split in seen] == [144] * 5
    kept, labels = before[0]
    assert torch.equal(seen[0].x, shift.between[:160][kept]) and torch.equal(seen[0].y, labels)
    assert torch.equal(seen[0].x_test, shift.x_target)
    assert any(
        not torch.equal(split.y, labels) for split, (_, labels) in zip(seen[1:], before[1:], strict=True)
    )


def test_scores_at_the_end_are_those_of_a_training_with_curves():
    split = data.digits(100)
    runs = [
        training.train(
            lambda: cost_benefit.network(64, (8, 8)),
            split,
            "sam",
            base_kwargs={"lr": 0.1},
            epochs=3,
            curves=curves,
        )
        for curves in (True, False)
    ]
    assert runs[0].test == runs[1].test and runs[0].train == runs[1].train
    assert len(runs[0].curves["test_loss"]) == 3 and len(runs[1].curves["test_loss"]) == 1


# ---- out of distribution ---------------------------------------------------------------------------


def ood_rows(gains: dict[str, float], seeds: int = 3) -> list[dict]:
    rows = []
    for arm, seed, name in itertools.product(out_of_distribution.ARMS, range(seeds), shifted.EMBEDDED):
        zero = 40 + 5 * seed + (20 if name == "brighter" else 0) + gains.get(arm, 0) + 0.1 * (seed % 2)
        numbers = {"zero_shot": zero, "gradual": zero + 10, "way": [90.0, 80, 70, 60, 50], "source": 100.0}
        rows.append(
            {"arm": arm, "seed": seed, "options": {"data": name}, "numbers": numbers | {"diverged": False}}
        )
    return rows


def test_claims_on_moved_data_follow_the_differences_in_pairs():
    found = out_of_distribution.findings(
        ood_rows({"sam": 5, "asam": 9, "k_sam": 9, "looksam": -30, "adam": 0.0})
    )
    gain = found.numbers["gain over adam"]["zero_shot"]
    assert gain["sam"]["mean"] == pytest.approx(5) and gain["strongest"]["mean"] == pytest.approx(-4)
    verdicts = [claim.verdict for claim in found.claims]
    assert verdicts == ["agrees", "disagrees", "disagrees", "agrees", "disagrees", "undecided", "agrees"]
    assert found.claims[0].measured.endswith("By data set: rotated digits +5.00, brighter digits +5.00.")
    assert "+5.00 points" in found.claims[0].measured and "3 pairs" in found.claims[0].measured


def test_a_mean_over_data_sets_waits_until_all_are_there():
    rows = ood_rows({"sam": 5})
    without = [r for r in rows if (r["arm"], r["seed"], r["options"]["data"]) != ("sam", 2, "brighter")]
    gain = out_of_distribution.findings(without).numbers["gain over adam"]["zero_shot"]
    assert gain["sam"]["seeds"] == 2 and gain["asam"]["seeds"] == 3
    assert gain["sam"]["mean"] == pytest.approx(5)
    assert (
        "brighter digits: Runs are missing: SAM (2 of 3)"
        in out_of_distribution.findings(without).tables[0].note
    )


@pytest.mark.parametrize("n", [0, 31])
def test_moved_data_can_be_reported_at_any_time(tmp_path, n):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws pictures, is not installed")
    found = out_of_distribution.findings(ood_rows({})[:n])
    assert [len(table.rows) for table in found.tables] == [11, 11]
    assert all(len(row) == len(table.columns) for table in found.tables for row in table.rows)
    assert n or {claim.verdict for claim in found.claims} == {"not measured"}
    found.draw(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


@pytest.mark.parametrize("arm", ["adam", "nosam"])
def test_a_quick_trial_on_moved_data_measures_everything(arm):
    trial = Trial(arm, 1, {"data": "rotated", "quick": True})
    numbers = json.loads(json.dumps(out_of_distribution.run(trial, None)))
    assert all(0 <= value <= 100 for value in (numbers["zero_shot"], numbers["gradual"], *numbers["way"]))
    assert len(numbers["way"]) == 5 and numbers["way"][0] > 30, (
        "hardly turned digits are known after a few steps"
    )
    assert not numbers["diverged"]


# ---- cost and benefit ------------------------------------------------------------------------------


def test_every_recipe_is_trained_with_every_share_of_wrong_labels_and_timed_alone():
    asked = cost_benefit.trials(Settings(seeds=2))
    keys = [trial.key for trial in asked]
    assert len(set(keys)) == len(keys)
    at = {(t.arm, t.seed, t.options["noise"]) for t in asked if not t.alone}
    for arm in ["sgd", "sgd, twice the epochs", *recipes.names()]:
        assert all((arm, seed, noise) in at for seed in (0, 1) for noise in (0, 0.2, 0.4, 0.6, 0.8))
    (timed,) = [trial for trial in asked if trial.alone]
    assert asked[-1] is timed


def test_balls_have_perturbations_of_the_same_length():
    model = cost_benefit.network(64)
    n = sum(p.numel() for p in model.parameters())
    x, y = data.digits().x[:50], data.digits().y[:50]
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()]).double()
    for name in ("sam, p=1", "sam, p=inf"):
        recipe = recipes.get("sam", **cost_benefit._kwargs(cost_benefit.BALLS[name], n))
        opt = SAM(model.named_parameters(), torch.optim.SGD, recipe=recipe, lr=0.1)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with opt.perturbed():
            moved = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
            length = float((moved - before).norm())
        # Pixels that are always black give weights without a gradient, which p = inf leaves where they are.
        moving = int((moved != before).sum()) / n if "inf" in name else 1
        assert length == pytest.approx(0.05 * moving**0.5, rel=1e-3) and length > 0.04, name


def cost_rows(seeds: int = 3, noises=(0.0, 0.2, 0.4, 0.6, 0.8)) -> list[dict]:
    rows = []
    for seed, noise in itertools.product(range(seeds), noises):
        for number, arm in enumerate(cost_benefit.ARMS):
            accuracy = (
                95 - 60 * noise + {"sgd": 0, "sam": 6, "asam": 8}.get(arm, number % 5) + 0.1 * (seed % 2)
            )
            numbers = {"test_accuracy": accuracy, "train_accuracy": 99.0, "accuracy_gap": 99 - accuracy}
            numbers |= {"test_loss": 1.0, "gradients_per_step": 2.0, "diverged": False}
            numbers |= {"sharpness": 0.01 if arm == "sam" else 0.02 + 0.001 * (seed % 2)}
            if not noise:
                numbers["eigenvalue"] = 2.0 if arm == "sam" else 1.0 + 0.01 * (seed % 2)
            rows.append({"arm": arm, "seed": seed, "options": {"noise": noise}, "numbers": numbers})
    times = {
        arm: {"ratio": 2.0, "low": 1.9, "high": 2.1, "error": 0.05, "ms": 4.0} for arm in cost_benefit.ARMS
    }
    times |= {
        arm: {"ratio": 1.4, "low": 1.3, "high": 1.5, "error": 0.05, "ms": 3.0}
        for arm in ("sam, every=5", "rst", "looksam")
    }
    times["ae_sam"] = {"ratio": 1.95, "low": 1.7, "high": 2.0, "error": 0.05, "ms": 3.0}
    return [*rows, {"arm": "step times", "seed": 0, "options": {}, "numbers": {"times": times}}]


def test_claims_on_wrong_labels_and_cost_follow_the_numbers():
    found = cost_benefit.findings(cost_rows())
    assert [claim.verdict for claim in found.claims] == [
        "agrees",
        "agrees",
        "disagrees",
        "agrees",
        "undecided",
        "not measured",
    ]
    assert "80% wrong: +6.00" in found.claims[0].measured
    assert found.tables[0].rows[0][0] == "ASAM *", "sorted by accuracy, and nothing beats it at its price"
    shown = {row[0].removesuffix(" *"): row for row in found.tables[0].rows}
    assert shown["SGD"][-1] == "1.00" and shown["SAM"][-1] == "2.00"
    assert len(shown) == len(cost_benefit.ARMS)
    named = {arm for members in FAMILIES.values() for arm in members}
    assert named <= set(cost_benefit.ARMS)


@pytest.mark.parametrize("n", [0, 40, -1])
def test_costs_can_be_reported_at_any_time(tmp_path, n):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws pictures, is not installed")
    rows = cost_rows(1, (0.0, 0.4))
    rows = rows[-1:] if n < 0 else rows[:n]
    found = cost_benefit.findings(rows)
    assert all(len(row) == len(table.columns) for table in found.tables for row in table.rows)
    assert found.claims[3].verdict == ("agrees" if n < 0 else "not measured")
    assert n or {claim.verdict for claim in found.claims} == {"not measured"}
    found.draw(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
    json.dumps(found.numbers)


def test_a_run_that_diverged_is_left_out_and_named():
    rows = cost_rows(2, (0.0,))[:-1]
    lost = next(row for row in rows if row["arm"] == "gsam" and row["seed"] == 1)
    lost["numbers"] |= {"diverged": True, "test_accuracy": None, "sharpness": None, "eigenvalue": None}
    found = cost_benefit.findings(rows)
    assert "1 of 2 runs of GSAM" in found.tables[0].note


def test_the_front_has_what_nothing_beats():
    points = {"a": (1.0, 5.0), "b": (1.0, 6.0), "c": (2.0, 6.0), "d": (3.0, 9.0), "e": (None, 99.0)}
    assert front(points) == ["b", "d"]


@pytest.mark.parametrize("arm", ["sgd", "ssam_f", "k_sam"])
def test_a_quick_trial_with_wrong_labels_measures_everything(arm):
    numbers = cost_benefit.run(Trial(arm, 0, {"noise": 0.0, "quick": True}), None)
    assert numbers["test_accuracy"] > 50 and not numbers["diverged"]
    assert all(
        math.isfinite(numbers[name]) for name in ("sharpness", "eigenvalue", "accuracy_gap", "step_ms")
    )
    expected = {"sgd": 1.0, "k_sam": 1.0}.get(arm, 2.0)
    assert numbers["gradients_per_step"] == pytest.approx(expected, abs=0.15)
    json.dumps(numbers)


def test_step_times_are_ratios_of_neighbours_so_that_a_slowing_machine_does_not_show():
    now, speed = [0.0], [1.0]

    def steps(seconds):
        while True:
            now[0] += seconds * speed[0]
            speed[0] *= 1.001
            yield 0.0

    found = step_times.beside(
        lambda: steps(1.0), {"sam": lambda: steps(2.0), "same": lambda: steps(1.0)}, 20, clock=lambda: now[0]
    )
    assert found["sam"]["ratio"] == pytest.approx(2, rel=1e-3) and found["same"]["ratio"] == pytest.approx(
        1, rel=1e-3
    )
    assert found["sam"]["low"] < 2 < found["sam"]["high"] and found["sam"]["ms"] > 2000
    once = step_times.beside(lambda: steps(1.0), {"sam": lambda: steps(2.0)}, 1, clock=lambda: now[0])
    assert math.isnan(once["sam"]["low"]), "one round has no quartiles"
    with pytest.raises(ValueError, match="at least 1"):
        step_times.beside(lambda: steps(1.0), {}, 0)


def test_all_recipes_are_timed():
    found = cost_benefit.time_all(data.digits(), 1, 1)["times"]
    assert {"sgd", *recipes.names()} <= set(found)
    assert all(times["ratio"] > 0 for times in found.values())
