"""No file runs code: payloads that an ordinary unpickler would run, in every place of every kind of file."""

import pickle
import sys
from pathlib import Path

import pytest

from rlawm_jax.convert.bc import open_policy
from rlawm_jax.weights.rules import ConversionError
from rlawm_jax.weights.sources import TORCH_SUFFIXES
from tests.weights.torch_archives import (
    MAGIC,
    NUMBERS,
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


def payloads(target: Path) -> dict[str, Opcodes]:
    """Values whose making by an ordinary unpickler creates `target`."""
    script = f"open({str(target)!r}, 'w')"

    def new(name: str, *arguments) -> Opcodes:
        return Opcodes(opcodes(Named(name)) + opcodes(arguments) + b"\x81")

    return {
        "REDUCE": Opcodes(opcodes(Call("builtins.exec", (script,)))),
        "dunder": Opcodes(opcodes(Call("__builtin__.eval", (script,)))),
        "system": Opcodes(opcodes(Call("os.system", (f"touch {target}",)))),
        "open": Opcodes(opcodes(Call("builtins.open", (str(target), "w")))),
        "STACK_GLOBAL": Opcodes(opcodes("builtins") + opcodes("exec") + b"\x93" + opcodes((script,)) + b"R"),
        "INST": Opcodes(b"(" + opcodes(script) + b"ibuiltins\nexec\n"),
        "OBJ": Opcodes(b"(" + opcodes(Named("builtins.exec")) + opcodes(script) + b"o"),
        "NEWOBJ": new("builtins.tuple", new("builtins.map", Named("builtins.exec"), [script])),
        "import": Opcodes(opcodes(Named("planted_module.anything"))),
        "nested": Opcodes(opcodes(Call("pickle.loads", (Call("_codecs.encode", (script, "latin1")),)))),
        "storage": Opcodes(opcodes(Call("torch.storage._load_from_bytes", (script,)))),
        "torch.load": Opcodes(opcodes(Call("torch.load", (str(target), None, Named("pickle"))))),
        "extension": Opcodes(b"\x82\x01"),
        "state": Opcodes(opcodes(Call("collections.OrderedDict", ())) + opcodes(Named("os.system")) + b"b"),
    }


def containers(folder: Path, suffix: str, payload: Opcodes) -> dict[str, Path]:
    """One payload in every kind of file, at every place where a file can hold it."""
    evil, storages = {"state_dicts": {"model": {"a": payload}}, "a": payload}, {"0": NUMBERS.tobytes()}

    def plain(name: str, content: bytes) -> Path:
        (folder / f"{name}{suffix}").write_bytes(content)
        return folder / f"{name}{suffix}"

    places = {
        "archive": archive(folder / f"archive{suffix}", evil, storages),
        "storage": archive(folder / f"id{suffix}", {"a": Id(("storage", payload, "0", "cpu", 6))}, storages),
        "identity": archive(folder / f"identity{suffix}", {"a": Id(payload)}, storages),
        "key": archive(folder / f"key{suffix}", {payload: VECTOR}, storages) if suffix else None,
        "rebuilt": archive(folder / f"rebuilt{suffix}", {"a": rebuilt(payload, (1,), (1,))}, storages),
        "type": archive(
            folder / f"type{suffix}",
            {"a": Call("torch._tensor._rebuild_from_type_v2", (payload, payload, (), {}))},
            storages,
        ),
        "script": archive(folder / f"script{suffix}", evil, storages, **{"constants.pkl": dump(payload)}),
        "legacy": legacy(folder / f"legacy{suffix}", evil, {}),
        "bare": plain("bare", dump(evil)),
        "first": plain("first", dump(payload) + dump(MAGIC)),
        "system": plain("system", dump(MAGIC) + dump(1001) + dump(payload)),
        "keys": plain("keys", b"".join(map(dump, (MAGIC, 1001, {}, {}, payload)))),
        "before": plain("before", dump(payload) + (folder / f"archive{suffix}").read_bytes()),
    }
    return {place: path for place, path in places.items() if path is not None}


def test_the_payloads_are_live(tmp_path, monkeypatch):
    target = tmp_path / "executed"
    for name in ("REDUCE", "dunder", "system", "open", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ"):
        content = dump(payloads(target)[name])
        pickle.loads(content)
        assert target.exists(), name
        target.unlink()


@pytest.mark.parametrize("payload", payloads(Path()))
@pytest.mark.parametrize("suffix", [*TORCH_SUFFIXES, ".ckpt"])
def test_no_file_runs_code(suffix, payload, tmp_path, monkeypatch):
    target, folder = tmp_path / "executed", tmp_path / "files"
    folder.mkdir()
    (tmp_path / "planted_module.py").write_text(f"open({str(target)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for place, path in containers(folder, suffix, payloads(target)[payload]).items():
        for allow in (False, True):
            try:
                for read in open_policy(path, allow_pickle=allow).values():
                    read()
            except ConversionError as error:
                assert "\n" not in str(error), place
            else:
                assert (suffix == ".ckpt" and allow) or payload == "state", place
        assert not target.exists() and "planted_module" not in sys.modules, place
    before = {path.name for path in folder.iterdir()}
    assert before == {path.name for path in folder.iterdir() if path.suffix == suffix}


def test_pickled_objects_are_refused_with_a_message_of_what_they_are(tmp_path):
    path = archive(tmp_path / "m.pth", {"a": VECTOR, "args": Call("argparse.Namespace", ())}, {"0": NUMBERS.tobytes()})
    assert refused(path) == (
        f"{path}: not a complete state_dict that loads weights-only: it holds pickled objects, and reading them would "
        "run code from the file; save the plain state_dict instead"
    )


def test_a_pickle_that_expands_beyond_memory_is_refused(tmp_path):
    deep, wide = Opcodes(b")" + b"\x85" * 200_000), b"(K\x01t" + b"q\x00"
    for level in range(40):
        wide += b"0" + f"(h{chr(level)}h{chr(level)}tq{chr(level + 1)}".encode("latin-1")
    for value in (
        {deep: VECTOR},
        {"a": rebuilt(kept("0", "float32", 6), Opcodes(wide), (1, 1))},
        {"a": Id(("storage", deep, "0", "cpu", 6))},
        {"a": Id(("storage", Named("torch.FloatStorage"), Opcodes(wide), "cpu", 6))},
        {"a": Call("torch._tensor._rebuild_from_type_v2", ((), None, (), {}))},
        {"a": Opcodes(wide + opcodes("x") + b"\x93")},
    ):
        refused(archive(tmp_path / "m.pth", value, {"0": NUMBERS.tobytes()}))
