"""Pickles are read as data: what may be named, what becomes of it, and that nothing is run."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import io
import pathlib
import pickle
import sys
import types
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from know_cli.checkpoints.pickle_names import (
    ForbiddenError,
    Name,
    Opaque,
    PickledTensor,
    PickleError,
    Storage,
    allowed_names,
    called,
)
from know_cli.checkpoints.unpickling import unpickle
from know_cli.errors import EXIT_DONE
from tests.support.command import Command

PROTOCOLS = [2, 3, 4, 5]


def read(content: bytes) -> Any:
    return unpickle(io.BytesIO(content), len(content))


def through_torch(value: Any, protocol: int) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    with zipfile.ZipFile(buffer) as archive:
        return read(archive.read("archive/data.pkl"))


plain = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
        st.integers(2**31, 2**80), st.binary(min_size=256, max_size=300), st.text(min_size=256, max_size=300),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers(-(2**63), 2**63), st.tuples(st.text(), st.none())), inner, max_size=5),
    ),
    max_leaves=20,
)  # fmt: skip


@given(plain, st.sampled_from(PROTOCOLS))
def test_plain_data_come_out_as_they_went_in(value: Any, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value
    assert through_torch(value, protocol) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_become_dicts_and_lists(protocol: int) -> None:
    shared = [1]
    content = {
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("abca"),
        "deque": collections.deque([1, 2], maxlen=3),
        "set": {1}, "frozen": frozenset([1]), "size": torch.Size([2, 3]),
        "bytes": b"\0\xff", "shared": [shared, shared],
    }  # fmt: skip
    assert through_torch({**content, "frozen": 0}, protocol) == {
        "ordered": {"b": 1, "a": 2}, "default": {"a": [1]}, "counter": {"a": 2, "b": 1, "c": 1},
        "deque": [1, 2], "set": [1], "frozen": 0, "size": [2, 3], "bytes": b"\0\xff",
        "shared": [[1], [1]],
    }  # fmt: skip
    assert list(through_torch(content, protocol)["frozen"]) == [1]
    with pytest.raises(PickleError):
        through_torch({frozenset([(1, (2,))]): 1}, protocol)


VALUES: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace(lr=0.1, path=Path("x")),
    "types.SimpleNamespace": types.SimpleNamespace(a=1),
    "pathlib.PosixPath": pathlib.PosixPath("a/b"),
    "pathlib.PureWindowsPath": pathlib.PureWindowsPath("a/b"),
    "datetime.datetime": datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
    "datetime.date": datetime.date(2020, 1, 1),
    "datetime.timedelta": datetime.timedelta(1),
    "decimal.Decimal": decimal.Decimal("0.1"),
    "fractions.Fraction": fractions.Fraction(1, 3),
    "uuid.UUID": uuid.UUID(int=1),
    "numpy._core.multiarray.scalar": np.float32(1),
    "numpy.dtype": np.dtype("int8"),
    "builtins.complex": 1j,
    "builtins.range": range(3),
    "builtins.slice": slice(1, 2),
    "torch.device": torch.device("cpu"),
    "torch.serialization._get_layout": torch.strided,
    "torch.torch_version.TorchVersion": torch.__version__,
}
NAMED: dict[str, Any] = {
    "torch.float32": torch.float32,
    "numpy.float64": np.float64,
    "builtins.dict": dict,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", VALUES)
def test_values_become_marks_of_their_class(kind: str, protocol: int) -> None:
    found = through_torch({"value": VALUES[kind], "after": 1}, protocol)
    assert found.keys() == {"value", "after"}
    assert isinstance(found["value"], Opaque)
    # Before numpy 2 and in Python 3.13 some modules have another name.
    assert found["value"].kind.split(".")[-1] == kind.split(".")[-1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("path", NAMED)
def test_types_stay_names(path: str, protocol: int) -> None:
    assert through_torch([NAMED[path]], protocol) == [Name(path)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_numpy_are_marks(protocol: int) -> None:
    state = np.random.RandomState(0).get_state()
    found = through_torch({"array": np.arange(3.0), "random": state}, protocol)
    assert isinstance(found["array"], Opaque)
    assert isinstance(found["random"][1], Opaque)


def test_tensors_become_descriptions() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    typed = torch.ones(2)
    typed.note = "x"  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "x"  # type: ignore[attr-defined]
    found = through_torch(
        {
            "all": values, "part": values[1:, 1].T, "parameter": torch.nn.Parameter(torch.ones(2)),
            "noted": typed, "noted parameter": parameter, "new": torch.ones(2, dtype=torch.uint16),
            "buffer": torch.nn.Buffer(torch.ones(2)) if hasattr(torch.nn, "Buffer") else typed,
        },
        2,
    )  # fmt: skip
    storage = Storage("0", 12, "float32", 4)
    assert found["all"] == PickledTensor("float32", (3, 4), (4, 1), 0, storage)
    assert found["part"] == PickledTensor("float32", (2,), (4,), 5, storage)
    assert found["new"].dtype == "uint16"
    assert found["new"].storage.nbytes == 4
    for name in ("parameter", "noted", "noted parameter", "buffer"):
        assert found[name].shape == (2,)
        assert found[name].problem == ""


@pytest.mark.parametrize(
    "path",
    [
        "lightning_fabric.utilities.data.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "omegaconf.dictconfig.DictConfig",
        "easydict.EasyDict",
    ],
)
def test_what_is_not_installed_is_not_imported(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of other libraries are read where these libraries are not."""
    module, _, name = path.rpartition(".")
    cls = type(name, (dict,), {"__module__": module})
    with monkeypatch.context() as patch:
        parts = module.split(".")
        for length in range(1, len(parts) + 1):
            at = ".".join(parts[:length])
            patch.setitem(sys.modules, at, types.ModuleType(at))
        setattr(sys.modules[module], name, cls)
        content = cls(lr=0.1)
        content.__dict__["note"] = 1
        pickled = pickle.dumps({"hyper_parameters": content}, 2)
    assert module not in sys.modules
    found = read(pickled)["hyper_parameters"]
    assert found == {"lr": 0.1} or isinstance(found, Opaque)
    assert module not in sys.modules


