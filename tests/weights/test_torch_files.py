"""Files of torch.save read without torch: the same numbers, and damage refused in one line."""

import io
import re
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest

from rlawm_jax.convert.bc import open_policy
from rlawm_jax.weights.rules import ConversionError
from rlawm_jax.weights.sources import TORCH_SUFFIXES, open_source
from tests.weights.torch_archives import (
    NUMBERS,
    STATE,
    STORAGES,
    VECTOR,
    Call,
    Id,
    Named,
    Opcodes,
    archive,
    dump,
    legacy,
    opcodes,
    refused,
)
from tests.weights.torch_archives import storage as kept
from tests.weights.torch_archives import tensor as rebuilt


def numbers(dtype: str) -> np.ndarray:
    """Twelve numbers of any dtype, the special ones of floats among them."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    raw = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 256, 12 * dtype.itemsize, np.uint8)
    array = raw.view(dtype).copy()
    if dtype.kind not in "iub":
        array[:4] = [np.nan, -np.inf, -0.0, 1e-40]
    return array


def widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


# --- the same numbers


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("form", ["archive", "legacy", "big-endian archive"])
def test_numbers_of_every_dtype_are_read_bit_for_bit(dtype, form, tmp_path):
    given = numbers(dtype)
    base = kept("0", dtype, 12, *([None] if form == "legacy" else []))
    state = {
        "whole": rebuilt(base, (3, 4), (4, 1)),
        "transposed": rebuilt(base, (4, 3), (1, 4)),
        "part": rebuilt(base, (2, 2), (4, 2), 5),
        "scalar": rebuilt(base, (), (), 7),
        "none": rebuilt(base, (0, 4), (4, 1)),
        "repeated": rebuilt(base, (3, 2), (0, 1), 10),
    }
    if form == "legacy":
        path = legacy(tmp_path / "m.pth", state, {"0": given})
    elif form == "archive":
        path = archive(tmp_path / "m.pth", state, {"0": given.tobytes()})
    else:
        swapped = given.view(f"u{given.itemsize}").byteswap()
        path = archive(tmp_path / "m.pth", state, {"0": swapped.tobytes()}, byteorder=b"big")
    whole = widened(given).reshape(3, 4)
    expected = {
        "whole": whole,
        "transposed": whole.T,
        "part": whole[1:, 1::2],
        "scalar": whole[1, 3],
        "none": whole[:0],
        "repeated": np.stack([whole[2, 2:]] * 3),
    }
    read_back = {name: read() for name, read in open_source(path).items()}
    assert read_back.keys() == expected.keys()
    for name, array in expected.items():
        assert read_back[name].dtype == whole.dtype and read_back[name].shape == array.shape, name
        assert read_back[name].tobytes() == array.tobytes(), name


def test_parameters_and_tensors_with_attributes_are_their_tensors(tmp_path):
    hooks, vector = Call("collections.OrderedDict", ()), VECTOR
    state = {
        "parameter": Call("torch._utils._rebuild_parameter", (vector, True, hooks)),
        "with state": Call("torch._utils._rebuild_parameter_with_state", (vector, True, hooks, {"shared": True})),
        "attributes": Call(
            "torch._tensor._rebuild_from_type_v2",
            (Named(vector.name), Named("torch.Tensor"), vector.arguments, {"note": 1}),
        ),
        "oldest": Call("torch._utils._rebuild_tensor", vector.arguments[:4]),
    }
    for read in open_source(archive(tmp_path / "m.pth", state, {"0": NUMBERS.tobytes()})).values():
        np.testing.assert_array_equal(read(), NUMBERS)


def test_a_state_dict_is_found_under_the_keys_of_training_scripts(tmp_path):
    # an OrderedDict with its metadata, as a module's state_dict is
    state = Opcodes(
        opcodes(Call("collections.OrderedDict", ())) + opcodes("a") + opcodes(VECTOR) + b"s" + opcodes({"v": 1}) + b"b"
    )
    more = {"step": 3, "dtype": Named("torch.bfloat16"), "device": Call("torch.device", ("cpu",)), "seen": [1.5, None]}
    for value in (state, {"model": state} | more, {"model_state_dict": state} | more, {"state_dict": {"model": state}}):
        source = open_source(archive(tmp_path / "m.pth", value, {"0": NUMBERS.tobytes()}))
        assert list(source) == ["a"]
        np.testing.assert_array_equal(source["a"](), NUMBERS)


def test_a_view_of_a_legacy_storage_begins_where_it_says(tmp_path):
    state = {"a": rebuilt(kept("0", "float32", 6, ("1", 2, 3)), (2,), (1,), 1), "b": VECTOR}
    state["b"] = rebuilt(kept("0", "float32", 6, None), (6,), (1,))
    source = open_source(legacy(tmp_path / "m.pt", state, {"0": NUMBERS}))
    np.testing.assert_array_equal(source["a"](), NUMBERS[3:5])
    np.testing.assert_array_equal(source["b"](), NUMBERS)


def test_an_archive_saved_without_checksums_is_read_within_its_bounds(tmp_path):
    path = archive(tmp_path / "m.pth", STATE, {"0": NUMBERS.tobytes()})
    content = bytearray(path.read_bytes())
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
    for at in entries:
        content[at + 16 : at + 20] = bytes(4)
    path.write_bytes(content)
    np.testing.assert_array_equal(open_source(path)["a"](), NUMBERS)
    numbers = next(at for at in entries if content[at + 46 :].startswith(b"m/data/0"))
    content[numbers + 42 : numbers + 46] = (len(content) - 40).to_bytes(4, "little")
    path.write_bytes(content)
    assert "'m/data/0' extends beyond the end of the file" in refused(path)


def test_anything_but_a_dense_tensor_of_numbers_is_refused_when_it_is_read(tmp_path):
    unsigned = (Id(("storage", Named("torch.storage.UntypedStorage"), "0", "cpu", 24)), 0, (2,), (1,), False, {})
    state = {
        "complex": Call(
            "torch._utils._rebuild_tensor_v2",
            (Id(("storage", Named("torch.ComplexFloatStorage"), "0", "cpu", 3)), 0, (3,), (1,), False, {}),
        ),
        "negated": rebuilt(kept("0", "float32", 6), (6,), (1,), 0, {"neg": True}),
        "sparse": Call("torch._utils._rebuild_sparse_tensor", (Call("torch.serialization._get_layout", ("x",)), ())),
        "quantised": Call("torch._utils._rebuild_qtensor", (kept("0", "int8", 6), Named("torch.per_tensor_affine"))),
        "float8": Call("torch._utils._rebuild_tensor_v3", (*unsigned, Named("torch.float8_e4m3fn"))),
        "uint16": Call("torch._utils._rebuild_tensor_v3", (*unsigned, Named("torch.uint16"))),
        "a": VECTOR,
    }
    source = open_source(archive(tmp_path / "m.pth", state, {"0": NUMBERS.tobytes()}))
    for name in set(state) - {"a", "uint16"}:
        with pytest.raises(ConversionError, match=r"^expected a dense tensor of numbers, found "):
            source[name]()
    np.testing.assert_array_equal(source["a"](), NUMBERS)
    np.testing.assert_array_equal(source["uint16"](), NUMBERS.view(np.uint16)[:2])


# --- the release's policies


def test_a_policy_of_the_release_gives_its_tensors_and_no_objects(tmp_path):
    # an instance of a class made on the spot, with state, items and attributes, as dill writes it
    made = opcodes(Call("dill._dill._create_type", (Named("builtins.type"), "Config", (Named("builtins.object"),), {})))
    thing = Opcodes(made + b")\x81" + opcodes({"x": 1}) + b"b(" + opcodes("k") + opcodes(2) + b"u(" + opcodes(3) + b"e")
    value = {
        "cfg": Opcodes(b"(iomegaconf\nDictConfig\n"),
        "pickles": [thing, Opcodes(b"(" + opcodes(Named("a.B")) + b"o"), {(1, (2,)): thing}],
        "state_dicts": {"model": {"a": thing}, "ema_model": {"a": VECTOR, "n": thing, "step": 3}},
    }
    path = archive(tmp_path / "latest.ckpt", value, {"0": NUMBERS.tobytes()})
    assert "are pickles" in refused(path, open_policy, allow_pickle=False)
    source = open_policy(path, allow_pickle=True)
    assert list(source) == ["a"]
    np.testing.assert_array_equal(source["a"](), NUMBERS)
    for other in ({"state_dicts": {}}, {"state_dicts": thing}, [1], thing):
        archive(path, other, {})
        assert "expected a policy checkpoint with state_dicts" in refused(path, open_policy, allow_pickle=True)


# --- damage, and files of other kinds


def test_every_flipped_byte_of_an_archive_is_refused_or_changes_no_number(tmp_path):
    path = archive(tmp_path / "m.pth", STATE | {"b": rebuilt(kept("1", "int8", 3), (3,), (1,))}, {
        "0": NUMBERS.tobytes(),
        "1": b"abc",
    })  # fmt: skip
    whole, refusals = path.read_bytes(), 0
    expected = {name: read().tobytes() for name, read in open_source(path).items()}
    for at, mask in enumerate(np.random.default_rng(0).integers(1, 256, len(whole)).tolist()):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        try:
            contents = {name: read().tobytes() for name, read in open_source(path).items()}
        except ConversionError as error:
            refusals += 1
            assert "\n" not in str(error)
        else:
            assert contents == expected, at
    assert refusals > len(whole) / 2  # the rest are dates, versions and the like


def test_a_damaged_storage_is_refused_by_name_and_the_others_are_read(tmp_path):
    state = STATE | {"b": rebuilt(kept("1", "float32", 4096), (4096,), (1,))}
    path = archive(tmp_path / "m.pth", state, {"0": NUMBERS.tobytes(), "1": np.ones(4096, np.float32).tobytes()})
    path.write_bytes(path.read_bytes().replace(np.ones(1024, np.float32).tobytes(), bytes(4096), 1))
    source = open_source(path)
    np.testing.assert_array_equal(source["a"](), NUMBERS)
    with pytest.raises(ConversionError, match=r"found a damaged one \('m/data/1' does not match its checksum\); fetch"):
        source["b"]()


@pytest.mark.parametrize("form", [archive, legacy])
def test_every_truncated_file_is_refused(form, tmp_path):
    state = {"a": rebuilt(kept("0", "float32", 6, *([None] if form is legacy else [])), (6,), (1,))}
    path = form(tmp_path / "m.pth", state, {"0": NUMBERS if form is legacy else NUMBERS.tobytes()})
    whole = path.read_bytes()
    np.testing.assert_array_equal(open_source(path)["a"](), NUMBERS)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refused(path).startswith(f"{path}: not a complete .pth file ("), length


def test_every_flipped_bit_of_a_legacy_file_is_at_most_one_line(tmp_path):
    state = {"a": rebuilt(kept("0", "float32", 6, ("1", 1, 4)), (2, 2), (2, 1))}
    path = legacy(tmp_path / "m.pth", state, {"0": NUMBERS})
    whole = path.read_bytes()
    for at, bit in enumerate(np.random.default_rng(0).integers(0, 8, len(whole)).tolist()):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        try:
            for read in open_source(path).values():
                read()
        except ConversionError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "value",
    [
        rebuilt(kept("0", "float32", 6), (7,), (1,)),
        rebuilt(kept("0", "float32", 6), (2, 3), (4, 1)),
        rebuilt(kept("0", "float32", 6), (6,), (1,), 1),
        rebuilt(kept("0", "float32", 6), (6,), (-1,), 5),
        rebuilt(kept("0", "float32", 6), (6,), (1,), -1),
        rebuilt(kept("0", "float32", 6), (6,), (1.0,)),
        rebuilt(kept("0", "float32", 6), (6,), (1, 1)),
        rebuilt(kept("0", "float32", 6), (2**70, 1), (0, 1)),
        rebuilt(kept("0", "float32", 6), (1,) * 200, (0,) * 200),
        rebuilt(kept("0", "float32", 7), (6,), (1,)),
        rebuilt(kept("0", "float32", -6), (6,), (1,)),
        rebuilt(kept("0", "float32", 6.0), (6,), (1,)),
        rebuilt(kept("1", "float32", 6), (6,), (1,)),
        rebuilt(Id(("module", "x", "y", "z")), (6,), (1,)),
        rebuilt(Id("0"), (6,), (1,)),
        rebuilt("0", (6,), (1,)),
        Opcodes(b"0" * 5),
        Opcodes(opcodes([]) + b"d"),
        Opcodes(opcodes(3) + opcodes(4) + b"a"),
        Opcodes(b"h\x09"),
    ],
)
def test_a_tensor_that_its_storage_does_not_hold_is_refused(value, tmp_path):
    path = archive(tmp_path / "m.pth", {"a": value}, {"0": NUMBERS.tobytes()})
    assert "damaged" in refused(path) or f"{path}: not a complete .pth file (" in refused(path)


@pytest.mark.parametrize("suffix", [*TORCH_SUFFIXES, ".ckpt", ".safetensors", ".index.json"])
def test_a_git_lfs_pointer_is_named_as_such(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    for allow in (False, True):
        assert "found a git-lfs pointer to one; run `git lfs pull`" in refused(path, open_policy, allow_pickle=allow)


@pytest.mark.parametrize("suffix", [*TORCH_SUFFIXES, ".ckpt"])
@pytest.mark.parametrize("member", ["constants.pkl", "code/__torch__.py"])
def test_a_torchscript_archive_is_named_as_such(suffix, member, tmp_path):
    path = archive(tmp_path / f"model{suffix}", STATE, {"0": NUMBERS.tobytes()}, **{member: b""})
    assert "found a TorchScript archive" in refused(path, open_policy, allow_pickle=True)


def test_other_kinds_of_files_are_named_as_such(tmp_path):
    path = tmp_path / "m.pth"
    path.write_bytes(dump({"a": [1, 2]}))
    assert "found a pickle that torch.save did not write" in refused(path)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        file.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "found a tar archive" in refused(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("README", "hello")
    assert "found a zip archive that torch.save did not write" in refused(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/data.pkl", bytes(100))
    assert "found a compressed zip archive" in refused(path)


# --- against torch


def state_of_all_kinds(torch) -> dict:
    """Tensors of every dtype and layout in memory."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in ("float64", "float32", "float16", "bfloat16"):
        given = torch.randn(5, 7, generator=generator, dtype=torch.float64).to(getattr(torch, name))
        given[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
        state[name] = given
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"):
        state[name] = torch.randint(0, 100, (5, 7), generator=generator).to(getattr(torch, name))
    base = state["float32"]
    state |= {
        "view": base[1:4, 2::2],
        "transposed": base.T,
        "shared": base.view(7, 5),
        "expanded": base[:1].expand(3, 7),
    }
    state |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "no elements of": base[:, :0]}
    state |= {"parameter": torch.nn.Parameter(base.clone()), "buffer": torch.nn.Buffer(base.clone())}
    state["odd bytes"] = torch.tensor([1], dtype=torch.int8)
    return state


