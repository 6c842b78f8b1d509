"""`p3b serve`: the page, an image's answer, refusals in words, and a server that lives whatever is sent to it."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import p3b
from exported import NAMES, PREPROCESSING, photos, save_small
from p3b.commands.command_line import main
from p3b.commands.serve import build, is_loopback, listen, server_of
from p3b.deploy.photos import Preparation
from p3b.deploy.prediction import pixel_limit
from p3b.deploy.runners import open_runner
from p3b.errors import ConfigError
from p3b.run.deploy_options import ServeConfig, check_serve
from tiny import tiny_vit

MOST_PIXELS = 100_000


@contextmanager
def _serving(config: ServeConfig, *, seconds: float = 30.0, most: int = 100) -> Iterator[int]:
    """The port of a server that runs in a thread, which leaves signals to the main one."""
    listening = listen("127.0.0.1", 0)
    server = server_of(build(config), seconds=seconds, most=most)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    with pixel_limit(config.max_pixels):
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
            listening.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    said: dict[str, Any] = {"class_names": NAMES, "preprocessing": PREPROCESSING.to_dict()}
    return save_small(root / "pruned"), p3b.save(tiny_vit(), root / "dense", **said)


@pytest.fixture(scope="module")
def port(folders: tuple[Path, Path]) -> Iterator[int]:
    pruned, dense = folders
    config = ServeConfig(
        pruned, dense=dense, layout="index", max_megabytes=0.1, max_pixels=MOST_PIXELS, max_images=3, decoders=1, top=2
    )
    with _serving(config) as number:
        yield number


def _ask(port: int, body: bytes, path: str = "/predict", **headers: str) -> tuple[int, dict[str, Any]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, and that ends there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_both_models_answer_as_they_do_in_prediction(port: int, folders: tuple[Path, Path]) -> None:
    image = photos(2)[1]
    status, found = _ask(port, _png(image))
    assert status == 200
    assert (found["width"], found["height"]) == image.size
    assert [answer["model"] for answer in found["answers"]] == [str(folders[1]), str(folders[0])]
    for answer, folder in zip(found["answers"], (folders[1], folders[0]), strict=True):
        runner = open_runner(folder)
        logits = runner(Preparation(runner.metadata)(image)[None])
        expected = torch.from_numpy(logits).double().softmax(-1)[0]
        first, second = expected.topk(2).indices.tolist()
        assert [label["label"] for label in answer["labels"]] == [NAMES[first], NAMES[second]]
        assert answer["labels"][0]["probability"] == pytest.approx(expected[first].item(), abs=1e-6)
        assert answer["milliseconds"] > 0


def test_the_page_is_whole_in_itself(port: int, folders: tuple[Path, Path]) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/")
    answer = connection.getresponse()
    page = answer.read().decode()
    connection.close()
    assert answer.status == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert all(str(folder) in page for folder in folders)
    assert "prefers-color-scheme: dark" in page and "0.1 MB" in page
    assert "http" not in page.replace("<!doctype html>", "")


REFUSED: dict[str, tuple[bytes, int, str]] = {
    "text": (b"hello", 422, "it is no image"),
    "nothing": (b"", 400, "No image was sent"),
    "a truncated image": (_png(photos(1)[0])[:-300], 422, "cannot be read"),
    "2^31 - 1 pixels a side": (_claiming(2**31 - 1, 2**31 - 1), 422, "cannot be read"),
    "2^32 - 1 pixels a side": (_claiming(2**32 - 1, 2**32 - 1), 422, "cannot be read"),
    "a bomb": (_png(Image.new("L", (4000, 4000))), 422, "far more than the 100,000 pixels"),
    "a small bomb": (_png(Image.new("L", (400, 400))), 422, "400 x 400 pixels, more than the 100,000"),
    "a picture in text": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 422, "it is no image"),
    "a large file": (b"\0" * 200_000, 413, r"larger than the 0.1 MB"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest puts its own filters over the server's
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_image_or_too_large_is_refused_in_words(port: int, what: str) -> None:
    body, status, words = REFUSED[what]
    got, found = _ask(port, body)
    assert (got, words in found["error"]) == (status, True), found
    assert _ask(port, _png(photos(1)[0]))[0] == 200


def test_many_at_once_are_answered_or_turned_away_in_words(port: int) -> None:
    image = _png(photos(1)[0])
    with ThreadPoolExecutor(30) as pool:
        found = list(pool.map(lambda _: _ask(port, image), range(60)))
    assert {status for status, _ in found} <= {200, 503}
    assert any(status == 200 for status, _ in found)
    assert all("busy" in answer["error"] for status, answer in found if status == 503)
    assert _ask(port, image)[0] == 200


def test_a_page_of_elsewhere_does_not_reach_it(port: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/predict", _png(photos(1)[0]), {"Host": "evil.example"})
    assert connection.getresponse().status == 400
    connection.close()


def test_settings_that_cannot_be_used_are_refused(
    folders: tuple[Path, Path], port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, words in (
        ({"port": 70_000}, "--port"),
        ({"max_megabytes": 0.0}, "--max-megabytes"),
        ({"decoders": 0}, "--decoders"),
        ({"dense": folders[0]}, "--dense"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_serve(ServeConfig(folders[0], **change))  # type: ignore[arg-type]
    assert main(["serve", str(folders[0]), "--port", str(port)]) == 2
    assert f"port {port}" in capsys.readouterr().err
    assert [is_loopback(host) for host in ("localhost", "127.0.0.9", "::1", "0.0.0.0", "example.org")] == [True] * 3 + [
        False
    ] * 2


def test_threads_that_ask_at_once_get_the_same_answers(port: int) -> None:
    """Two at a time, so that none is turned away."""
    bodies = [_png(image) for image in photos(4)]
    alone = [_ask(port, body)[1]["answers"] for body in bodies]
    with ThreadPoolExecutor(2) as pool:
        together = [answer["answers"] for _, answer in pool.map(lambda body: _ask(port, body), bodies)]
    probabilities = [
        [label["probability"] for answer in answers for label in answer["labels"]]
        for each in (alone, together)
        for answers in each
    ]
    assert np.allclose(probabilities[:4], probabilities[4:])


def _open(port: int, sends: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(sends)
    return connection


def _read(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    with connection, connection.makefile("rb") as file:
        return file.read()


REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("sends", [b"", REQUEST, REQUEST + b"\r\n" + REQUEST], ids=["nothing", "half", "one and a half"])
def test_a_connection_that_brings_no_request_is_closed(folders: tuple[Path, Path], sends: bytes) -> None:
    with _serving(ServeConfig(folders[0], layout="index"), seconds=0.05) as port:
        connection = _open(port, sends)
        assert b"408" in (said := _read(connection)) and b"No request arrived within 0.05 seconds" in said
        assert said.startswith(b"HTTP/1.1 200") == (sends.count(REQUEST) == 2)
        image = _png(photos(1)[0])
        assert _ask(port, image)[0] == 200


def test_silent_connections_make_room_for_others(folders: tuple[Path, Path]) -> None:
    with _serving(ServeConfig(folders[0], layout="index"), most=3) as port:
        silent = [_open(port) for _ in range(8)]
        assert _ask(port, _png(photos(1)[0]))[0] == 200
        for connection in silent[:5]:
            assert b"503" in (said := _read(connection)) and b"too many connections" in said
        for connection in silent[5:]:
            connection.close()