def stack_global(module: str, name: str, *rest: bytes) -> bytes:
    text = [pickle.SHORT_BINUNICODE + bytes([len(t)]) + t.encode() for t in (module, name)]
    return b"\x80\x04" + b"".join(text) + b"\x93" + b"".join(rest) + b"."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"),
        ("builtins", "__import__"), ("subprocess", "Popen"), ("torch", "load"), ("torch.hub", "load"),
        ("torch.storage", "_load_from_bytes"), ("torch", "float32.__class__"), ("collections", "OrderedDict.update"),
        ("numpy", "load"), ("numpy.testing", "runstring"), ("copyreg", "add_extension"), ("", ""),
        ("pathlib", "Path.unlink"), ("functools", "partial"), ("operator", "attrgetter"), ("sys", "exit"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("codecs", "encode"), ("know_cli.files", "write_bytes"),
    ],
)  # fmt: skip
def test_other_names_are_refused(module: str, name: str) -> None:
    for content in (f"c{module}\n{name}\n.".encode(), stack_global(module, name, b")R")):
        with pytest.raises(ForbiddenError) as error:
            read(content)
        assert str(error.value) == f"{module}.{name}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02cbuiltins\nlist\n}R.", "calls what is no function"),
        (b"\x80\x04K\x01K\x02\x93.", "has a name that is not text"),
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0rot13\x86R.", "in an encoding that pickles do not use"),
        (b"\x80\x02ccollections\nOrderedDict\n]K\x01a\x85R.", "made of what are no pairs"),
        (b"\x80\x02ccopyreg\n_reconstructor\n)R.", "calls what is no function"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.", "a parameter has no tensor"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "a tensor has no storage"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n)R.", "a tensor has no storage"),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n)R.", "a tensor of a class of its own has no data"),
        (b"\x80\x02K\x01Q.", "refers to its data in an unknown way"),
        (b"\x80\x02(cposix\nsystem\nX\x01\0\0\0ao.", "posix.system"),
        (b"\x80\x02(X\x01\0\0\0aiposix\nsystem\n.", "no pickle of torch.save has INST"),
        (b"\x80\x05\x97.", "no pickle of torch.save has NEXT_BUFFER"),
        (b"\x80\x02P0\n.", "no pickle of torch.save has PERSID"),
        (b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "is damaged"),
        (b"\x80\x02T\xff\xff\xff\x7f", "is damaged"),
        (b"\x80\x02I" + b"1" * 100_000, "is damaged"),
        (b"\x80\x02\x85.", "nothing to make a tuple of"),
        (b"\x80\x02}\x8a\x0a" + b"\x7f" * 10 + b"Ns.", "a number as a key that is too long"),
        (b"\x80\x02}(K\x01u.", "is damaged"),
        (b"\x80\x02\xff.", "is damaged"),
        (b"\x80\x02", "is damaged"),
        (b".", "is damaged"),
    ],
)  # fmt: skip
def test_damaged_pickles_are_named(content: bytes, message: str) -> None:
    with pytest.raises(PickleError, match=message):
        read(content)


