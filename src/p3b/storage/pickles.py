"""What a pickle of weights would make, worked out on paper.

torch's weights-only mode runs no code, yet it believes what a file says about itself: a byte array of 2^40 zeros is made, a
view that claims more elements than its storage has lets the storage grow to fit, keys that all collide cost hours. Here the
instructions are followed without carrying them out: a tensor becomes a `TensorClaim`, everything else the plain value it is.
What torch may then be asked to do has been seen before it does it.

Only instructions that torch's weights-only mode knows are followed, and of what it would call only what plain checkpoints need.
"""

from __future__ import annotations

import math
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

MOST_INSTRUCTIONS = 1 << 20
"""A checkpoint of 1000 tensors with optimizer state takes 100 thousand; this many are followed in a few seconds."""

MOST_DIMENSIONS = 64  # torch's own limit

_PLAIN_KEYS = (str, bytes, int, float, bool, type(None))  # of keys whose hashes a file can choose freely, a few cost hours
_STORAGES: dict[str, torch.dtype | None] = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ByteStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": None,
}


class NotPlainError(ValueError):
    """The pickle makes or calls something that is neither a tensor nor a plain value; its argument is that thing's name."""


@dataclass(frozen=True)
class StorageClaim:
    """Memory that a file says to hold: its name there, its bytes, and the dtype that all its tensors have (None: any)."""

    key: str
    nbytes: int
    dtype: torch.dtype | None


@dataclass(frozen=True)
class TensorClaim:
    """A tensor that a file says to hold, as a view of a storage (offset and strides in elements)."""

    storage: StorageClaim
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements, were each of them written out."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether the tensor begins where its storage does and has as many elements."""
        return self.offset == 0 and self.nbytes == self.storage.nbytes


@dataclass(frozen=True)
class Named:
    """Something that is named and not looked into: a class, a dtype, a device, a namespace."""

    name: str


@dataclass(frozen=True)
class Sketch:
    """What a pickle would make: plain containers and values, with a claim in the place of each tensor."""

    content: Any
    tensors: tuple[TensorClaim, ...]
    storages: dict[str, StorageClaim]


def sketch(file: BinaryIO) -> Sketch:
    """Follow one pickle, from where the file stands to its end; the file then stands behind it.

    Raises:
        NotPlainError: it makes or calls something that is neither a tensor nor a plain value.
        ValueError: it is damaged, or claims more than its storages hold.
    """
    return _Reader().read(file)