@pytest.mark.torch
@pytest.mark.parametrize("new", [True, False], ids=["archive", "legacy"])
@pytest.mark.parametrize("nested", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_files_of_torch_save_read_as_torch_reads_them(new, nested, protocol, tmp_path):
    import torch

    state = state_of_all_kinds(torch)
    if not new:  # the older format has no storages of these
        state = {name: tensor for name, tensor in state.items() if name not in ("uint16", "uint32", "uint64")}
    more = {"step": 3, "lr": 1e-3, "dtype": torch.bfloat16, "device": torch.device("cpu"), "names": {"a"}, "b": b"\xff"}
    path = tmp_path / "m.pth"
    torch.save(
        {nested: state} | more if nested else state,
        path,
        _use_new_zipfile_serialization=new,
        pickle_protocol=protocol,
    )
    theirs = torch.load(path, weights_only=protocol == 2)  # which reads no other protocol
    theirs = theirs[nested] if nested else theirs
    ours = open_source(path)
    assert list(ours) == list(theirs) == list(state)
    for name, tensor in theirs.items():
        expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        array = ours[name]()
        assert (array.dtype, array.shape, array.tobytes()) == (expected.dtype, expected.shape, expected.tobytes()), name


@pytest.mark.torch
@pytest.mark.parametrize("new", [True, False], ids=["archive", "legacy"])
def test_modules_and_optimisers_of_torch_read_as_torch_reads_them(new, tmp_path):
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.GRU(4, 5))
    optimizer = torch.optim.AdamW(module.parameters())
    module[0](torch.ones(2, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "m.bin"
    value = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(value, path, _use_new_zipfile_serialization=new)
    ours = open_source(path)
    assert list(ours) == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert ours[name]().tobytes() == tensor.numpy().tobytes(), name
    torch.save(module, path, _use_new_zipfile_serialization=new)
    assert "holds pickled objects" in refused(path)


@pytest.mark.torch
def test_tensors_of_torch_that_are_not_dense_numbers_are_refused_one_by_one(tmp_path):
    import torch

    state = {
        "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(),
        "complex": torch.ones(2, dtype=torch.complex64),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "negated": torch.ones(2, dtype=torch.complex64).conj().imag,
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "meta": torch.ones(2, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }
    torch.save(state | {"dense": torch.ones(2)}, tmp_path / "m.pth")
    source = open_source(tmp_path / "m.pth")
    for name in state:
        with pytest.raises(ConversionError, match=r"^expected a dense tensor of numbers, found "):
            source[name]()
    np.testing.assert_array_equal(source["dense"](), np.ones(2, np.float32))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # torch announces the end of TorchScript
def test_a_program_of_torchscript_is_refused(tmp_path):
    import torch

    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
    assert "found a TorchScript archive" in refused(tmp_path / "m.pt")
    (tmp_path / "m.pt").rename(tmp_path / "m.ckpt")
    assert "found a TorchScript archive" in refused(tmp_path / "m.ckpt", open_policy, allow_pickle=True)


@pytest.mark.torch
def test_an_archive_of_torch_without_checksums_is_read(tmp_path):
    import torch

    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(open_source(tmp_path / "m.pt")["a"](), np.ones(3, np.float32))
