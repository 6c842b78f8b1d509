"""What `p3b export`, `predict` and `bench` are told; one sentence under each field is the help text of its flag.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from p3b.errors import ConfigError


@dataclass(frozen=True)
class ExportConfig:
    """Write a saved model as ONNX or .pt2: a file that needs neither p3b nor timm, checked and timed in its own runtime."""

    model: Positional[Path]
    """A model that p3b saved: run/pruned, first_sparse_checkpoint.pth, or user/name of the Hugging Face hub."""
    output: Path | None = None
    """File to write; its ending says the format: .onnx or .pt2 (torch.export). By default the model's path with .onnx."""
    with_preprocessing: bool = False
    """Take uint8 images (N, C, H, W) of any size: resizing, cropping and normalising happen inside."""
    half: bool = False
    """Weights and products in float16; inputs and outputs stay float32."""
    int8: Literal["off", "static", "dynamic"] = "off"
    """ONNX in int8: static (scales found on training images: --data-path or --calibration) or dynamic (found in each call)."""
    max_loss: float = 1.0
    """Points of top-1 that --half or --int8 may lose against float32; beyond it nothing is written."""
    layout: str = "auto"
    """How pruned blocks are carried out: auto (measure in this runtime), index, folded, gathered, zeros, balanced, ..."""
    batch_size: int = 1
    """Images at a time that speed is measured with; the file takes any number."""
    data_set: str = "FOLDER"
    """Data set of --data-path, as in `p3b train`; DIGITS needs no path."""
    data_path: Path | None = None
    """The data that the model was trained on: its training images calibrate, the others check the export and measure top-1."""
    images: Path | None = None
    """Folder of images, without labels, that the export is checked on; by default those of --data-path, else a sample photo."""
    calibration: Path | None = None
    """Folder of images, without labels, that --int8 static is calibrated on; by default training images of --data-path."""
    check_images: int = 64
    """Images that the logits of the export are compared with the model's on."""
    calibration_images: int = 128
    """Images that --int8 static is calibrated on."""
    top1_images: int = 1000
    """Images of --data-path that top-1 is measured on, at most."""
    dense: Path | None = None
    """The dense model to measure beside (run/dense); by default one of its shape, whose speed and size are the same."""
    threads: int | None = None
    """Threads that are computed with; by default as many as PyTorch takes."""
    card: bool = False
    """Write a model card (README.md) into the folder of the saved model, too, or renew it; one that was edited stays."""


def check_export(config: ExportConfig) -> Path:
    """Ranges and contradictions that can be seen without the model; returns the file to write.

    Raises:
        ConfigError: names the flag, what was got and what is expected.
    """
    beside = config.model.parent if config.model.exists() else Path()  # a model of the hub: where we are
    file = config.output or beside / f"{config.model.stem}.onnx"
    if file.suffix not in (".onnx", ".pt2"):
        raise ConfigError(f"--output {file} ends in {file.suffix or 'nothing'}; expected .onnx or .pt2, which is the format.")
    if config.int8 != "off" and file.suffix != ".onnx":
        raise ConfigError(f"--int8 is ONNX Runtime's; {file} is a .pt2. Write an .onnx, or leave --int8 out.")
    if config.int8 != "off" and config.half:
        raise ConfigError("--int8 and --half contradict each other; give one of them.")
    if config.int8 == "static" and config.calibration is None and config.data_path is None and config.data_set == "FOLDER":
        raise ConfigError("--int8 static is calibrated on images: give --data-path or --calibration, or take --int8 dynamic.")
    if config.card and not config.model.is_dir():
        raise ConfigError(f"--card is written into the folder of a saved model; {config.model} is none. Give run/pruned.")
    require_counts(config, "batch_size", "check_images", "calibration_images", "top1_images", "threads")
    if not 0 <= config.max_loss <= 100:
        raise ConfigError(f"--max-loss is in points of top-1, from 0 to 100; got {config.max_loss}.")
    return file