class _Reader:
    """A stack machine as the pickle module's, on which nothing is called that the file names."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._tensors: list[TensorClaim] = []
        self._storages: dict[str, StorageClaim] = {}
        self._acts: dict[str, Callable[[Any], None]] = {
            "PROTO": self._protocol,
            "MARK": lambda _: self._mark(),
            "NONE": lambda _: self._stack.append(None),
            "NEWTRUE": lambda _: self._stack.append(True),
            "NEWFALSE": lambda _: self._stack.append(False),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "EMPTY_LIST": lambda _: self._stack.append([]),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "EMPTY_SET": lambda _: self._stack.append(set()),
            **dict.fromkeys(
                ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
                lambda value: self._stack.append(value),
            ),
            "GLOBAL": lambda name: self._stack.append(Named(_modern_name(name))),
            "TUPLE": lambda _: self._tuple(None),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "APPEND": lambda _: self._append([self._stack.pop()]),
            "APPENDS": lambda _: self._append(self._to_mark()),
            "SETITEM": lambda _: self._set_items([self._stack.pop(-2), self._stack.pop()]),
            "SETITEMS": lambda _: self._set_items(self._to_mark()),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._remember),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda index: self._stack.append(self._memo[index])),
            "BINPERSID": lambda _: self._stack.append(self._storage(self._stack.pop())),
            "REDUCE": lambda _: self._call(),
            "NEWOBJ": lambda _: self._new(),
            "BUILD": lambda _: self._build(),
            "STOP": lambda _: None,
        }

    def read(self, file: BinaryIO) -> Sketch:
        try:
            for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
                if count == MOST_INSTRUCTIONS:
                    raise ValueError(f"its pickle has more than {MOST_INSTRUCTIONS} instructions")
                act = self._acts.get(instruction.name)
                if act is None:
                    raise ValueError(f"its pickle has the instruction {instruction.name}, which torch's weights files do not")
                act(argument)
            content = self._stack.pop()
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"its pickle makes no sense ({type(error).__name__})") from error
        return Sketch(content, tuple(self._tensors), self._storages)

    def _protocol(self, version: int) -> None:
        if version not in (2, 3):
            raise ValueError(f"its pickle is of protocol {version}, torch's are of 2")

    def _mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _tuple(self, size: int | None) -> None:
        if size is None:
            items = self._to_mark()
        else:
            if len(self._stack) < size:
                raise IndexError
            items = self._stack[-size:]
            del self._stack[-size:]
        self._stack.append(tuple(items))

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError
        self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain_key(key)] = value

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    # --- what torch would call

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Named or type(arguments) is not tuple:
            raise TypeError
        self._stack.append(self._result(function.name, arguments))

    def _result(self, name: str, arguments: tuple[Any, ...]) -> Any:
        match name, arguments:
            case "torch._utils._rebuild_tensor", (storage, offset, shape, stride):
                return self._tensor(storage, offset, shape, stride)
            case "torch._utils._rebuild_tensor_v2", (storage, offset, shape, stride, bool(), _, *rest) if _is_empty(rest):
                return self._tensor(storage, offset, shape, stride)
            case "torch._utils._rebuild_tensor_v3", (storage, offset, shape, stride, bool(), _, Named(dtype), *rest) if (
                _is_empty(rest)
            ):
                return self._tensor(storage, offset, shape, stride, dtype)
            case "torch._utils._rebuild_parameter", (TensorClaim() as tensor, bool(), _):
                return tensor
            case "torch.Size", (tuple() as sizes,) if all(type(size) is int for size in sizes):
                return sizes
            case "torch.device", (str(),) | (str(), int()):
                return Named(name)
            case "collections.OrderedDict" | "collections.Counter", ():
                return OrderedDict() if name.endswith("OrderedDict") else Counter()
            case "collections.OrderedDict", (list() as pairs,):
                return OrderedDict((_plain_key(key), value) for key, value in pairs)
            case "collections.Counter", (dict() as counts,):
                return Counter(counts)
            case "builtins.set", (list() as items,):
                return {_plain_key(item) for item in items}
            case "builtins.complex", (float(), float()):
                return complex(*arguments)
            case "builtins.bytearray", (bytes() as content,):
                return content
            case (("_codecs.encode" | "builtins.bytearray"), (str() as text, "latin1" | "latin-1")):
                return text.encode("latin-1")
        raise NotPlainError(name)

    def _new(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if kind != Named("argparse.Namespace") or arguments != ():
            raise NotPlainError(kind.name if isinstance(kind, Named) else type(kind).__name__)
        self._stack.append(kind)

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is not OrderedDict and target != Named("argparse.Namespace"):
            raise NotPlainError(target.name if isinstance(target, Named) else type(target).__name__)
        if type(state) not in (dict, OrderedDict) or not all(type(key) is str for key in state):
            raise TypeError

    # --- claims

    def _storage(self, described: Any) -> StorageClaim:
        match described:
            case ("storage", Named(kind), str(key), str(), int(numel), *rest) if len(rest) <= 1:
                pass
            case _:
                raise ValueError("its pickle names a storage in a way that is not known")
        room, _, kind = kind.rpartition(".")
        if room not in ("torch", "torch.cuda", "torch.storage") or kind not in _STORAGES:
            raise NotPlainError(f"{room}.{kind}")
        dtype = _STORAGES[kind]
        itemsize = 1 if dtype is None else dtype.itemsize
        if numel < 0 or type(numel) is not int:
            raise ValueError(f"storage {key} has a size of {numel}")
        claim = StorageClaim(key, numel * itemsize, dtype)
        if self._storages.setdefault(key, claim) != claim:
            raise ValueError(f"storage {key} is described in two ways")
        match rest:
            case [] | [None]:
                return claim
            case [(str(part), int(offset), int(size))] if 0 <= offset <= offset + size <= numel:  # of files before torch 0.4
                return StorageClaim(f"{key}/{part}", size * itemsize, dtype)
        raise ValueError(f"storage {key} has a part outside it")

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, dtype_name: str | None = None) -> TensorClaim:
        if not isinstance(storage, StorageClaim) or type(shape) is not tuple or type(stride) is not tuple:
            raise TypeError
        numbers = (offset, *shape, *stride)
        sensible = len(stride) == len(shape) <= MOST_DIMENSIONS and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
        if not sensible:
            raise ValueError("a tensor has sizes, strides or an offset that make no sense")
        dtype = storage.dtype if dtype_name is None else getattr(torch, dtype_name.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"a tensor has the unknown dtype {dtype_name}")
        claim = TensorClaim(storage, dtype, offset, shape, stride)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if all(shape) else offset - 1
        if (last + 1) * dtype.itemsize > storage.nbytes or claim.nbytes > storage.nbytes:
            shown = "x".join(str(size) for size in shape)
            raise ValueError(
                f"a tensor of {shown} {str(dtype).removeprefix('torch.')} is more than its {storage.nbytes} bytes hold"
            )
        self._tensors.append(claim)
        return claim


def _plain_key(key: Any) -> Any:
    """A key that may be hashed: values of the file's own making are refused, for they can be made to collide."""
    if type(key) not in _PLAIN_KEYS or (type(key) is int and key.bit_length() > 64):
        raise ValueError(f"its pickle has a {type(key).__name__} for a key")
    return key


def _is_empty(metadata: list[Any]) -> bool:
    return not metadata or metadata in ([None], [{}])


def _modern_name(name: str) -> str:
    """Full name of a global that the pickle gives as "module name", with Python 2's names as torch understands them."""
    module, _, inner = name.partition(" ")
    if (module, inner) in NAME_MAPPING:
        module, inner = NAME_MAPPING[module, inner]
    return f"{IMPORT_MAPPING.get(module, module)}.{inner}"
