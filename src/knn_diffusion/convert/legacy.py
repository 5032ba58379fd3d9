"""Tensors out of legacy checkpoints, without running what is in them: the only module that touches pickle.

A `.pth`, `.ckpt` or `.bin` is a program for a stack machine that may call anything that can be imported. Here it can call
three functions that rebuild a tensor, and OrderedDict; every other name becomes an inert `Stub`, since trainers store their
settings, callbacks and optimizers beside the weights. The values are mapped from the file, so an optimizer nobody asks for is
not read. Two forms are known: the zip file of torch 1.6 and later, and the stream of pickles before it.

What a file is decides its content, never its name.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from knn_diffusion.checkpoint import load_weights_file
from knn_diffusion.errors import CheckpointError

ZIP = b"PK\x03\x04"
STREAM = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""A pickle of the number that torch wrote first before 1.6."""
LOCAL_HEADER = 30
"""Bytes of a zip entry's own header, before its name."""
STREAM_VERSION = 1001
MAX_MARK = 64
"""Bytes of an entry that holds a single word."""
REFUSED = {code[0] for code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8)}
"""What checkpoints never hold: objects another package registered, and memory of a size of the file's choosing."""
LONGEST_PATH = 1000
"""Characters of a tensor's name; deeper nesting is not looked into."""
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Stub:
    """What stands for anything that is no tensor: made of any arguments, takes any state, does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, *_: object, **__: object) -> Stub:
        """Another one."""
        return Stub()

    def _forget(self, *_: object) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _forget


@dataclass(slots=True)
class Storage:
    """A run of numbers in the file; `start` is known at once in a zip file, at the end in a stream."""

    dtype: torch.dtype
    count: int
    start: int | None = None
    crc: int = 0
    """CRC-32 of the `nbytes` from `start` on, 0 where it is not known."""
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Strided:
    """A tensor as it is described: a view of a storage, in numbers of elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file or a legacy checkpoint, by the keys that lead to it, joined by dots.

    The tensors are views of the mapped file.

    Raises: CheckpointError when the file is missing, damaged or no checkpoint. No code of the file is run.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
            if start[8:9] == b"{":
                return load_weights_file(path, None)
            if start.startswith(ZIP):
                tree, values = _read_zip(file)
            elif start.startswith(STREAM):
                tree, values = _read_stream(file)
            else:
                raise CheckpointError(_unknown(path, start))
        found = _flatten(tree)
        _verify(found, values)
        return {name: _rebuild(name, tensor, values) for name, tensor in found.items()}
    except OSError as error:
        raise CheckpointError(
            f"expected a checkpoint, {path} cannot be read ({error.strerror}): check the path"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # a hostile pickle can make the machine raise anything
        raise CheckpointError(
            f"expected a checkpoint of torch, {path} is damaged or none ({type(error).__name__}: {str(error)[:100]}): "
            "download it again"
        ) from None


def _unknown(path: Path, start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return f"expected a checkpoint, {path} is a pointer of Git LFS: fetch the file itself with git lfs pull"
    return f"expected a safetensors file or a checkpoint of torch, {path} begins with {start[:8]!r}: check the file"


def _is_plain(key: object) -> bool:
    """Whether this is a name; hash and text of a nest of tuples can take for ever, and all memory there is."""
    return isinstance(key, str | int | float | bytes | None)


class Ordered(OrderedDict):
    """An OrderedDict of plain keys; others are left out."""

    def __init__(self, pairs: Any = ()) -> None:
        super().__init__()
        for key, value in pairs:
            self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        if _is_plain(key):
            super().__setitem__(key, value)


class _TensorUnpickler(pickle._Unpickler):
    """The stack machine with nothing to call; in Python, since the one in C reserves memory as large as a file asks for."""

    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in REFUSED
    }

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    append: Callable[[Any], None]

    def __init__(self, file: Any, storage: Callable[[Any], Storage]) -> None:
        super().__init__(file, encoding="latin1")  # python 2's strings
        self.storage = storage

    def _set(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        into = self.stack[-1]
        for key, value in pairs:
            if _is_plain(key):
                into[key] = value

    def load_setitem(self) -> None:
        """One entry of a dictionary, if its key is plain."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set([(key, value)])

    def load_setitems(self) -> None:
        """Several of them."""
        items = self.pop_mark()
        self._set(zip(items[::2], items[1::2], strict=True))

    def load_dict(self) -> None:
        """A dictionary of what was named since the mark."""
        items = self.pop_mark()
        self.append({key: value for key, value in zip(items[::2], items[1::2], strict=True) if _is_plain(key)})

    def load_additems(self) -> None:
        """What a set holds is no tensor, and is left out."""
        self.pop_mark()

    def load_frozenset(self) -> None:
        """As of a set."""
        self.pop_mark()
        self.append(Stub())

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }

    def find_class(self, module: str, name: str) -> Any:
        """A function that describes a tensor, the type of a storage, or an inert stub."""
        if (module, name) == ("collections", "OrderedDict"):
            return Ordered
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda *arguments: Strided(*arguments[:4])
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        return Stub

    def persistent_load(self, pid: Any) -> Any:
        """The storage that `pid` describes; of an unknown type it is a stub."""
        if not isinstance(pid, tuple) or not all(
            map(_is_plain, (*pid[2:5], *(pid[5] or ())) if len(pid) > 5 else pid[2:])
        ):
            raise ValueError("a storage of another kind")
        return self.storage(pid) if isinstance(pid[1], torch.dtype) else Stub()


def _unpickle(file: BinaryIO | io.BytesIO, storage: Callable[[Any], Storage]) -> Any:
    return _TensorUnpickler(file, storage).load()


def _no_storage(pid: Any) -> Storage:
    raise ValueError("a storage where none can be")


def _map(file: BinaryIO) -> memoryview:
    """The whole file as private memory: pages are read when they are looked at, and never written back."""
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _read_zip(file: BinaryIO) -> tuple[Any, memoryview]:
    """The pickle of a zip file, with storages that know where their bytes are."""
    archive, values = zipfile.ZipFile(file), _map(file)
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    if "data.pkl" not in entries or "constants.pkl" in entries:
        what = "a TorchScript program" if "constants.pkl" in entries else "another zip file"
        raise CheckpointError(f"expected a checkpoint of torch, {file.name} is {what}: save its state_dict instead")
    if entries["data.pkl"].compress_type != zipfile.ZIP_STORED:
        raise ValueError("data.pkl is compressed")
    order = entries.get("byteorder")
    if order is not None and (order.file_size > MAX_MARK or archive.read(order) != b"little"):
        raise ValueError("big-endian")

    def storage(pid: Any) -> Storage:
        _, dtype, key, _, count = pid
        entry = entries[f"data/{key}"]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"data/{key} is compressed")
        name, extra = struct.unpack_from("<HH", values, entry.header_offset + LOCAL_HEADER - 4)
        if count * dtype.itemsize > entry.file_size:
            raise ValueError(f"data/{key} is short")
        start = entry.header_offset + LOCAL_HEADER + name + extra
        return Storage(dtype, count, start, crc=entry.CRC, nbytes=entry.file_size)

    return _unpickle(io.BytesIO(archive.read(entries["data.pkl"])), storage), values


def _read_stream(file: BinaryIO) -> tuple[Any, memoryview]:
    """The pickles of torch before 1.6: a number, a version, the machine, the tree, the keys of the storages; then their values."""
    file.seek(0)
    _, version = _unpickle(file, _no_storage), _unpickle(file, _no_storage)
    machine = _unpickle(file, _no_storage)
    if version != STREAM_VERSION or not machine.get("little_endian", True):
        raise ValueError("big-endian or of another version")
    storages: dict[str, Storage] = {}
    views: list[tuple[Storage, Storage, int]] = []

    def storage(pid: Any) -> Storage:
        _, dtype, key, _, count, view = pid
        whole = storages.setdefault(str(key), Storage(dtype, count))
        if view is None:
            return whole
        _, offset, view_count = view
        views.append((Storage(dtype, view_count), whole, offset))
        return views[-1][0]

    tree, keys = _unpickle(file, storage), _unpickle(file, _no_storage)
    values, place = _map(file), file.tell()
    for key in keys:
        whole = storages[str(key)]
        (count,) = struct.unpack_from("<q", values, place)
        if count != whole.count:
            raise ValueError(f"storage {key} is of another size")
        whole.start = place + 8
        place = whole.start + count * whole.dtype.itemsize
    for view, whole, offset in views:
        view.start = None if whole.start is None else whole.start + offset * whole.dtype.itemsize
    return tree, values


def _verify(tensors: Mapping[str, Strided], values: memoryview) -> None:
    """Raise ValueError where the values are not those that were written; a zip file says which, older files do not."""
    sound = set[int]()
    for name, tensor in tensors.items():
        storage = tensor.storage
        if not storage.crc or type(storage.start) is not int or storage.start in sound:
            continue
        if zlib.crc32(values[storage.start : storage.start + storage.nbytes]) != storage.crc:
            raise ValueError(f"the values of {name} do not have their checksum")
        sound.add(storage.start)


def _rebuild(name: str, tensor: Strided, values: memoryview) -> Tensor:
    """The tensor, unless it reaches beyond its storage or repeats its values."""
    storage, size, stride = tensor.storage, tensor.size, tensor.stride
    numbers = (tensor.offset, storage.count, storage.start, *size, *stride)
    if storage.start is None or len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{name} is no tensor")
    count = prod(size)
    reach = tensor.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    nbytes = storage.count * storage.dtype.itemsize
    if count > storage.count or (count and reach > storage.count):
        raise ValueError(f"{name} reaches beyond its values")
    if not count:
        return torch.empty(size, dtype=storage.dtype)
    flat = torch.frombuffer(values, dtype=torch.uint8, count=nbytes, offset=storage.start)
    if flat.data_ptr() % storage.dtype.itemsize:
        flat = flat.clone()
    return flat.view(storage.dtype).as_strided(size, stride, tensor.offset)


def _flatten(tree: Any) -> dict[str, Strided]:
    """Every tensor of a known type in nested mappings and lists, by its path; each container is looked into once."""
    found: dict[str, Strided] = {}
    todo, seen = [("", tree)], set[int]()
    while todo:
        path, value = todo.pop()
        if isinstance(value, Strided) and isinstance(value.storage, Storage):
            if path in found:
                raise ValueError(f"two tensors are called {path}")
            found[path] = value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen and len(path) <= LONGEST_PATH:
            seen.add(id(value))
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            items = [(key, item) for key, item in pairs if len(str(key)) <= LONGEST_PATH]
            todo += [(f"{path}.{key}" if path else str(key), item) for key, item in items]
    return dict(sorted(found.items()))
