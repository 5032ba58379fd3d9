"""Legacy checkpoints are read as data: tensors come back exactly, and nothing in a file is ever run."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from knn_diffusion.convert.legacy import STREAM, read_tensors
from knn_diffusion.errors import CheckpointError

FORMS = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "stream"])
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def save(value: object, path: Path, as_zip: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=as_zip)
    return path


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_any_type_comes_back_as_it_was(tmp_path: Path, as_zip: bool, dtype: torch.dtype) -> None:
    weights = {
        "odd": torch.ones(3, dtype=torch.uint8),
        "a": (torch.randn(3, 5) * 3).to(dtype),
        "b": torch.tensor(7).to(dtype),
    }
    read = read_tensors(save(weights, tmp_path / "x", as_zip))
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in weights.items())


@FORMS
def test_views_transposes_and_shared_storages_come_back_as_they_were(tmp_path: Path, as_zip: bool) -> None:
    base = torch.randn(4, 6)
    weights = {"base": base, "row": base[2], "turned": base.T, "part": base[1:3, ::2], "empty": torch.empty(0, 3)}
    read = read_tensors(save(weights, tmp_path / "x", as_zip))
    assert all(torch.equal(read[name], value) for name, value in weights.items())


@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated")
def test_storages_that_are_views_of_others_are_found(tmp_path: Path) -> None:
    """As torch 0.2 wrote them; a storage says of which it is a part."""
    stream = io.BytesIO()
    values = torch.arange(6, dtype=torch.float32)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> Any:
            return ("storage", torch.FloatStorage, "7", "cpu", 6, ("8", 2, 3)) if isinstance(obj, Place) else None

    class Place: ...

    class Part:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor, (Place(), 1, (2,), (1,))

    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, OrderedDict(part=Part()), ["7"]):
        Pickler(stream, protocol=2).dump(value)
    stream.write(struct.pack("<q", 6) + values.numpy().tobytes())
    (tmp_path / "x").write_bytes(stream.getvalue())
    assert torch.equal(read_tensors(tmp_path / "x")["part"], values[3:5])


class Callback:
    """What trainers pickle beside the weights."""

    def __init__(self) -> None:
        self.best = Fraction(1, 3)


@FORMS
def test_a_trainers_checkpoint_gives_its_tensors_and_forgets_the_rest(tmp_path: Path, as_zip: bool) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {
        "state_dict": model.state_dict(),
        "parameter": model.weight,
        "optimizer": [optimizer.state_dict()],
        "callbacks": {Callback: Callback(), Fraction(1, 2): {1, 2}, "counts": defaultdict(list, a=[1])},
        "device": torch.device("cpu"),
        "path": Path("x"),
        "epoch": 3,
    }
    read = read_tensors(save(saved, tmp_path / "x.ckpt", as_zip))
    assert torch.equal(read["state_dict.weight"], model.weight)
    assert torch.equal(read["parameter"], model.weight)
    assert "optimizer.0.state.0.exp_avg" in read
    assert {name.split(".")[0] for name in read} == {"state_dict", "parameter", "optimizer"}


def test_safetensors_are_read_whatever_the_name(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "model.ckpt")
    assert read_tensors(tmp_path / "model.ckpt")["a"].tolist() == [0, 1, 2]


class Call:
    """A pickle that calls what it likes when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self) -> None:
        """So that pickle takes it for a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


class State(Call):
    """Calls from a state and from an item of a mapping."""

    def __reduce__(self) -> tuple[Any, ...]:
        call = Call(self.function, *self.arguments)
        return OrderedDict, (), {"state": call}, None, iter([("key", call)])


def gadgets(trace: Path) -> dict[str, object]:
    code = f"open({str(trace)!r}, 'w').close()"
    shell = f"touch {trace}"
    return {
        "os.system": Call(os.system, shell),
        "eval": Call(eval, f"__import__('os').system({shell!r})"),
        "exec": Call(exec, code),
        "open": Call(open, str(trace), "w"),
        "getattr of a call": Call(Call(getattr, Call(__import__, "os"), "system"), shell),
        "nested load": Call(torch.load, io.BytesIO(pickle.dumps(Call(os.system, shell)))),
        "load from bytes": Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, shell))),
        "nested pickle": Call(pickle.loads, pickle.dumps(Call(os.system, shell))),
        "in a state": State(exec, code),
    }


NAMES = sorted(gadgets(Path("x")))


@FORMS
@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_runs_no_code(tmp_path: Path, as_zip: bool, name: str) -> None:
    trace = tmp_path / "trace"
    path = save({"a": torch.ones(2), "b": gadgets(trace)[name]}, tmp_path / "x.pth", as_zip)
    assert read_tensors(path)["a"].tolist() == [1, 1]
    assert not trace.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "getattr of a call", "in a state"])
def test_the_gadgets_would_work_elsewhere(tmp_path: Path, name: str) -> None:
    pickle.loads(pickle.dumps(gadgets(tmp_path / "trace")[name]))
    assert (tmp_path / "trace").exists()


def hand_written(path: Path, program: bytes) -> Path:
    """A zip checkpoint whose pickle is the given program."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
    return path


def described(offset: int = 0, size: tuple = (4,), stride: tuple = (1,), count: int = 4, key: str = "0") -> bytes:
    """A program that describes a tensor called a."""

    class Place: ...

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", count) if isinstance(obj, Place) else None

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(
        {"a": Call(torch._utils._rebuild_tensor_v2, Place(), offset, size, stride, False, {})}
    )
    return out.getvalue()


