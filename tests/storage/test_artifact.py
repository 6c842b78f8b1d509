"""What was saved comes back bit for bit in a fresh process, or the error says which file is damaged and how."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import p3b
from hostile import of_schema, sealed, weights_digest
from p3b.errors import ModelError, RunFolderError, WeightsError
from p3b.storage import artifact
from p3b.storage.artifact import CONFIG_FILE, WEIGHTS_FILE, is_artifact, read_config, save_checkpoint
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.layout import read_layout
from processes import SparePython, forked, status_of
from thinning import thinned
from tiny import VARIANTS, images, masks_of, parameters_of, random_masks, tiny_vit


def _small(seed: int = 1, constant: bool = True, **changed: Any) -> nn.Module:
    """A small model with every form of block: whole, small, constant, gone, and a timm block that vanished."""
    model = tiny_vit(depth=4, **changed)
    layout = read_layout(model)
    masks = random_masks(layout, seed=seed)
    ones, zeros = masks_of(layout, lambda _g, size: torch.ones(size)), masks_of(layout, lambda _g, size: torch.zeros(size))
    for block, values in (("blocks.0.attn", ones), ("blocks.2.attn", zeros), ("blocks.2.mlp", zeros), ("blocks.3.mlp", zeros)):
        masks |= {gate: value for gate, value in values.items() if gate.startswith(block)}
    if constant:
        masks["blocks.1.mlp.in"] = torch.zeros(24)
    return apply_cuts(model, plan_cuts(layout, masks))


def _assert_same(loaded: nn.Module, saved: nn.Module, batch: Tensor) -> None:
    assert type(loaded) is type(saved)
    assert list(loaded.state_dict()) == list(saved.state_dict())
    for key, value in saved.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(loaded(batch), saved.eval()(batch))


# --- there and back


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "norm without affine"])
def test_every_kind_of_model_comes_back_bit_for_bit(variant: str, dense: bool, tmp_path: Path) -> None:
    arguments = VARIANTS[variant]
    model = tiny_vit(**arguments) if dense else _small(**arguments)
    for path in (p3b.save(model, tmp_path / "folder"), save_checkpoint(model, tmp_path / "model.pth")):
        loaded = p3b.load(path)
        if variant == "unfused":  # the choice of a kernel belongs to the machine, not to the model
            for block in loaded.blocks:
                if hasattr(getattr(block, "attn", None), "fused_attn"):
                    block.attn.fused_attn = False
        _assert_same(loaded, model, images())
        assert not loaded.training
        assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
        assert is_artifact(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = _small(dtype=dtype)
    loaded = p3b.load(p3b.save(model, tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    _assert_same(loaded, model, images(dtype=dtype))


def test_a_fresh_process_needs_nothing_but_the_folder(python: SparePython, tmp_path: Path) -> None:
    """Three models, each in its own dtype; the other process knows their folders and nothing else."""
    expected = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        name, model = str(dtype).removeprefix("torch."), _small(dtype=dtype)
        p3b.save(model, tmp_path / name)
        batch = images(dtype=dtype)
        with torch.no_grad():
            expected[name] = model.eval()(batch)
        safetensors.torch.save_file({"batch": batch}, tmp_path / name / "batch.st")
    script = (
        "import sys, torch, p3b, safetensors.torch as st\n"
        "torch.set_num_threads(1)\n"
        "for folder in sys.argv[1:]:\n"
        "    model = p3b.load(folder)\n"
        "    with torch.no_grad():\n"
        "        st.save_file({'out': model(st.load_file(folder + '/batch.st')['batch'])}, folder + '/out.st')\n"
    )
    done = python.run(script, *(tmp_path / name for name in expected), folder=tmp_path)
    assert (done.status, done.errors) == (0, "")
    for name, outputs in expected.items():
        assert torch.equal(safetensors.torch.load_file(tmp_path / name / "out.st")["out"], outputs), name


def test_what_was_loaded_can_be_saved_again_and_trained(tmp_path: Path) -> None:
    model = _small()
    again = p3b.load(p3b.save(p3b.load(p3b.save(model, tmp_path / "a")), tmp_path / "b"))
    _assert_same(again, model, images())
    assert (tmp_path / "a" / CONFIG_FILE).read_text() == (tmp_path / "b" / CONFIG_FILE).read_text()
    again.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


def test_a_dense_model_that_was_loaded_can_be_pruned(tmp_path: Path) -> None:
    loaded = p3b.load(p3b.save(tiny_vit(), tmp_path))
    assert read_layout(loaded) == read_layout(tiny_vit())
    with pytest.raises(ModelError, match="pruned already"):
        read_layout(p3b.load(p3b.save(_small(), tmp_path)))


def test_the_config_describes_the_model_in_plain_values(tmp_path: Path) -> None:
    model = _small()
    names = ["a", "b", "c", "d", "e"]
    p3b.save(model, tmp_path, class_names=names, preprocessing={"mean": [0.5] * 3}, provenance={"seed": 3})
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    found = read_config(tmp_path)
    assert {key: found[key] for key in found.keys() - {"architecture"}} == {
        key: config[key] for key in config.keys() - {"architecture", "network", "pretrained_cfg"}
    }
    assert found["architecture"] == config["network"]
    assert (config["class_names"], config["preprocessing"], config["provenance"]) == (names, {"mean": [0.5] * 3}, {"seed": 3})
    assert config["params"] == parameters_of(model)
    assert [block["form"] for block in config["blocks"]] == [
        *("whole", "small", "small", "constant", "gone", "gone", "small", "gone"),
    ]
    assert config["network"]["class"] == "VisionTransformer"
    assert not any(key in (tmp_path / CONFIG_FILE).read_text() for key in ("<", "0x", "torch."))


def test_a_checkpoint_loads_in_torchs_weights_only_mode(tmp_path: Path) -> None:
    model = _small()
    content = torch.load(save_checkpoint(model, tmp_path / "first_sparse_checkpoint.pth"), weights_only=True)
    assert set(content) == {"p3b", "model"}
    assert content["p3b"] == (p3b.save(model, tmp_path / "folder") / CONFIG_FILE).read_text()
    assert read_config(tmp_path / "first_sparse_checkpoint.pth") == read_config(tmp_path / "folder")
    assert all(torch.equal(value, content["model"][key]) for key, value in model.state_dict().items())


def test_saving_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = _small().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    p3b.save(model, tmp_path)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_class_names_must_fit_the_head(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="2 class names for a head of 5 outputs"):
        p3b.save(tiny_vit(), tmp_path / "x", class_names=["a", "b"])
    assert not (tmp_path / "x").exists()


# --- damage


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        change(config)
        (folder / CONFIG_FILE).write_text(json.dumps(config))

    return damage


def _network(config: dict[str, Any]) -> dict[str, Any]:
    return config["network" if config["schema"] == 4 else "architecture"]


def _cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def _replace_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights cut short": _cut(WEIGHTS_FILE, 0.5),
    "weights without their last byte": lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-1]),
    "weights empty": _cut(WEIGHTS_FILE, 0),
    "weights missing": lambda f: (f / WEIGHTS_FILE).unlink(),
    "weights of another model": lambda f: safetensors.torch.save_file(tiny_vit().state_dict(), f / WEIGHTS_FILE),
    "a tensor missing": _replace_tensors(lambda t: t.pop("blocks.0.attn.qkv.bias")),
    "a tensor too many": _replace_tensors(lambda t: t.update(extra=torch.zeros(1))),
    "a tensor of another shape": _replace_tensors(lambda t: t.update({"norm.weight": torch.zeros(3)})),
    "config cut short": _cut(CONFIG_FILE, 0.5),
    "config empty": _cut(CONFIG_FILE, 0),
    "config missing": lambda f: (f / CONFIG_FILE).unlink(),
    "config not text": lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"),
    "config of something else": lambda f: (f / CONFIG_FILE).write_text('{"model_type": "vit"}'),
    "config a list": lambda f: (f / CONFIG_FILE).write_text("[1]"),
    "a later schema": _edit(lambda c: c.update(schema=5)),
    "another format": _edit(lambda c: c.update(format="other")),
    "no blocks": _edit(lambda c: c.pop("blocks")),
    "blocks null": _edit(lambda c: c.update(blocks=None)),
    "blocks of numbers": _edit(lambda c: c.update(blocks=[1])),
    "a block missing": _edit(lambda c: c["blocks"].pop(1)),
    "a block of an unknown form": _edit(lambda c: c["blocks"][1].update(form="tiny")),
    "a block of another name": _edit(lambda c: c["blocks"][1].update(name="blocks.9.mlp")),
    "a block without a depth": _edit(lambda c: c["blocks"][1].update(name="mlp")),
    "an input out of range": _edit(lambda c: c["blocks"][1]["inputs"].__setitem__(-1, 24)),
    "an output out of range": _edit(lambda c: c["blocks"][1]["outputs"].__setitem__(-1, 1000)),
    "a negative channel": _edit(lambda c: c["blocks"][1]["inputs"].__setitem__(0, -1)),
    "a constant's channel out of range": _edit(lambda c: c["blocks"][3]["outputs"].__setitem__(-1, 24)),
    "a channel that is no whole number": _edit(lambda c: c["blocks"][1]["inputs"].__setitem__(0, 0.5)),
    "channels out of order": _edit(lambda c: c["blocks"][1]["inputs"].reverse()),
    "a channel twice": _edit(lambda c: c["blocks"][1]["outputs"].__setitem__(1, c["blocks"][1]["outputs"][0])),
    "a channel fewer": _edit(lambda c: c["blocks"][1]["inputs"].pop()),
    "another inner width": _edit(lambda c: c["blocks"][1].update(inner=c["blocks"][1]["inner"] + 1)),
    "a block that is gone yet writes": _edit(lambda c: c["blocks"][4].update(outputs=[1, 2])),
    "a class that is not known": _edit(lambda c: _network(c).update({"class": "ResNet"})),
    "an argument that is not known": _edit(lambda c: _network(c)["arguments"].update(colour="red")),
    "heads that do not divide the width": _edit(lambda c: _network(c)["arguments"].update(num_heads=5)),
    "no heads": _edit(lambda c: _network(c)["arguments"].update(num_heads=0)),
    "a width that is a word": _edit(lambda c: _network(c)["arguments"].update(embed_dim="wide")),
    "another depth": _edit(lambda c: _network(c)["arguments"].update(depth=2)),
    "a norm that is not known": _edit(lambda c: _network(c)["arguments"].update(norm_layer="RMSNorm")),
    "no architecture": _edit(lambda c: c.pop("network" if c["schema"] == 4 else "architecture")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_and_nothing_half_right_is_returned(damage: str, tmp_path: Path) -> None:
    _write_saved(4, tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(WeightsError, match=str(tmp_path)):
        p3b.load(tmp_path)


@pytest.mark.parametrize("damage", [name for name, change in DAMAGES.items() if change.__qualname__.startswith("_edit")])
@pytest.mark.parametrize("schema", [1, 2, 4])
def test_what_an_edit_spoils_is_told_without_the_digest(damage: str, schema: int, tmp_path: Path) -> None:
    """The same edits by somebody who knows of digests, and in a file of before there were any."""
    _write_saved(schema, tmp_path)
    DAMAGES[damage](tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(sealed(config) if schema > 1 else json.dumps(config))
    with pytest.raises(WeightsError, match=str(tmp_path)) as caught:
        p3b.load(tmp_path)
    assert "digest" not in str(caught.value)


@cache
def _saved(schema: int) -> dict[str, bytes]:
    """The files of the small model, by name, as a version wrote them; they load."""
    with TemporaryDirectory() as name:
        folder = p3b.save(_small(), Path(name))
        if schema < 4:
            _as_schema(schema, folder)
        p3b.load(folder)
        return _content(folder)


def _write_saved(schema: int, folder: Path) -> None:
    for name, content in _saved(schema).items():
        (folder / name).write_bytes(content)


def _as_schema(schema: int, folder: Path) -> None:
    """What p3b wrote before there were digests (1), and before the file was in the form that timm reads (2)."""
    config = of_schema(json.loads((folder / CONFIG_FILE).read_text()), schema)
    (folder / CONFIG_FILE).write_text(json.dumps(config) if schema == 1 else sealed(config))


def test_files_of_the_first_schema_load(tmp_path: Path) -> None:
    model = _small()
    p3b.save(model, tmp_path / "folder", class_names=list("abcde"))
    _as_schema(1, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / CONFIG_FILE).read_text())
    torch.save({"p3b": config, "model": model.state_dict()}, tmp_path / "old.pth")
    for path in (tmp_path / "folder", tmp_path / "old.pth"):
        _assert_same(p3b.load(path), model, images())
        assert read_config(path) == config
        assert is_artifact(path)


def test_a_later_schema_says_who_wrote_it_and_what_is_read(tmp_path: Path) -> None:
    p3b.save(_small(), tmp_path)
    _edit(lambda config: config.update(schema=7, p3b_version="3.1"))(tmp_path)
    with pytest.raises(WeightsError, match=r"schema 7, written by p3b 3\.1.*reads schemas 1, 2, 3 and 4.*install"):
        read_config(tmp_path)


def test_an_edited_config_is_told_and_how_to_change_it(tmp_path: Path) -> None:
    p3b.save(tiny_vit(), tmp_path, class_names=list("abcde"), preprocessing={"mean": [0.485, 0.456, 0.406]})
    text = (tmp_path / CONFIG_FILE).read_text()
    for old, new in (("0.485", "0.475"), ('"a"', '"x"')):
        (tmp_path / CONFIG_FILE).write_text(text.replace(old, new, 1))
        for read in (p3b.load, read_config):
            with pytest.raises(WeightsError, match=r"edited by hand.*p3b\.load.*p3b\.save"):
                read(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(json.loads(text), indent=8))  # spaces carry nothing
    assert read_config(tmp_path)["class_names"] == list("abcde")


def test_a_bit_that_flipped_in_a_weight_is_told(tmp_path: Path) -> None:
    p3b.save(tiny_vit(), tmp_path)
    content = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    content[-3] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(WeightsError, match="damaged, or of another model than the config"):
        p3b.load(tmp_path)


def test_weights_of_another_save_of_the_same_shape_are_told(tmp_path: Path) -> None:
    p3b.save(tiny_vit(seed=0), tmp_path / "a")
    p3b.save(tiny_vit(seed=1), tmp_path / "b")
    (tmp_path / "a" / WEIGHTS_FILE).replace(tmp_path / "b" / WEIGHTS_FILE)
    with pytest.raises(WeightsError, match="another model than the config"):
        p3b.load(tmp_path / "b")


def test_digests_are_of_content(tmp_path: Path) -> None:
    """Computed here from what the format says: whoever writes such files elsewhere needs no more."""
    config = json.loads((p3b.save(_small(), tmp_path) / CONFIG_FILE).read_text())
    assert json.loads(sealed(config)) == config
    assert config["weights_digest"] == weights_digest(safetensors.torch.load_file(tmp_path / WEIGHTS_FILE))
    assert (config["schema"], config["p3b_version"]) == (4, p3b.__version__)


def test_a_model_that_diverged_is_not_saved(tmp_path: Path) -> None:
    for bad in (float("nan"), float("inf")):
        model = tiny_vit()
        model.blocks[1].mlp.fc2.weight.data[3, 4] = bad
        for save in (p3b.save, save_checkpoint):
            with pytest.raises(ModelError, match=r"blocks\.1\.mlp\.fc2\.weight.*NaN"):
                save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_any_layout_are_saved(tmp_path: Path) -> None:
    """Transposed, shared and cut out of larger memory: what is saved has its own."""
    model = tiny_vit()
    large = torch.randn(100, 24)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight = nn.Parameter(torch.randn(24, 24).T)
        model.blocks[1].attn.proj.weight = nn.Parameter(large[10:34])
        model.blocks[1].norm1.weight = nn.Parameter(large[90])
        model.blocks[1].norm2.weight = model.blocks[1].norm1.weight
        model.to(memory_format=torch.channels_last)
    for path in (p3b.save(model, tmp_path / "folder"), save_checkpoint(model, tmp_path / "model.pth")):
        loaded = p3b.load(path)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
        with torch.no_grad():  # another kernel may compute another memory layout
            torch.testing.assert_close(loaded(images()), model.eval()(images()))
    assert (tmp_path / "model.pth").stat().st_size < 2 * sum(value.nbytes for value in model.state_dict().values())


def test_what_is_no_artifact_is_told(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "plain.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").touch()
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "pickled.pth")
    (tmp_path / "folder").mkdir()
    for name in ("plain.pth", "text.pth", "empty.pth", "pickled.pth", "folder", "absent.pth", "absent"):
        assert not is_artifact(tmp_path / name)
        for read in (p3b.load, read_config):
            with pytest.raises(WeightsError, match=name):
                read(tmp_path / name)


# --- writing that fails


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_earlier_files_and_no_others(tmp_path: Path) -> None:
    """The limit on a file's size is the system's own: writing fails in the middle of the weights, as on a full disk."""
    p3b.save(_small(seed=1), tmp_path)
    save_checkpoint(_small(seed=1), tmp_path / "model.pth")
    before = _content(tmp_path)
    model = tiny_vit()

    def starved() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        told = 0
        for write in (lambda: p3b.save(model, tmp_path), lambda: save_checkpoint(model, tmp_path / "model.pth")):
            try:
                write()
            except RunFolderError:
                told += 1
        return told

    assert status_of(forked(starved)) == 2
    assert _content(tmp_path) == before
    assert p3b.count_parameters(p3b.load(tmp_path)) == parameters_of(_small(seed=1))


def test_a_config_that_cannot_be_written_leaves_weights_and_config_of_one_save(tmp_path: Path) -> None:
    """The weights were once replaced before the config was known to be writable, which left two files of two models."""
    p3b.save(_small(seed=1), tmp_path)
    before = _content(tmp_path)
    with pytest.raises(TypeError, match="JSON"):
        p3b.save(_small(seed=2), tmp_path, provenance={"when": object()})
    assert _content(tmp_path) == before


def test_no_moment_shows_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p3b.save(_small(seed=1), tmp_path)
    before = _content(tmp_path)

    def fail(_tensors: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        seen = _content(tmp_path)
        assert {name: seen[name] for name in before} == before
        assert {name for name in seen if not name.startswith(".")} - before.keys() == {"config.json.new"}
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.safetensors.torch, "save_file", fail)
    with pytest.raises(RunFolderError, match="No space left"):
        p3b.save(_small(seed=2), tmp_path)
    assert _content(tmp_path) == before


def test_a_place_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a note")
    with pytest.raises(RunFolderError, match="Cannot write the model"):
        p3b.save(tiny_vit(), tmp_path / "taken")
    with pytest.raises(RunFolderError, match="Cannot write the checkpoint"):
        save_checkpoint(tiny_vit(), tmp_path / "taken" / "model.pth")
    assert (tmp_path / "taken").read_text() == "a note"


# --- a stop in the middle


def _stopped_saves(new: nn.Module, start: Path, work: Path, how: str) -> list[Path]:
    """Folders in which `p3b.save` was stopped before each thing that it does to files, each time in a process of its own.

    Args:
        start: folder to begin with, which may be absent.
        how: "exit" ends the process at once, "raise" is an error of the system.
    """
    folders: list[Path] = []

    def saved() -> int:
        seen, step, folder = 0, len(folders), folders[-1]

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            watched = ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "tempfile.mkstemp")
            if event in watched and str(work) in str(arguments[0]):
                seen += 1
                if seen == step:
                    if how == "exit":
                        os._exit(9)
                    raise OSError(5, "stopped here")

        sys.addaudithook(watch)
        try:
            p3b.save(new, folder, class_names=list("vwxyz"))
        except RunFolderError:
            return 8
        return 0 if seen < step else 7  # 7: some errors are none, as that of making a folder that is there

    code = None
    while code != 0:
        folders.append(work / f"{len(folders):03d}")
        if start.exists():
            shutil.copytree(start, folders[-1])
        code = status_of(forked(saved))
        assert code in (0, 7, 8, 9), code
    return folders


@pytest.mark.parametrize(("how", "first"), thinned(["exit", "raise"], [True, False], 2, whole=0))
def test_wherever_saving_stops_the_old_model_or_the_new_one_is_there(how: str, first: bool, tmp_path: Path) -> None:
    old, new, third = (tiny_vit(depth=1, seed=seed) for seed in range(3))
    start = tmp_path / "start"
    if not first:
        p3b.save(old, start, class_names=list("abcde"))
    folders = _stopped_saves(new, start, tmp_path, how)
    assert len(folders) > 8
    outcomes = []
    for folder in folders:
        try:
            loaded, names = p3b.load(folder), read_config(folder)["class_names"]
        except WeightsError as error:
            assert first and str(folder) in str(error)
            outcomes.append("none")
        else:
            outcomes.append("old" if names == list("abcde") else "new")
            _assert_same(loaded, old if outcomes[-1] == "old" else new, images())
            assert names == list("abcde" if outcomes[-1] == "old" else "vwxyz")
            assert is_artifact(folder)
    before = "none" if first else "old"
    assert set(outcomes) == {before, "new"}
    if how == "exit":
        assert outcomes == sorted(outcomes, key=lambda outcome: outcome == "new")  # once the new one is there, it stays
    for folder in folders:  # whatever a stop has left behind, the next save goes on from it
        p3b.save(third, folder)
        _assert_same(p3b.load(folder), third, images())
        assert not (folder / "config.json.new").exists()


def _interrupted(folder: Path) -> None:
    """As left by a stop after the new weights (seed 1) took their place, before their config did."""
    p3b.save(tiny_vit(seed=0), folder, class_names=list("abcde"))
    earlier = (folder / CONFIG_FILE).read_text()
    p3b.save(tiny_vit(seed=1), folder, class_names=list("vwxyz"))
    (folder / CONFIG_FILE).rename(folder / "config.json.new")
    (folder / CONFIG_FILE).write_text(earlier)


def test_a_second_stop_loses_nothing_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config that waited for its place would have been overwritten by the one of the next save."""
    _interrupted(tmp_path)

    def fail(_tensors: dict[str, Tensor], _path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.safetensors.torch, "save_file", fail)
    with pytest.raises(RunFolderError):
        p3b.save(tiny_vit(seed=2), tmp_path)
    _assert_same(p3b.load(tmp_path), tiny_vit(seed=1), images())
    assert read_config(tmp_path)["class_names"] == list("vwxyz")