def test_what_protocols_hardly_use() -> None:
    assert read(b"\x80\x02(K\x01K\x02l.") == [1, 2]
    assert read(b"\x80\x02(K\x01K\x02d.") == {1: 2}
    assert read(b"\x80\x02K\x01K\x020.") == 1
    assert read(b"\x80\x02K\x01(0.") == 1
    assert read(b"\x80\x02K\x01(K\x02K\x031.") == 1
    assert read(b"\x80\x02K\x012\x86.") == (1, 1)
    assert read(b"\x80\x02U\x02\xc3\xa9.") == "é"  # as Python 2 wrote a name
    assert len(read(pickle.dumps({np.int64(1): "a", np.int64(2): "b"}, 2))) == 2
    assert read(b"\x80\x02c__builtin__\nunicode\n.") == Name("builtins.str")


def test_state_that_is_set_changes_nothing_of_ours() -> None:
    """The attributes that a pickle sets on dicts, tensors and marks are dropped."""
    before = dict(Opaque.__dict__)
    content = read(b"\x80\x02}}X\x05\0\0\0itemsK\x01sb.")
    assert content == {}
    assert callable(content.items)
    assert isinstance(read(b"\x80\x02cargparse\nNamespace\n)\x81}X\x04\0\0\0kindK\x01sb."), Opaque)
    with pytest.raises(PickleError, match="sets the state of what has none"):
        read(b"\x80\x02cargparse\nNamespace\n}X\x04\0\0\0pathK\x01sb.")
    assert dict(Opaque.__dict__) == before


arguments = st.lists(
    st.one_of(
        st.none(), st.integers(), st.text(), st.binary(), st.just(Name("builtins.list")), st.just({"a": 1}),
        st.just([("a", 1)]), st.just((1, 2)), st.just(Storage("0", 4, "float32", 4)),
        st.just(PickledTensor("float32", (), (), 0, None)), st.just(Name("torch._utils._rebuild_tensor_v2")),
    ),
    max_size=8,
).map(tuple)  # fmt: skip


@given(st.sampled_from(sorted(allowed_names())), arguments)
def test_whatever_is_called_with_whatever_only_data_come_of_it(
    path: str, called_with: tuple[Any, ...]
) -> None:
    try:
        found = called(Name(path), called_with)
    except (PickleError, UnicodeEncodeError):
        return
    assert type(found) in (dict, list, bytes, Opaque, PickledTensor)


def test_a_nest_of_calls_is_no_nest_of_ours() -> None:
    """Arguments in arguments in arguments: nothing recurs, and nothing is left to do at the end."""
    step = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    with pytest.raises(PickleError, match="a tensor of a class of its own"):
        read(b"\x80\x02" + step + b"(" + step * 2 + b")}" + b"tR.")
    deep = read(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")
    assert type(deep) is list
    with pytest.raises(PickleError, match="a dict has a container as a key"):
        # Tuples of tuples of tuples: hashing them would take for ever.
        read(b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.")


def test_the_length_of_a_pickle_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from know_cli.checkpoints import unpickling

    monkeypatch.setattr(unpickling, "_MAX_INSTRUCTIONS", 100)
    with pytest.raises(PickleError, match="more than the 100 steps"):
        read(b"\x80\x02" + b"]" * 200 + b".")
    monkeypatch.setattr(unpickling, "MAX_PICKLE_BYTES", 50)
    with pytest.raises(PickleError, match="is damaged"):
        read(b"\x80\x02]" + b"0]" * 30 + b".")


def test_a_training_state_with_all_of_it(tmp_path: Path, know: Command) -> None:
    content = {
        "model": {"w": torch.arange(3.0)}, "args": VALUES["argparse.Namespace"],
        "best": np.float64(0.5), "when": VALUES["datetime.datetime"], "out": Path("runs"),
        "dtype": torch.bfloat16, "history": collections.defaultdict(list, loss=[1.0]),
        "rng": [torch.get_rng_state(), np.random.RandomState(0).get_state()],
    }  # fmt: skip
    torch.save(content, tmp_path / "in.pt")
    done = know("convert", "in.pt", "-o", "out.safetensors", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert done.stderr == "taking the state dict under 'model'\n"
