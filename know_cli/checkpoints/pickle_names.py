"""What a pickle may name, and what is made of it instead of the thing itself.

:mod:`know_cli.checkpoints.unpickling` never imports or calls anything. A name in a pickle stays a
piece of text (:class:`Name`), and is accepted only if it is on the list in here. Where the pickle
calls it, one of this module's functions gets the arguments, and makes a dict or a list, the
description of a tensor (:class:`PickledTensor`), or a mark that only says which class of object
was there (:class:`Opaque`). State that a pickle sets on an object is dropped. So nothing on the
list can do anything, whatever it is called with. The list is there to tell a checkpoint with
settings beside its tensors from a file that is meant to run something, which is refused.

What is on it, and why that is safe:

- **torch**: what tensors, parameters, sizes, devices and element types are saved as. Tensors
  become descriptions whose numbers are checked; the others become marks.
- **containers** (``OrderedDict``, ``defaultdict``, ``Counter``, ``deque``, ``set``, the dicts
  with attributes that configuration libraries use): they become plain dicts and lists. The
  factory of a ``defaultdict`` is never called.
- **values** (``argparse.Namespace``, ``SimpleNamespace``, paths, dates, ``Decimal``,
  ``Fraction``, ``UUID``, numpy's scalars, arrays and dtypes, the nodes of omegaconf): settings
  and records that trainers save. Only the name of the class is kept: no path is opened, no time
  zone is read, and numpy's C code never sees the bytes.
- **builtin types**, and ``_codecs.encode``, with which protocol 2 writes ``bytes``: only the
  encodings that pickles use are carried out, by ``str.encode``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from know_cli.errors import quoted

_MAX_COUNT = 2**63


class PickleError(Exception):
    """A pickle that cannot be read; the message follows the name of the file."""


class ForbiddenError(PickleError):
    """A pickle names something that is not on the list; the message is that name."""


@dataclass(frozen=True, slots=True)
class Name:
    """Something that a pickle names, such as a class: its module and name as text."""

    path: str


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """An object of which only the class is known, by its name."""

    kind: str


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory that tensors were views of.

    Attributes:
        key: names its record in the file.
        elements: how many the pickle claims that it has.
        dtype: torch's name of the element type, such as ``float32``; ``uint8`` for plain bytes.
        element_bytes: size of an element.
    """

    key: str
    elements: int
    dtype: str
    element_bytes: int

    @property
    def nbytes(self) -> int:
        """The size that the pickle claims."""
        return self.elements * self.element_bytes


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as a pickle describes it; its data are elsewhere in the file.

    Attributes:
        dtype: torch's name of the element type, such as ``float32``.
        shape: of the tensor.
        strides: distance between neighbours along each dimension, in elements.
        offset: of the first element in the storage, in elements.
        storage: where its data are; None where it has none, which ``problem`` explains.
        problem: why it cannot be written as a plain tensor; empty if it can.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: Storage | None
    problem: str = ""


# torch's storage classes → element type and its size in bytes.
_STORAGES: dict[str, tuple[str, int]] = {
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1),
    "QInt32Storage": ("qint32", 4),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
    "UntypedStorage": ("uint8", 1),
}
_DTYPES = (
    "float64 float32 float16 bfloat16 bool int64 int32 int16 int8 uint64 uint32 uint16 uint8 "
    "complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz "
    "float8_e8m0fnu float4_e2m1fn_x2 qint8 quint8 qint32 quint4x2 quint2x4 bits8 bits16 bits1x8 "
    "bits2x4 bits4x2 int1 int2 int3 int4 int5 int6 int7 uint1 uint2 uint3 uint4 uint5 uint6 uint7"
)
_QSCHEMES = (
    "per_tensor_affine per_channel_affine per_tensor_symmetric per_channel_symmetric "
    "per_channel_affine_float_qparams"
)
_NO_PLAIN_TENSORS = (
    "_utils._rebuild_sparse_tensor _utils._rebuild_sparse_csr_tensor _utils._rebuild_qtensor "
    "_utils._rebuild_nested_tensor _utils._rebuild_meta_tensor_no_storage "
    "_utils._rebuild_wrapper_subclass _utils._rebuild_device_tensor_from_numpy "
    "nn.parameter.UninitializedParameter nn.parameter.UninitializedBuffer"
)
_MAPPINGS = (
    "collections.OrderedDict collections.defaultdict collections.Counter builtins.dict "
    "lightning_fabric.utilities.data.AttributeDict lightning.fabric.utilities.data.AttributeDict "
    "pytorch_lightning.utilities.parsing.AttributeDict easydict.EasyDict addict.addict.Dict "
    "yacs.config.CfgNode"
)
_SEQUENCES = (
    "builtins.set builtins.frozenset builtins.list builtins.tuple collections.deque torch.Size"
)
_VALUES = (
    "argparse.Namespace types.SimpleNamespace decimal.Decimal fractions.Fraction uuid.UUID "
    "uuid.SafeUUID datetime.datetime datetime.date datetime.time datetime.timedelta "
    "datetime.timezone zoneinfo.ZoneInfo._unpickle builtins.bytearray "
    "builtins.complex builtins.slice builtins.range builtins.int builtins.float builtins.bool "
    "builtins.str builtins.object numpy.dtype numpy.ndarray torch.device torch.layout "
    "torch.strided torch.serialization._get_layout torch.torch_version.TorchVersion torch.Tensor "
    "torch.nn.parameter.Parameter torch.nn.parameter.Buffer torch.storage.UntypedStorage "
    "torch.storage.TypedStorage typing.Any omegaconf.dictconfig.DictConfig "
    "omegaconf.listconfig.ListConfig omegaconf.base.Metadata omegaconf.base.ContainerMetadata "
    "omegaconf.nodes.AnyNode omegaconf.nodes.IntegerNode omegaconf.nodes.FloatNode "
    "omegaconf.nodes.StringNode omegaconf.nodes.BooleanNode omegaconf.nodes.PathNode "
    "omegaconf.nodes.BytesNode"
)
_PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"
_NUMPY_SCALARS = (
    "bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 "
    "longdouble complex64 complex128 str_ bytes_ datetime64 timedelta64 longlong ulonglong"
)
_NUMPY_MAKERS = "multiarray.scalar multiarray._reconstruct numeric._frombuffer"
# What modules and classes were called in Python 2, which protocol 2 keeps to.
_RENAMED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_RENAMED = {
    "builtins.unicode": "builtins.str",
    "builtins.long": "builtins.int",
    "builtins.xrange": "builtins.range",
}
_NO_PLAIN_TENSOR = "is sparse, quantised or without data; save it as a plain tensor"

