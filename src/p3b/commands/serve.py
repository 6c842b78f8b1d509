"""`p3b serve`: a web page on which anybody at this machine can try a model, the dense one beside it."""

from __future__ import annotations

import socket
from contextlib import closing
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from p3b.deploy.choice import AUTO
from p3b.deploy.hub import local_copy
from p3b.deploy.layouts import check_layout
from p3b.deploy.prediction import pixel_limit
from p3b.deploy.runners import open_runner
from p3b.deploy.side_by_side import Model, SideBySide
from p3b.errors import ConfigError
from p3b.run.deploy_options import ServeConfig, check_serve
from p3b.run.screen import Screen

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from uvicorn import Server

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_MOST_WAITING = 2048
"""Connections that wait to be taken, and that are open at a time, where the operating system allows as many."""
_SECONDS = 30.0
"""Until a connection has brought a request."""


def serve(config: ServeConfig) -> None:
    """Serve the page until interrupted.

    Raises:
        UserError: settings or models that cannot be used, or the address is taken.
    """
    check_serve(config)
    check_layout(config.layout, [AUTO])
    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise ConfigError('p3b serve needs Starlette and uvicorn: pip install "p3b[serve]".')
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    screen = Screen(is_main=True)
    with closing(listen(config.host, config.port)) as listening, pixel_limit(config.max_pixels):
        app = build(config)
        place = f"[{config.host}]" if ":" in config.host else config.host
        screen.say(f"http://{place}:{listening.getsockname()[1]}  (Ctrl-C ends it)")
        if not is_loopback(config.host):
            screen.say("anyone who can reach this machine can use it: there is neither a password nor encryption")
        run(app, listening)


def build(config: ServeConfig) -> Starlette:
    """The application with the models that the settings name."""
    from p3b.deploy.server import Limits, build_app

    paths = [path for path in (config.dense, config.model) if path is not None]
    looker = SideBySide([open_model(path, config.layout) for path in paths], top=config.top, max_pixels=config.max_pixels)
    limits = Limits(int(config.max_megabytes * 1e6), config.max_pixels, config.max_images, config.decoders)
    return build_app(looker, limits, hosts=_LOOPBACK if is_loopback(config.host) else ("*",))


def open_model(path: Path, layout: str) -> Model:
    """A model of any kind, with its size and its file beside its name."""
    here = local_copy(str(path))
    runner = open_runner(here, layout=layout)
    files = [here] if here.is_file() else list(here.glob("*.safetensors"))
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    return Model(str(path), f"{megabytes:.2f} MB, {runner.metadata.precision}", runner)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, before any model is read.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_MOST_WAITING)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen at {host}, port {port} ({error.strerror or error}). Choose another --port or --host."
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def run(app: Starlette, listening: socket.socket) -> None:
    """Answer until interrupted."""
    server_of(app, most=most_connections()).run(sockets=[listening])


def server_of(app: Starlette, *, seconds: float = _SECONDS, most: int) -> Server:
    """The server of an application.

    Args:
        app: of `build`.
        seconds: that a connection may take to bring the header of a request.
        most: connections that are open at a time.
    """
    import uvicorn

    from p3b.deploy.connections import guarded

    return uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", ws="none", server_header=False,
            http=guarded(seconds, most),
        )
    )  # fmt: skip


def most_connections() -> int:
    """Connections that may be open at a time: half of the files that the operating system lets this process open."""
    try:
        import resource
    except ImportError:  # Windows has none, and no such limit
        return _MOST_WAITING
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_WAITING if soft == resource.RLIM_INFINITY else max(1, min(_MOST_WAITING, soft // 2))
