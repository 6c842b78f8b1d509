"""Models go to a hub on loopback and come back by the real client; what is fetched is not trusted; timm knows them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config

import p3b
from exported import NAMES, PREPROCESSING, save_photos, save_small, small_vit
from hub_server import Hub, serving
from p3b.commands.bench import sides
from p3b.commands.command_line import main
from p3b.commands.serve import open_model
from p3b.deploy.card import CARD_FILE, card, has_own_card, write_card
from p3b.deploy.hub import fetch, local_copy
from p3b.deploy.plain import plain_call
from p3b.errors import ConfigError, HubError, ModelError, WeightsError
from p3b.run.deploy_options import BenchConfig, ExportConfig, check_export
from p3b.storage.artifact import CONFIG_FILE, WEIGHTS_FILE, read_config
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.layout import read_layout
from tiny import VIT, images, masks_of, tiny_vit

REPO = "somebody/small-vit"


def _point_client(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE do before the client is imported, which it has been."""
    constants = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
    }
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Where the client goes, with an empty cache; the working folder is empty, too."""
    with serving() as server:
        _point_client(monkeypatch, server.endpoint, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield server


def _same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(model.eval()(images()), other.eval()(images()))


def test_a_model_that_is_pushed_comes_back_the_same(hub: Hub) -> None:
    small = small_vit()
    address = p3b.push(small, REPO, class_names=NAMES, preprocessing=PREPROCESSING.to_dict())
    assert address.startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert set(hub.files[REPO, "main"]) == {CONFIG_FILE, WEIGHTS_FILE, "README.md"}
    assert _same(p3b.load(REPO), small)
    assert _same(p3b.load(f"hf-hub:{REPO}"), small)


def test_a_folder_is_pushed_to_a_branch_and_fetched_by_revision(hub: Hub, tmp_path: Path) -> None:
    p3b.push(tiny_vit(seed=5), REPO)
    folder = save_small(tmp_path / "pruned")
    p3b.push(folder, REPO, revision="small")
    assert _same(p3b.load(REPO, revision="small"), p3b.load(folder))
    assert _same(p3b.load(f"hf-hub:{REPO}@small"), p3b.load(folder))
    assert not _same(p3b.load(REPO), p3b.load(folder))
    assert read_config(fetch(REPO, "small"))["provenance"] == {"stage": "a test"}


def test_two_files_of_one_commit_are_fetched_and_once(hub: Hub) -> None:
    p3b.push(small_vit(), REPO)
    hub.files[REPO, "main"]["evil.py"] = b"raise SystemExit"
    hub.asked.clear()
    folder = fetch(REPO)
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert [each for each in hub.asked if each.startswith("GET")] == [
        f"GET /{REPO}/resolve/{folder.name}/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)
    ]
    hub.asked.clear()
    assert fetch(REPO) == folder
    assert not [each for each in hub.asked if each.startswith("GET")]


def test_more_than_the_config_makes_necessary_is_not_fetched(hub: Hub) -> None:
    p3b.push(small_vit(), REPO)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        hub.claims = {name: 1 << 40}
        hub.asked.clear()
        with pytest.raises(WeightsError, match=f"{name} of {REPO}.*claims to be of {1 << 40} bytes"):
            p3b.load(REPO)
        assert f"GET /{REPO}/resolve" not in " ".join(each for each in hub.asked if each.endswith(name))


def test_what_is_fetched_is_checked_as_a_folder_is(hub: Hub) -> None:
    p3b.push(small_vit(), REPO)
    files = hub.files[REPO, "main"]
    whole = dict(files)
    files[CONFIG_FILE] = whole[CONFIG_FILE].replace(b'"depth": 2', b'"depth": 3')
    with pytest.raises(WeightsError, match="digest"):
        p3b.load(REPO)
    files[CONFIG_FILE] = b"[" * 100_000
    with pytest.raises(WeightsError, match=CONFIG_FILE):
        p3b.load(REPO)
    files.update(whole)
    files[WEIGHTS_FILE] = whole[WEIGHTS_FILE][:-3] + b"\0\1\2"
    with pytest.raises(WeightsError, match="digest"):
        p3b.load(REPO)


def test_what_the_hub_has_not_is_said(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no model somebody/small-vit.*check its path.*HF_TOKEN"):
        p3b.load(REPO)
    p3b.push(small_vit(), REPO)
    with pytest.raises(WeightsError, match="no revision 'none'"):
        p3b.load(REPO, revision="none")
    del hub.files[REPO, "main"][CONFIG_FILE]
    with pytest.raises(WeightsError, match="no model that p3b saved"):
        p3b.load(REPO)
    with pytest.raises(WeightsError, match="no name of a model"):
        p3b.load("hf-hub:a--b/c d")
    (tmp_path / "run").mkdir()
    hub.asked.clear()
    for path in ("run/pruned", Path("away/pruned"), "a/b/c"):
        with pytest.raises(WeightsError):
            p3b.load(path)
    assert hub.asked == []
    with pytest.raises(ConfigError, match="lies here"):
        p3b.load(save_small(tmp_path / "pruned"), revision="main")


def test_a_hub_that_is_away_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        endpoint = server.endpoint
    _point_client(monkeypatch, endpoint, tmp_path / "cache")
    with pytest.raises(WeightsError, match=r"cannot be reached.*check its path"):
        fetch(REPO)
    with pytest.raises(HubError, match="did not take"):
        p3b.push(small_vit(), REPO)


# --- timm


def test_timm_builds_a_saved_model_from_a_folder_and_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "pruned")
    p3b.push(folder, REPO)
    for name in (f"local-dir:{folder}", f"hf-hub:{REPO}", f"hf-hub:{REPO}@main"):
        model = timm.create_model(name, pretrained=True)
        assert model.training
        assert _same(model, p3b.load(folder))
        config = resolve_data_config({}, model=model)
        assert (list(config["input_size"]), list(config["mean"]), config["crop_pct"]) == ([3, 32, 32], [0.5, 0.4, 0.3], 0.875)
        assert list(model.pretrained_cfg["label_names"]) == list(NAMES)


def test_timm_builds_one_with_fresh_weights_or_another_head(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "pruned")
    saved = p3b.load(folder)
    torch.manual_seed(0)
    fresh = timm.create_model(f"local-dir:{folder}")
    assert {key: value.shape for key, value in fresh.state_dict().items()} == {
        key: value.shape for key, value in saved.state_dict().items()
    }
    assert not _same(fresh, saved)
    assert all(torch.isfinite(value).all() for value in fresh.state_dict().values())
    assert fresh.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.2)

    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7, drop_path_rate=0.2)
    assert other(images()).shape == (2, 7)
    assert torch.equal(other.state_dict()["blocks.0.attn.qkv.weight"], saved.state_dict()["blocks.0.attn.qkv.weight"])
    assert other.blocks[1].drop_path2.drop_prob == pytest.approx(0.2)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)(images()).shape == (2, 24)
    with pytest.raises(WeightsError, match="embed_dim=12"):
        timm.create_model(f"local-dir:{folder}", embed_dim=12)
    with pytest.raises(ModelError, match="local-dir:run/pruned"):
        timm.create_model("p3b_vit")


def test_timm_knows_them_in_a_process_of_its_own_where_the_environment_says_which_hub(tmp_path: Path) -> None:
    """p3b is imported first here, and somebody asks whether timm is there; everywhere else in the tests timm may be first."""
    script = f"""