_Arguments = tuple[Any, ...]
_Builder = Callable[[_Arguments], Any]


def allowed_names() -> frozenset[str]:
    """Everything that a pickle may name, each as its module and name.

    >>> "pathlib.PosixPath" in allowed_names(), "posix.system" in allowed_names()
    (True, False)
    """
    return frozenset(_ALLOWED)


def named(module: Any, name: Any) -> Name:
    """The stand-in for what a pickle names.

    Raises:
        ForbiddenError: it is not on the list.
        PickleError: it is no name.
    """
    if not isinstance(module, str) or not isinstance(name, str):
        raise PickleError("is damaged: it has a name that is not text")
    path = f"{_RENAMED_MODULES.get(module, module)}.{name}"
    path = _RENAMED.get(path, path)
    if path not in _ALLOWED:
        raise ForbiddenError(path)
    return Name(path)


def called(name: Any, arguments: Any) -> Any:
    """The stand-in for what calling a name would give.

    Raises:
        PickleError: it is no name, or the arguments cannot be what it takes.
    """
    if not isinstance(name, Name) or not isinstance(arguments, tuple):
        raise PickleError("is damaged: it calls what is no function")
    return _ALLOWED[name.path](arguments)


def storage_of(reference: Any) -> Storage:
    """The storage that a pickle of ``torch.save`` refers to.

    Args:
        reference: ``("storage", class, key, device, number of elements)``; before PyTorch 1.6
            with a last item, a view's place, which is None in everything newer than 0.4.

    Raises:
        PickleError: it is something else.
    """
    if isinstance(reference, tuple) and len(reference) in (5, 6) and reference[0] == "storage":
        _, kind, key, _, elements, *view = reference
        if isinstance(kind, Name) and isinstance(key, str) and view in ([], [None]):
            dtype, size = _STORAGES.get(kind.path.rpartition(".")[2], ("", 0))
            if dtype:
                return Storage(key, _counts((elements,))[0], dtype, size)
    raise PickleError("is damaged, or refers to its data in an unknown way")


def key_of(value: Any) -> Any:
    """A value that can be the key of a dict.

    Raises:
        PickleError: it cannot, or hashing it could take for ever, as of tuples in tuples.
    """
    parts = value if isinstance(value, tuple) else (value,)
    if all(isinstance(part, (str, int, float, bytes, Name, Opaque, type(None))) for part in parts):
        # Python does not show longer numbers, which messages would have to.
        if any(isinstance(part, int) and part.bit_length() > 64 for part in parts):
            raise PickleError("is damaged: a dict has a number as a key that is too long")
        return value
    raise PickleError("is damaged: a dict has a container as a key")


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise PickleError("is damaged: the shape of a tensor is no list of numbers")
    for item in value:
        if type(item) is not int or not 0 <= item < _MAX_COUNT:
            # Containers are not shown: they can be of any size, and in themselves.
            shown = quoted(item) if isinstance(item, (int, str)) else "a container"
            raise PickleError(f"is damaged: {shown} is no size of a tensor")
    return tuple(value)