def require_counts(config: object, *names: str) -> None:
    """ConfigError where one of these settings is below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, got {value}.")


@dataclass(frozen=True)
class PredictConfig:
    """Name what is on images, with a model that p3b saved or exported."""

    model: Positional[Path]
    """run/pruned, first_sparse_checkpoint.pth, an .onnx or .pt2 of `p3b export`, or user/name of the Hugging Face hub."""
    images: Positional[tuple[str, ...]] = ()
    """Image files, folders of them at any depth, or - for an image on standard input."""
    files_from: str | None = None
    """Text file with the names of image files, one a line; - is standard input."""
    format: Literal["table", "jsonl", "csv"] = "table"
    """table, jsonl (one JSON object a line) or csv."""
    output: Path | None = None
    """File for the answers; by default they are printed."""
    top: int = 3
    """Classes to name for each image."""
    batch_size: int = 32
    """Images that are computed at a time."""
    workers: int | None = None
    """Threads that decode images; by default one for each core."""
    threads: int | None = None
    """Threads that compute; by default as many as PyTorch takes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; ONNX Runtime computes on the CPU."""
    layout: str = "index"
    """How a saved model is carried out: index, folded, gathered, zeros, balanced, ..., or auto: measure."""
    max_pixels: int = 89_478_485
    """An image with more pixels is not decoded: memory stays bounded whatever a file claims to be."""


def check_predict(config: PredictConfig) -> None:
    """Ranges and contradictions that can be seen without the model.

    Raises:
        ConfigError: names the flag, what was got and what is expected.
    """
    require_counts(config, "top", "batch_size", "workers", "threads", "max_pixels")
    if "-" in config.images and config.files_from == "-":
        raise ConfigError("Standard input cannot be both an image (-) and a list of files (--files-from -).")
    if config.images.count("-") > 1:
        raise ConfigError("- stands for the image on standard input; give it once.")


@dataclass(frozen=True)
class BenchConfig:
    """Measure models side by side: latency of one image, throughput of many, memory, size of the file."""

    models: Positional[tuple[Path, ...]]
    """Models to measure: run/dense run/pruned pruned.onnx pruned.pt2, or user/name of the Hugging Face hub. Ratios are to the
    first; where the only saved model is a pruned one, a dense one of its shape goes first."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Images at a time."""
    compile: bool = False
    """Measure saved models by torch.compile, too."""
    layout: str = "auto"
    """How saved models are carried out: auto (measure for each batch size), index, folded, gathered, zeros, balanced, ..."""
    threads: int | None = None
    """Threads that are computed with; by default as many as PyTorch takes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; ONNX Runtime computes on the CPU."""
    rounds: int = 100
    """Rounds in which the sides take turns, at most."""
    seconds: float = 20.0
    """That the rounds at one batch size may take, about."""
    memory: bool = True
    """Measure peak memory, in a process of its own for each side (on the CPU)."""
    json: Path | None = None
    """File for the same figures as JSON."""


def check_bench(config: BenchConfig) -> None:
    """Ranges and contradictions that can be seen without the models.

    Raises:
        ConfigError: names the flag, what was got and what is expected.
    """
    if not config.models:
        raise ConfigError("No model is given: run/dense, run/pruned, an .onnx or a .pt2.")
    if len(set(config.models)) != len(config.models):
        raise ConfigError(f"A model is given twice: {' '.join(map(str, config.models))}.")
    if not config.batch_sizes or len(set(config.batch_sizes)) != len(config.batch_sizes) or min(config.batch_sizes) < 1:
        raise ConfigError(
            f"--batch-sizes are {' '.join(map(str, config.batch_sizes))}; expected numbers of 1 or more, each once."
        )
    require_counts(config, "threads", "rounds")
    if not config.seconds > 0:
        raise ConfigError(f"--seconds must be above 0, got {config.seconds}.")


@dataclass(frozen=True)
class ServeConfig:
    """Try a model on a web page: drop an image, see labels, probabilities and times, of the dense model beside it."""

    model: Positional[Path]
    """run/pruned, first_sparse_checkpoint.pth, an .onnx or .pt2 of `p3b export`, or user/name of the Hugging Face hub."""
    dense: Path | None = None
    """A second model to show beside: run/dense."""
    host: str = "127.0.0.1"
    """Address to listen at; the default is reached from this machine alone, 0.0.0.0 from everywhere."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    top: int = 5
    """Classes to name."""
    layout: str = "auto"
    """How saved models are carried out: auto (measure), index, folded, gathered, zeros, balanced, ..."""
    threads: int | None = None
    """Threads that compute; by default as many as PyTorch takes."""
    max_megabytes: float = 20.0
    """Size of an image file, at most."""
    max_pixels: int = 50_000_000
    """An image with more pixels is not decoded."""
    max_images: int = 16
    """Images that are received, decoded and computed at a time; further ones are turned away until one of them is done."""
    decoders: int = 2
    """Images that are decoded at a time: each takes up to 8 bytes a pixel."""


def check_serve(config: ServeConfig) -> None:
    """Ranges and contradictions that can be seen without the models.

    Raises:
        ConfigError: names the flag, what was got and what is expected.
    """
    require_counts(config, "top", "threads", "max_pixels", "max_images", "decoders")
    if not 0 < config.max_megabytes <= 1000:
        raise ConfigError(f"--max-megabytes is {config.max_megabytes:g}; expected a number above 0, 1000 at most.")
    if not 0 <= config.port < 1 << 16:
        raise ConfigError(f"--port is {config.port}; expected 0 to 65535.")
    if config.dense == config.model:
        raise ConfigError(f"--dense is the model itself, {config.model}; give the model that it was pruned from.")


@dataclass(frozen=True)
class PushConfig:
    """Put a saved model on the Hugging Face hub, with a model card."""

    model: Positional[Path]
    """A model that p3b saved: run/pruned, or first_sparse_checkpoint.pth. A README.md of yours in it is taken as its card."""
    repo: Positional[str]
    """user/name; made where it is absent."""
    revision: str | None = None
    """Branch to push to, made where it is absent; by default the main branch."""
    private: bool = False
    """A new repository is private."""
    message: str = "A model saved by p3b"
    """Of the commit."""