def test_a_config_that_was_left_behind_never_wins_over_the_one_that_fits(tmp_path: Path) -> None:
    p3b.save(tiny_vit(seed=0), tmp_path / "other", class_names=list("vwxyz"))
    for seed in (0, 1):  # of the same weights as the model's, and of others
        p3b.save(tiny_vit(seed=seed), tmp_path / "model", class_names=list("abcde"))
        (tmp_path / "model" / "config.json.new").write_text((tmp_path / "other" / CONFIG_FILE).read_text())
        _assert_same(p3b.load(tmp_path / "model"), tiny_vit(seed=seed), images())
        assert read_config(tmp_path / "model")["class_names"] == list("abcde")


def test_a_stop_while_a_model_of_the_first_schema_is_replaced(tmp_path: Path) -> None:
    """The old config, without digests, would fit the new weights of the same shape."""
    _interrupted(tmp_path)
    _as_schema(1, tmp_path)
    _assert_same(p3b.load(tmp_path), tiny_vit(seed=1), images())
    assert read_config(tmp_path)["class_names"] == list("vwxyz")


def _with_a_narrower_second_mlp() -> nn.Module:
    model = tiny_vit()
    model.blocks[1].mlp.fc1 = nn.Linear(24, 7)
    model.blocks[1].mlp.fc2 = nn.Linear(7, 24)
    return model


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: tiny_vit(**VARIANTS["norm without affine"]), r"blocks\.0\.norm1\.weight"),
        (_with_a_narrower_second_mlp, r"blocks\.1\.mlp\.fc1\.weight"),
    ],
)
def test_a_model_that_would_not_load_is_not_saved(build: Callable[[], nn.Module], told: str, tmp_path: Path) -> None:
    """It was written, by a config that describes one with other tensors."""
    with pytest.raises(ModelError, match="cannot be saved: " + told):
        p3b.save(build(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