def test_a_hand_written_description_is_read(tmp_path: Path) -> None:
    read = read_tensors(hand_written(tmp_path / "x", described(offset=1, size=(3,))))
    assert read["a"].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"\x80\x02",
        b"cos\nsystem\n(S'touch trace'\ntR",
        b"\x82\x01.",  # an extension's object
        b"\x96" + struct.pack("<Q", 1 << 40) + b".",  # a terabyte
        b"\x80\x02r" + struct.pack("<I", 0xFFFFFFFF) + b".",  # the last of four billion places
        b"(" * 5000,
        described(offset=2),
        described(offset=-1),
        described(size=(1 << 40,), stride=(0,)),
        described(size=(2, 2), stride=(1,)),
        described(stride=(-1,)),
        described(count=5),
        described(count=1 << 60),
        described(key="1"),
        described(key="../../x"),
    ],
    ids=range(16),
)
def test_a_program_that_makes_no_sense_is_one_line(tmp_path: Path, program: bytes) -> None:
    path = hand_written(tmp_path / "x", program)
    with pytest.raises(
        CheckpointError, match=r"^expected a checkpoint of torch, \S+ is damaged or none .*: download it again$"
    ):
        read_tensors(path)


def test_what_contains_itself_or_multiplies_ends(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"a": torch.ones(1)}
    loop["loop"] = loop
    many: Any = {"t": torch.ones(1)}
    for _ in range(60):
        many = {"x": many, "y": many}
    for number, value in enumerate((loop, many)):
        assert len(read_tensors(save(value, tmp_path / str(number), True))) == 1


@FORMS
@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
def test_a_truncated_file_is_damaged(tmp_path: Path, as_zip: bool, share: float) -> None:
    path = save({"a": torch.randn(1000), "b": torch.randn(1000)}, tmp_path / "x", as_zip)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="damaged or none .* download it again"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with b'': check the file"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYP': check the file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS: fetch the file itself"),
        (pickle.dumps({"a": 1}), "begins with"),
        (STREAM, "is damaged or none"),
        (struct.pack("<Q", 20) + b'{"a": 1}', "not a readable safetensors file"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_other_zip_files_and_missing_files_are_one_line(tmp_path: Path) -> None:
    for entry, what in (("photo/cat.png", "another zip file"), ("m/constants.pkl", "a TorchScript program")):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("m/data.pkl" if "constants" in entry else "m/x", b"")
            archive.writestr(entry, b"")
        with pytest.raises(CheckpointError, match=f"is {what}: save its state_dict instead"):
            read_tensors(tmp_path / "x.zip")
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file or directory\): check the path"):
        read_tensors(tmp_path / "nothing")


def test_a_registered_extension_is_not_reached(tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 77)
    try:
        with pytest.raises(CheckpointError):
            read_tensors(hand_written(tmp_path / "x", b"\x82M(S'touch " + str(tmp_path / "t").encode() + b"'\ntR."))
    finally:
        copyreg.remove_extension("os", "system", 77)
    assert not (tmp_path / "t").exists()


def test_reading_never_writes(tmp_path: Path) -> None:
    path = save({"a": torch.ones(100)}, tmp_path / "x", True)
    before = path.read_bytes()
    read: Tensor = read_tensors(path)["a"]
    read.zero_()
    assert path.read_bytes() == before


def test_every_flipped_bit_of_a_weight_is_noticed(tmp_path: Path) -> None:
    path = save({"a": torch.arange(40.0), "deep": [{"b": torch.ones(7)}]}, tmp_path / "x", True)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [one for one in archive.infolist() if "/data/" in one.filename]
    for entry in entries:
        start = whole.index(struct.pack("<f", 1), entry.header_offset + 30)
        for place in range(start, start + 28):
            changed = bytearray(whole)
            changed[place] ^= 1 << (place % 8)
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=r"the values of (a|deep\.0\.b) do not have their checksum"):
                read_tensors(path)


def nested(levels: int = 60) -> bytes:
    """A tuple that holds the one before twice: its hash takes 2^levels steps, its text as many letters."""
    program = b"K\x01"
    for _ in range(levels):
        program += b"2\x86"  # DUP, TUPLE2
    return program


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02}" + nested() + b"K\x01s.",
        b"\x80\x02}(" + nested() + b"K\x01u.",
        b"\x80\x02(" + nested() + b"K\x01d.",
        b"\x80\x02ccollections\nOrderedDict\n](" + b"](" + nested() + b"K\x01ee\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n)R" + nested() + b"K\x01s.",
        b"\x80\x04\x8f(" + nested() + b"\x90.",
        b"\x80\x04(" + nested() + b"\x91.",
    ],
    ids=["setitem", "setitems", "dict", "pairs", "ordered", "set", "frozenset"],
)
def test_keys_that_multiply_are_left_out(tmp_path: Path, program: bytes) -> None:
    assert read_tensors(hand_written(tmp_path / "x", program)) == {}


def test_a_storage_of_a_key_that_multiplies_is_refused(tmp_path: Path) -> None:
    program = b"\x80\x02(U\x07storagectorch\nFloatStorage\n" + nested() + b"U\x03cpuK\x04tQ."
    with pytest.raises(CheckpointError, match="damaged or none"):
        read_tensors(hand_written(tmp_path / "x", program))


def test_an_inflated_entry_is_not_unpacked(tmp_path: Path) -> None:
    path = hand_written(tmp_path / "x", described())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/byteorder", b"little" + b" " * 10_000_000)
    with pytest.raises(CheckpointError, match="damaged or none .*big-endian"):
        read_tensors(path)