def _tensor(arguments: _Arguments, dtype: str, metadata: Any) -> PickledTensor:
    storage, offset, shape, strides = arguments[:4]
    (offset,), shape, strides = _counts((offset,)), _counts(shape), _counts(strides)
    if len(shape) != len(strides):
        raise PickleError("is damaged: a tensor has not as many strides as dimensions")
    problem = ""
    if metadata:  # marks of a conjugation or negation that is still to be done
        problem = "is a conjugate or negative view; save a copy of it"
    return PickledTensor(dtype or storage.dtype, shape, strides, offset, storage, problem)


def _tensor_v2(arguments: _Arguments) -> PickledTensor:
    """(storage, offset, shape, strides, requires_grad, hooks, metadata), the last few optional."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise PickleError("is damaged: a tensor has no storage")
    return _tensor(arguments, "", arguments[6] if len(arguments) > 6 else None)


def _tensor_v3(arguments: _Arguments) -> PickledTensor:
    """As :func:`_tensor_v2`, with the element type before the metadata."""
    if len(arguments) < 7 or not isinstance(arguments[0], Storage):
        raise PickleError("is damaged: a tensor has no storage")
    dtype = arguments[6].path if isinstance(arguments[6], Name) else ""
    if dtype.removeprefix("torch.") not in _DTYPES.split():
        raise PickleError("is damaged: a tensor has no element type")
    metadata = arguments[7] if len(arguments) > 7 else None
    return _tensor(arguments, dtype.removeprefix("torch."), metadata)


def _no_plain_tensor(_: _Arguments) -> PickledTensor:
    return PickledTensor("", (), (), 0, None, _NO_PLAIN_TENSOR)


def _parameter(arguments: _Arguments) -> PickledTensor:
    if not arguments or not isinstance(arguments[0], PickledTensor):
        raise PickleError("is damaged: a parameter has no tensor")
    return arguments[0]


def _typed_tensor(arguments: _Arguments) -> PickledTensor:
    """(function, class, arguments, state): a tensor with attributes, or of another class."""
    maker = arguments[0] if len(arguments) == 4 else None
    # One of the functions that make a plain tensor, not this one again and again.
    if isinstance(maker, Name) and maker.path.startswith("torch._utils."):
        return _parameter((called(maker, arguments[2]),))
    raise PickleError("is damaged: a tensor of a class of its own has no data")


def _mapping(arguments: _Arguments) -> dict[Any, Any]:
    """A dict as any of its classes is made: of nothing, of a dict, or of pairs."""
    found: dict[Any, Any] = {}
    for argument in arguments:
        if isinstance(argument, dict):
            found.update(argument)
        elif isinstance(argument, list):
            for pair in argument:
                if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                    raise PickleError("is damaged: a dict is made of what are no pairs")
                found[key_of(pair[0])] = pair[1]
    return found


def _sequence(arguments: _Arguments) -> list[Any]:
    first = arguments[0] if arguments else ()
    return list(first) if isinstance(first, (list, tuple)) else []


def _encoded(arguments: _Arguments) -> bytes:
    text, *encodings = arguments or (None,)
    if isinstance(text, str) and encodings in (["latin1"], ["latin-1"], ["utf-8"]):
        return text.encode(encodings[0])
    raise PickleError("is damaged: it has bytes in an encoding that pickles do not use")


def _reconstructed(arguments: _Arguments) -> Any:
    """(class, …): how any object is made before its state is set."""
    return called(arguments[0] if arguments else None, ())


def _empty_bytes(_: _Arguments) -> bytes:
    """How protocol 2 writes bytes that are none; all others are encoded."""
    return b""


def _opaque(path: str) -> _Builder:
    return lambda _: Opaque(path)


def _table() -> dict[str, _Builder]:
    opaque = _VALUES.split()
    opaque += [f"torch.{name}" for name in f"{_DTYPES} {_QSCHEMES}".split()]
    opaque += [f"numpy.{name}" for name in _NUMPY_SCALARS.split()]
    # The second of each is its module in newer versions.
    opaque += [f"{at}.{name}" for at in ("pathlib", "pathlib._local") for name in _PATHS.split()]
    for core in ("core", "_core"):
        opaque += [f"numpy.{core}.{name}" for name in _NUMPY_MAKERS.split()]
    for device in ("torch", "torch.cuda"):
        opaque += [f"{device}.{name}" for name in _STORAGES if name != "UntypedStorage"]
        opaque += [f"{device}.{name.removesuffix('Storage')}Tensor" for name in _STORAGES]
    return {
        **{path: _opaque(path) for path in opaque},
        **dict.fromkeys(_MAPPINGS.split(), _mapping),
        **dict.fromkeys(_SEQUENCES.split(), _sequence),
        **{f"torch.{name}": _no_plain_tensor for name in _NO_PLAIN_TENSORS.split()},
        "_codecs.encode": _encoded,
        "builtins.bytes": _empty_bytes,
        "copyreg._reconstructor": _reconstructed,
        "torch._utils._rebuild_tensor": _tensor_v2,
        "torch._utils._rebuild_tensor_v2": _tensor_v2,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": _parameter,
        "torch._tensor._rebuild_from_type_v2": _typed_tensor,
    }


_ALLOWED: Mapping[str, _Builder] = _table()