import importlib.util, sys
import p3b
assert importlib.util.find_spec("timm") and importlib.util.find_spec("timm")
assert "timm" not in sys.modules
from timm.models import create_model
import timm
assert timm.is_model("p3b_vit") and timm.__spec__.loader.get_filename("timm") == timm.__file__
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "p3b"]
address = p3b.push({str(save_small(tmp_path / "pruned"))!r}, "{REPO}")
model = create_model("hf-hub:{REPO}", pretrained=True)
loaded = p3b.load("{REPO}")
assert "p3b.run.stage" not in sys.modules and "p3b.run.options" not in sys.modules, "loading a model needs none of training"
assert all((value == loaded.state_dict()[key]).all() for key, value in model.state_dict().items())
"""
    with serving() as server:
        environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_nobody"}
        command = [sys.executable, "-W", "error", "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (REPO, "main") in server.files


# --- the card


def test_the_card_says_what_is_known(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "pruned")
    text = card(read_config(folder), REPO, on_hub=True)
    assert text.startswith("---\nlibrary_name: p3b\n")
    for said in (
        f"# {REPO}",
        "5 classes",
        "Licence:** not known",
        f'p3b.load("{REPO}")',
        f"hf-hub:{REPO}",
        "2506.23675",
        "`class 3`",
    ):
        assert said in text
    assert "without p3b" not in text
    assert "Measured" not in text


def test_the_card_of_a_model_in_its_run_has_licence_budget_table_and_figure(hub: Hub, tmp_path: Path) -> None:
    provenance = {"stage": "prune", "model": "vit_tiny_patch16_224.augreg_in21k", "data": "flowers `of` <b>mine</b>"}
    pruned = p3b.save(small_vit(), tmp_path / "run" / "pruned", provenance=provenance)
    stage = tmp_path / "run" / "prune"
    stage.mkdir()
    (stage / "keep_ratio.png").write_bytes(b"a picture")
    settings = {
        "model": {"model_pretrained": True, "model_path": None},
        "prune": {"prune_ratio": 0.5, "prune_blocks_only": False, "prune_method": "block_benefit"},
    }
    columns = {"dense": {"params": 1000, "top1": 90.0}, "pruned": {"params": 500, "top1": None}}
    summary = {**columns, "accuracy": {"test": {}}, "reached_prune_ratio": 0.5, "provenance": provenance}
    (stage / "config.json").write_text(json.dumps(settings))
    (stage / "summary.json").write_text(json.dumps(summary))

    p3b.push(pruned, REPO)
    pushed = hub.files[REPO, "main"]
    text = pushed["README.md"].decode()
    assert pushed["keep_ratio.png"] == b"a picture"
    for said in (
        "license: apache-2.0",
        "base_model: timm/vit_tiny_patch16_224.augreg_in21k",
        "`flowers 'of' <b>mine</b>`",
        "50% of all parameters to be pruned by block_benefit; 50.0%",
        "| parameters | 1,000 | 500 |",
        "| top-1 (%) | 90.00 | - |",
        "](keep_ratio.png)",
    ):
        assert said in text, text

    (stage / "summary.json").write_text(json.dumps({**summary, "provenance": {**provenance, "seed": 1}}))
    p3b.push(pruned, REPO)
    assert b"Measured" not in pushed["README.md"], "of another run that has been in this place since"


def test_a_card_that_p3b_wrote_is_renewed_wherever_the_model_lies_and_an_edited_one_stays(hub: Hub, tmp_path: Path) -> None:
    provenance = {"stage": "prune", "model": VIT, "note": "made on --> the 29th"}
    pruned = p3b.save(small_vit(), tmp_path / "run" / "pruned", provenance=provenance)
    stage = tmp_path / "run" / "prune"
    stage.mkdir()
    (stage / "keep_ratio.svg").write_text("a picture")
    (stage / "config.json").write_text(json.dumps({"model": {"model_pretrained": False, "model_path": None}}))
    (stage / "summary.json").write_text(json.dumps({"pruned": {"top1": 81.25}, "provenance": provenance}))
    assert write_card(pruned, name="run/pruned") and not has_own_card(pruned)
    local = (pruned / CARD_FILE).read_text()

    moved = pruned.rename(tmp_path / "elsewhere")
    p3b.push(moved, REPO)
    pushed = hub.files[REPO, "main"]
    assert (moved / CARD_FILE).read_text() == local, "pushing changes nothing here"
    assert pushed["keep_ratio.svg"] == b"a picture"
    assert pushed["README.md"].decode().partition("<!--")[0] == local.partition("<!--")[0].replace("run/pruned", REPO).replace(
        f"local-dir:{REPO}", f"hf-hub:{REPO}"
    )
    assert "81.25" in local and "without pretrained weights" in local

    p3b.save(small_vit(), moved, provenance={**provenance, "note": "another run"})
    assert write_card(moved, name="elsewhere")
    assert "81.25" not in (moved / CARD_FILE).read_text(), "of the model that lay here before"

    for edited in (local.replace("81.25", "99.99"), local + "More.\n", local[: local.rindex("<!--")], "my own card", ""):
        (moved / CARD_FILE).write_text(edited)
        assert has_own_card(moved) and not write_card(moved, name="elsewhere")
        p3b.push(moved, REPO)
        assert pushed["README.md"].decode() == edited == (moved / CARD_FILE).read_text()


def test_the_command_pushes_and_says_where_to(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_small(tmp_path / "pruned")
    assert main(["push", str(folder), REPO, "--private"]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert f"{hub.endpoint}/{REPO}/commit/" in said and f'p3b.load("{REPO}")' in said
    assert main(["push", str(folder), "no name"]) == 2
    assert "did not take no name" in capsys.readouterr().err


def _uniform(dense: Any) -> Any:
    """Half of every MLP is gone."""
    layout = read_layout(dense)
    masks = masks_of(layout, lambda gate, size: (torch.arange(size) < (size // 2 if gate.endswith("hidden") else size)).float())
    return apply_cuts(dense, plan_cuts(layout, masks))


@pytest.mark.parametrize("variant", ["dense", "pruned", "distilled", "layer scale"])
def test_where_blocks_are_alike_timm_alone_builds_the_model(variant: str, tmp_path: Path) -> None:
    more = {"distilled": {"name": "deit_tiny_distilled_patch16_224"}, "layer scale": {"init_values": 0.1}}.get(variant, {})
    model = tiny_vit(**more) if variant == "dense" else _uniform(tiny_vit(**more))
    call = plain_call(read_config(p3b.save(model, tmp_path)))
    assert call is not None and call in card(read_config(tmp_path), "a")
    built = eval(call, {"timm": timm})
    built.load_state_dict(load_file(tmp_path / WEIGHTS_FILE))
    assert _same(built, model)


def test_where_blocks_differ_no_plain_call_is_claimed(tmp_path: Path) -> None:
    assert plain_call(read_config(save_small(tmp_path))) is None
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["architecture"] == "p3b_vit"


# --- commands


def test_commands_take_a_model_of_the_hub_by_its_name(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p3b.push(save_small(tmp_path / "pruned"), REPO)
    (photo,) = save_photos(tmp_path / "photos", 1)
    for name in (REPO, f"hf-hub:{REPO}@main"):
        assert main(["predict", name, str(photo), "--format", "csv"]) == 0
        assert "class " in capsys.readouterr().out
    assert open_model(Path(REPO), "index").name == REPO
    saved, dense = sides(BenchConfig((Path(REPO),)))[::-1]
    assert saved.name == f"{REPO}, eager" and dense.name == f"dense of {REPO}, eager" and saved.path.is_dir()
    assert check_export(ExportConfig(Path(REPO))) == Path("small-vit.onnx"), "where we are: there is no folder beside it"


@pytest.mark.parametrize(
    "arguments",
    [["export", REPO, "--output", "a.pt2"], ["evaluate", "--model-path", REPO, "--data-set", "DIGITS"], ["bench", REPO]],
)
def test_a_command_says_that_the_hub_has_no_such_model(
    arguments: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert f"The hub shows no model {REPO}." in " ".join(capsys.readouterr().err.split())


def test_a_name_with_the_ending_of_a_file_is_not_asked_for(hub: Hub) -> None:
    for name in ("exports/small.onnx", "exports/small.pt2", "exports/small.pth"):
        assert local_copy(name) == Path(name)
    assert hub.asked == []
