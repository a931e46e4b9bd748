from __future__ import annotations

import gzip
import io
import struct
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from know_cli.errors import UsageError
from know_cli.lab.data import (
    AUGMENTATIONS,
    DATA_SETS,
    DataSet,
    Samples,
    available,
    glyphs,
    load,
    registry,
    render_glyphs,
    standardise,
    text,
)
from know_cli.lab.data.idx import read_idx

IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
GENERATED = ["digits", "glyphs-cyrillic", "glyphs-greek", "glyphs-latin", "text"]


@pytest.fixture(autouse=True)
def _no_system_folders(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real" not in request.node.name:
        monkeypatch.setattr(registry, "SYSTEM_FOLDERS", ())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def idx_bytes(dimensions: tuple[int, ...], content: bytes) -> bytes:
    return struct.pack(f">HBB{len(dimensions)}I", 0, 8, len(dimensions), *dimensions) + content


def idx_images(n: int, first: int) -> bytes:
    """Images of one grey value each, but for their last pixel, which is 255."""
    return idx_bytes((n, 28, 28), b"".join(bytes([first + i] * 783 + [255]) for i in range(n)))


def idx_contents() -> dict[str, bytes]:
    return {
        "train-images-idx3": idx_images(3, 10),
        "train-labels-idx1": idx_bytes((3,), bytes([7, 0, 9])),
        "t10k-images-idx3": idx_images(2, 100),
        "t10k-labels-idx1": idx_bytes((2,), bytes([1, 2])),
    }


def write_idx(folder: Path, spelling: str = "{}-ubyte", **replaced: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (idx_contents() | replaced).items():
        path = folder / spelling.format(name)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("inner", ["mnist", ""])
def test_idx_files_are_read(tmp_path: Path, inner: str, separator: str, suffix: str) -> None:
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    for name, content in idx_contents().items():
        path = folder / (name.replace("-idx", f"{separator}idx") + "-ubyte" + suffix)
        path.write_bytes(gzip.compress(content) if suffix else content)
    data = load("mnist", tmp_path)
    assert (data.name, data.kind, data.classes, data.vocabulary) == ("mnist", "image", 10, None)
    assert data.shape == (1, 28, 28)
    assert data.train.inputs.shape == (3, 1, 28, 28)
    assert data.train.inputs.dtype == torch.uint8
    assert data.train.inputs[:, 0, 0, 0].tolist() == [10, 11, 12]
    assert data.train.inputs[:, 0, 27, 26:].tolist() == [[10, 255], [11, 255], [12, 255]]
    assert data.train.labels.dtype == torch.int64
    assert data.train.labels.tolist() == [7, 0, 9]
    assert data.test.inputs[:, 0, 5, 5].tolist() == [100, 101]
    assert data.test.labels.tolist() == [1, 2]


CORRUPT = {
    "empty": ("train-images-idx3", b"", "starts with nothing"),
    "page": ("train-images-idx3", b"<!DOCTYPE html>", "starts with 3c 21 44 4f"),
    "type": ("train-labels-idx1", b"\0\0\x0d\x01\0\0\0\0", "not as an IDX file"),
    "dimensions": ("train-images-idx3", idx_bytes((3,), b"123"), r"\(00 00 08 03\)"),
    "header": ("train-images-idx3", idx_bytes((3, 28, 28), b"")[:10], "ends within its header"),
    "huge": ("train-images-idx3", idx_bytes((2**32 - 1,) * 3, b"1"), "impossible dimensions"),
    "none": ("train-labels-idx1", idx_bytes((0,), b""), "impossible dimensions"),
    "short": ("t10k-images-idx3", idx_images(2, 1)[:-1], "need 1568 bytes, but 1567 follow"),
    "long": ("t10k-labels-idx1", idx_bytes((2,), b"\1\2\3"), "need 2 bytes, but more follow"),
    "shape": ("t10k-images-idx3", idx_bytes((2, 8, 8), bytes(128)), "8 × 8 pixels"),
    "count": ("t10k-labels-idx1", idx_bytes((3,), b"\1\2\3"), "3 labels for the 2 images"),
    "label": ("t10k-labels-idx1", idx_bytes((2,), b"\1\x0a"), "label 10, but only 0 to 9"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_idx_files_are_named(tmp_path: Path, case: str, suffix: str) -> None:
    name, content, words = CORRUPT[case]
    write_idx(tmp_path / "mnist", "{}-ubyte" + suffix, **{name: content})
    with pytest.raises(UsageError, match=rf"{name}-ubyte{suffix}: .*{words}.*; get .*again"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(bytes(5000))[:-12]], ids=["none", "cut short"]
)
def test_corrupt_compression_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"train-labels-idx1-ubyte\.gz: .*; get the file again"):
        read_idx(path, 1)


def test_mnist_and_fashion_mnist_are_told_apart(tmp_path: Path) -> None:
    first = bytes([5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5, 3, 6, 1, 7, 2, 8, 6, 9])  # MNIST's
    write_idx(
        tmp_path,
        **{"train-labels-idx1": idx_bytes((20,), first), "train-images-idx3": idx_images(20, 1)},
    )
    assert available(tmp_path) == sorted([*GENERATED, "mnist"])
    assert load("mnist", tmp_path).train.labels.tolist() == list(first)
    with pytest.raises(UsageError, match="'fashion-mnist': nothing in"):
        load("fashion-mnist", tmp_path)


def test_missing_idx_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        load("fashion-mnist", tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    assert f"{tmp_path / 'fashion-mnist'}, {tmp_path};" in message
    assert "train-images-idx3-ubyte.gz" in message
    assert "t10k-labels-idx1-ubyte.gz" in message
    assert "apt install dataset-fashion-mnist" in message
    with pytest.raises(UsageError, match="unknown data set 'imagenet'; choose from cifar10,"):
        load("imagenet")
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        load("mnist", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        available(tmp_path / "nowhere")


def test_system_folders_are_searched_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, own = tmp_path / "system", tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(registry, "SYSTEM_FOLDERS", (system,))
    write_idx(system / "mnist")
    assert load("mnist").train.labels.tolist() == [7, 0, 9]
    assert load("mnist", own).train.labels.tolist() == [7, 0, 9]
    write_idx(own, **{"train-labels-idx1": idx_bytes((3,), b"\1\1\1")})
    assert load("mnist", own).train.labels.tolist() == [1, 1, 1]


def cifar_record(labels: list[int], start: int) -> bytes:
    """Pixels whose channels are start, start + 1, start + 2, but for the first row's second."""
    planes = [bytearray([start + channel] * 1024) for channel in range(3)]
    planes[0][1] = 200
    return bytes(labels) + b"".join(planes)


def cifar10_files() -> dict[str, bytes]:
    files = {
        f"data_batch_{b}.bin": cifar_record([b], 10 * b) + cifar_record([9], 10 * b + 5)
        for b in range(1, 6)
    }
    return files | {"test_batch.bin": cifar_record([3], 90)}


def cifar100_files() -> dict[str, bytes]:
    return {
        "train.bin": cifar_record([19, 99], 1) + cifar_record([0, 42], 2),
        "test.bin": cifar_record([5, 7], 3),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_archive(path: Path, inner: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in reversed(files.items()):
            member = tarfile.TarInfo(f"{inner}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("place", ["cifar10/cifar-10-batches-bin", "cifar10", "", "archive"])
def test_cifar10_is_read(tmp_path: Path, place: str) -> None:
    if place == "archive":
        write_archive(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", cifar10_files())
    else:
        write_files(tmp_path / place, cifar10_files())
    data = load("cifar10", tmp_path)
    assert (data.shape, data.classes, len(data.train), len(data.test)) == ((3, 32, 32), 10, 10, 1)
    assert data.train.labels.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]
    assert data.train.inputs[:, 0, 0, 0].tolist() == [10, 15, 20, 25, 30, 35, 40, 45, 50, 55]
    assert data.train.inputs[0, :, 0, 0].tolist() == [10, 11, 12]
    assert data.train.inputs[0, :, 0, 1].tolist() == [200, 11, 12]
    assert data.test.inputs[0, :, 31, 31].tolist() == [90, 91, 92]
    assert data.test.labels.tolist() == [3]


@pytest.mark.parametrize("packed", [False, True])
def test_cifar100_has_fine_labels(tmp_path: Path, packed: bool) -> None:
    if packed:
        write_archive(tmp_path / "cifar-100-binary.tar.gz", "cifar-100-binary", cifar100_files())
    else:
        write_files(tmp_path / "cifar100" / "cifar-100-binary", cifar100_files())
    data = load("cifar100", tmp_path)
    assert (data.classes, data.train.labels.tolist()) == (100, [99, 42])
    assert data.train.inputs[:, 2, 9, 9].tolist() == [3, 4]
    assert data.test.labels.tolist() == [7]


def test_corrupt_cifar_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10"
    files = cifar10_files()
    for name, content, words in [
        ("data_batch_2.bin", files["data_batch_2.bin"][:-1], "6145 bytes are not a whole number"),
        ("data_batch_2.bin", files["data_batch_2.bin"][:3073], "1 image, but data_batch_1"),
        ("test_batch.bin", b"", "0 bytes are not a whole number"),
        ("test_batch.bin", cifar_record([10], 0), "label 10, but only 0 to 9"),
    ]:
        write_files(folder, files | {name: content})
        with pytest.raises(UsageError, match=rf"{name}: .*{words}.*; get .* again"):
            load("cifar10", tmp_path)
    archive = tmp_path / "cifar-100-binary.tar.gz"
    write_archive(archive, "cifar-100-binary", {"train.bin": cifar_record([0, 0], 0)})
    with pytest.raises(UsageError, match=r"tar\.gz: lacks test\.bin; get the archive again"):
        load("cifar100", tmp_path)
    archive.write_bytes(archive.read_bytes()[:20])
    with pytest.raises(UsageError, match=r"tar\.gz: cannot be read .*; get it again"):
        load("cifar100", tmp_path)


def test_pickled_cifar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UsageError, match=r"binary version.*batches-py is the pickled Python"):
        load("cifar10", tmp_path)
    with pytest.raises(UsageError, match=r"put cifar-100-binary\.tar\.gz or the folder"):
        load("cifar100", tmp_path)


def test_digits_are_the_half_for_training_known() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data = load("digits")
    assert (data.shape, data.classes, len(data.train), len(data.test)) == ((1, 8, 8), 10, 718, 180)
    assert torch.bincount(data.test.labels).tolist() == [18] * 10
    originals = {image.astype("uint8").tobytes() for image in datasets.load_digits().images}
    for part in (data.train, data.test):
        assert part.inputs.dtype == torch.uint8
        assert set(part.inputs.unique().tolist()) <= set(range(0, 241, 15))
        assert all((image // 15).numpy().tobytes() in originals for image in part.inputs)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    glyphs._masks.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'know-predict\[collect\]'"):
        render_glyphs("greek", 1, 77)


class TestGlyphs:
    @pytest.fixture(autouse=True)
    def _fonts(self) -> None:
        pytest.importorskip("matplotlib")

    def test_are_determined_by_the_seed(self) -> None:
        first = render_glyphs("latin", 60, 5)
        render_glyphs.cache_clear()
        again, other = render_glyphs("latin", 60, 5), render_glyphs("latin", 60, 6)
        assert first is not again
        assert torch.equal(first.inputs, again.inputs)
        assert torch.equal(first.labels, again.labels)
        assert not torch.equal(first.inputs, other.inputs)
        assert not torch.equal(first.inputs[:24], render_glyphs("greek", 24, 5).inputs)

    @pytest.mark.parametrize(
        ("alphabet", "classes"), [("latin", 26), ("greek", 24), ("cyrillic", 30)]
    )
    def test_are_balanced_and_varied(self, alphabet: str, classes: int) -> None:
        samples = render_glyphs(alphabet, 100, 0)
        assert samples.inputs.shape == (100, 3, 32, 32)
        assert samples.inputs.dtype == torch.uint8
        counts = torch.bincount(samples.labels)
        assert (len(counts), int(counts.max() - counts.min())) == (classes, 1)
        assert len({image.numpy().tobytes() for image in samples.inputs}) == 100
        assert samples.inputs.float().std((1, 2, 3)).min() > 2  # None is blank.

    def test_can_be_told_apart(self) -> None:
        masks = glyphs._masks("greek")
        assert masks.shape == (24, 32, 64, 64)
        assert masks.sum((2, 3)).min() > 50  # Every letter is in every font.
        train, test = render_glyphs("greek", 960, 1), render_glyphs("greek", 240, 2)
        # How far pixels are from the mean colour, the same for light and dark letters.
        seen, asked = (
            (part.inputs.float() - part.inputs.float().mean((2, 3), keepdim=True))
            .square()
            .sum(1)
            .sqrt()
            .flatten(1)
            for part in (train, test)
        )
        seen, asked = (part / part.norm(dim=1, keepdim=True) for part in (seen, asked))
        centroids = torch.stack([seen[train.labels == label].mean(0) for label in range(24)])
        answers = torch.cdist(asked, centroids).argmin(1)
        correct = (answers == test.labels).float().mean()
        assert correct > 2.5 / 24

    def test_errors(self) -> None:
        with pytest.raises(UsageError, match="unknown alphabet 'runes'; choose from latin"):
            render_glyphs("runes", 1, 0)
        with pytest.raises(UsageError, match="0 images with seed 0"):
            render_glyphs("latin", 0, 0)


def decoded(samples: Samples) -> set[tuple[int, ...]]:
    return {tuple(passage) for passage in samples.inputs.tolist()}


def test_standard_library_text() -> None:
    data = load("text")
    assert (data.kind, data.classes, data.vocabulary, data.shape) == ("text", 12, 100, (100, 64))
    assert data.train.inputs.dtype == torch.int64
    assert 0 <= int(data.train.inputs.min()) <= int(data.train.inputs.max()) < 100
    assert not decoded(data.train) & decoded(data.test)
    assert len(decoded(data.train)) == len(data.train)
    assert torch.bincount(data.train.labels).min() > 300
    assert torch.bincount(data.test.labels).min() > 100
    again = load("text")
    assert torch.equal(data.train.inputs, again.train.inputs)
    assert (data.mean, data.deviation) == ((), ())


def words(first: int, n: int = 2000) -> str:
    return " ".join(f"w{first + 7 * number}" for number in range(n))


def test_text_of_a_folder(tmp_path: Path) -> None:
    corpus = tmp_path / "text"
    (corpus / "b" / "c").mkdir(parents=True)
    (corpus / "a.txt").write_text(words(1), encoding="utf-8")
    (corpus / "b" / "1.txt").write_text("Ж" * 3 + words(20_000, 50), encoding="utf-8")
    (corpus / "b" / "c" / "2.txt").write_text(words(30_000), encoding="utf-8")
    (corpus / "z.txt").write_text("äöü \n\n\t " + words(90_000), encoding="utf-8")
    (corpus / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "LICENSE.txt").write_text("not part of it", encoding="utf-8")
    for folder in (tmp_path, corpus):
        data = load("text", folder)
        assert (data.classes, data.shape) == (3, (100, 64))
        assert not decoded(data.train) & decoded(data.test)
    # Each passage occurs where the class says, and no two overlap.
    source = text._passages([corpus / "a.txt"])
    assert "".join(source) == words(1)[: len(source) * 64]
    assert len(source) == int((data.train.labels == 0).sum() + (data.test.labels == 0).sum())


def test_text_errors(tmp_path: Path) -> None:
    corpus = tmp_path / "text"
    corpus.mkdir()
    (corpus / "a.txt").write_text(words(1), encoding="utf-8")
    assert "text" not in available(tmp_path)
    with pytest.raises(UsageError, match=r"text: has 1 documents.*at least two \*\.txt files"):
        load("text", tmp_path)
    (corpus / "b.txt").write_text(words(1), encoding="utf-8")
    with pytest.raises(UsageError, match=r"b\.txt: has 0 different passages of 64.*20 are needed"):
        load("text", tmp_path)


def test_available_names_what_loads(tmp_path: Path) -> None:
    assert available() == available(tmp_path) == GENERATED
    write_idx(tmp_path / "fashion-mnist", "{}-ubyte.gz")
    write_files(tmp_path / "cifar100", cifar100_files())
    assert available(tmp_path) == sorted([*GENERATED, "fashion-mnist", "cifar100"])
    assert set(available(tmp_path)) <= set(DATA_SETS)
    (tmp_path / "cifar100" / "test.bin").unlink()
    assert "cifar100" not in available(tmp_path)


def test_standardise() -> None:
    inputs = torch.randint(256, (50, 2, 6, 5), generator=seeded(), dtype=torch.uint8)
    inputs[:, 1] //= 4
    samples = Samples(inputs, torch.zeros(50, dtype=torch.int64))
    data = DataSet("x", "image", samples, samples, 1)
    expected = inputs.double() / 255
    assert data.mean == pytest.approx(expected.mean((0, 2, 3)).tolist())
    assert data.deviation == pytest.approx(expected.std((0, 2, 3), correction=0).tolist())
    standard = standardise(inputs, data.mean, data.deviation)
    assert (standard.shape, standard.dtype) == (inputs.shape, torch.float32)
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(standard.std((0, 2, 3), correction=0), torch.ones(2))
    blank = Samples(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8), samples.labels[:2])
    constant = DataSet("x", "image", blank, blank, 1)
    assert (constant.mean, constant.deviation) == (pytest.approx((0.2,)), (1.0,))


class TestAugmentations:
    images = torch.randn(40, 3, 12, 16, generator=seeded(1))
    tokens = torch.randint(1, 100, (40, 64), generator=seeded(2))

    @pytest.mark.parametrize(
        ("kind", "name"), [(kind, name) for kind, names in AUGMENTATIONS.items() for name in names]
    )
    def test_keep_the_form_and_follow_the_generator(self, kind: str, name: str) -> None:
        inputs = self.images if kind == "image" else self.tokens
        before = inputs.clone()
        results = [AUGMENTATIONS[kind][name](inputs, seeded(seed)) for seed in (3, 3, 4)]
        assert results[0].shape == inputs.shape
        assert results[0].dtype == inputs.dtype
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2]) == (name == "none")
        assert torch.equal(inputs, before)

    def each(self, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(
            zip(self.images, AUGMENTATIONS["image"][name](self.images, seeded()), strict=True)
        )

    def test_flip(self) -> None:
        flipped = [torch.equal(after, before.flip(2)) for before, after in self.each("flip")]
        kept = [torch.equal(after, before) for before, after in self.each("flip")]
        assert [not one for one in flipped] == kept
        assert 8 < sum(flipped) < 32

    def test_shift(self) -> None:
        offsets = set()
        for before, after in self.each("shift"):
            padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
            found = [
                (y, x)
                for y in range(5)
                for x in range(5)
                if torch.equal(padded[:, y : y + 12, x : x + 16], after)
            ]
            assert len(found) == 1
            offsets.add(found[0])
        assert len(offsets) > 10

    def test_cutout(self) -> None:
        for before, after in self.each("cutout"):
            cut = after != before
            assert torch.equal(cut.any(0), cut.all(0))
            assert after[cut].abs().sum() == 0
            rows, columns = cut[0].any(1).sum(), cut[0].any(0).sum()
            assert 2 <= rows <= 5
            assert 2 <= columns <= 5
            assert cut[0].sum() == rows * columns

    def test_noise(self) -> None:
        difference = AUGMENTATIONS["image"]["noise"](self.images, seeded()) - self.images
        assert float(difference.std()) == pytest.approx(0.2, rel=0.03)

    def test_token_dropout(self) -> None:
        after = AUGMENTATIONS["text"]["token-dropout"](self.tokens, seeded())
        dropped = after != self.tokens
        assert (after[dropped] == 0).all()
        assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.02)


def test_real_fashion_mnist() -> None:
    if "fashion-mnist" not in available():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    data = load("fashion-mnist")
    assert (len(data.train), len(data.test), data.shape) == (60_000, 10_000, (1, 28, 28))
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10
    assert data.mean == pytest.approx((0.2860,), abs=1e-4)
    assert data.deviation == pytest.approx((0.3530,), abs=1e-4)
    images = standardise(data.train.inputs[:10_000], data.mean, data.deviation).flatten(1)
    centroids = torch.stack([images[data.train.labels[:10_000] == n].mean(0) for n in range(10)])
    asked = standardise(data.test.inputs[:2000], data.mean, data.deviation).flatten(1)
    correct = torch.cdist(asked, centroids).argmin(1) == data.test.labels[:2000]
    assert correct.float().mean() > 0.6
