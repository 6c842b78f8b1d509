"""Hostile images, and a thousand requests at once: a real `p3b serve` has to answer in words, to stay small, and to live."""

from __future__ import annotations

import asyncio
import io
import json
import random
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from exported import photos, save_small

MEGABYTES = 500.0
"""What one image, or all requests at once, may take beside what the server holds already."""
SECONDS = 30.0
AT_ONCE = 1000


def cases(count: int, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """The named images, then damaged ones drawn by chance, each sent to the server; many requests at once, and clients that
    stall; then all images read by `p3b predict`.

    Args:
        count: cases in all.
        seed: of the damage.
        work: folder for the model and the images.
    """
    model = save_small(work / "model")
    images = {**{name: make() for name, make in HOSTILE.items()}, **_damaged(count - len(HOSTILE) - 3, seed)}
    with Server(model) as server:
        for name, content in images.items():
            yield _sent(server, name, content)
        yield _at_once(server)
        yield _stalled(server)
    yield _predicted(model, images, work)


# -------------------------------------------------------------------------------------------------------------- images


def _png(width: int, height: int, content: bytes = b"", *, kind: int = 2, more: bytes = b"") -> bytes:
    """A PNG whose header claims a size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", content or zlib.compress(b"")) + chunk(b"IEND", b"")


def _saved(image: Image.Image, kind: str, **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def _text_bomb() -> bytes:
    """A small picture with a compressed text of 256 MB."""
    said = PngImagePlugin.PngInfo()
    said.add_text("Comment", "\0" * (1 << 28), zip=True)
    return _saved(Image.new("RGB", (8, 8)), "PNG", pnginfo=said)


def _inflated() -> bytes:
    """A header of 8 x 8 pixels and pixel data that inflates to 1 GB."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 24)) for _ in range(64)) + packer.flush()
    return _png(8, 8, packed)


HOSTILE: Mapping[str, Callable[[], bytes]] = {
    "PNG of 2^31 - 1 pixels a side": lambda: _png(2**31 - 1, 2**31 - 1),
    "PNG of 2^32 - 1 pixels a side": lambda: _png(2**32 - 1, 2**32 - 1),
    "PNG of no pixels": lambda: _png(0, 0),
    "PNG bomb of 900 megapixels": lambda: _saved(Image.new("1", (30_000, 30_000)), "PNG"),
    "PNG of 49 megapixels, which is allowed": lambda: _saved(Image.new("RGB", (7000, 7000)), "PNG"),
    "PNG with a text of 256 MB": _text_bomb,
    "PNG whose pixels inflate to 1 GB": _inflated,
    "GIF of 65535 pixels a side": lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\xf7\0\0" + bytes(768) + b";",
    "BMP of 2^31 - 1 pixels a side": lambda: (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6)
    ),
    "TIFF of 2^31 pixels a side": lambda: (
        b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIIHHII", 256, 4, 1, 1 << 31, 257, 4, 1, 1 << 31) + bytes(4)
    ),
    "a page in place of an image": lambda: b"<html><script>alert(1)</script></html>",
}


def _damaged(count: int, seed: int) -> dict[str, bytes]:
    """Photos in several formats, cut off or overwritten at random places."""
    chance = random.Random(seed)
    found = {}
    for number in range(max(count, 0)):
        kind = chance.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"))
        content = bytearray(_saved(photos(4)[number % 4], kind))
        how = chance.choice(("cut off", "overwritten"))
        if how == "cut off":
            del content[chance.randrange(len(content)) :]
        else:
            for _ in range(chance.randint(1, 20)):
                content[chance.randrange(len(content))] = chance.randrange(256)
        found[f"{kind} {number}, {how}"] = bytes(content)
    return found


# ------------------------------------------------------------------------------------------------------------ the server


class Server:
    """`p3b serve` in a process of its own."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "p3b", "serve", str(model), "--port", "0", "--layout", "index", "--threads", "1"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().split("127.0.0.1:")[1].split()[0])

    def __enter__(self) -> Server:
        good = _saved(photos(1)[0], "PNG")
        until = time.monotonic() + SECONDS
        while self.ask(good)[0] != 200 and time.monotonic() < until:
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(SECONDS)

    @property
    def lives(self) -> bool:
        """Whether it answers an ordinary image."""
        return self._process.poll() is None and self.ask(_saved(photos(1)[0], "PNG"))[0] == 200

    def ask(self, content: bytes) -> tuple[int, dict[str, Any]]:
        """Status and answer; 0 where there is none."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request("POST", "/predict", content)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, ValueError) as error:
            return 0, {"error": f"NO ANSWER: {type(error).__name__}: {error}"}
        finally:
            connection.close()

    def measured(self, act: Callable[[], Any]) -> tuple[Any, float, float]:
        """What an action gives, its seconds, and the megabytes that the server grew by at most."""
        status = Path(f"/proc/{self._process.pid}")
        (status / "clear_refs").write_text("5")
        before, begun = self._peak(), time.perf_counter()
        found = act()
        return found, time.perf_counter() - begun, (self._peak() - before) / 1e6

    def _peak(self) -> int:
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(text.split("VmHWM:")[1].split()[0])


def _sent(server: Server, name: str, content: bytes) -> dict[str, Any]:
    (status, answer), seconds, megabytes = server.measured(lambda: server.ask(content))
    told = status == 200 or (400 <= status < 500 and bool(answer.get("error")))
    ok = told and server.lives and seconds < SECONDS and megabytes < MEGABYTES
    words = answer.get("error") or f"answered: {answer.get('width')} x {answer.get('height')} pixels"
    kind = "damaged images, one at a time" if name.split(",")[-1].strip() in ("cut off", "overwritten") else "hostile images"
    return _case(f"{name}, sent", kind, ok, f"{status}: {words}", seconds=seconds, megabytes=megabytes)


def _at_once(server: Server) -> dict[str, Any]:
    """All connections are open before the first request is sent."""
    statuses, seconds, megabytes = server.measured(lambda: asyncio.run(_ask_at_once(server.port, _saved(photos(1)[0], "PNG"))))
    answered, turned_away = statuses.count(200), statuses.count(503)
    ok = answered + turned_away == AT_ONCE and answered > 0 and server.lives and megabytes < MEGABYTES
    detail = f"{answered} answered, {turned_away} turned away in words, {AT_ONCE - answered - turned_away} without an answer"
    return _case(f"{AT_ONCE} requests at once", "requests at once", ok, detail, seconds=seconds, megabytes=megabytes)


async def _ask_at_once(port: int, content: bytes) -> list[int]:
    _allow_files(2 * AT_ONCE)
    ready = asyncio.Event()
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode()

    async def one() -> int:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await ready.wait()
            writer.write(head + content)
            text = await asyncio.wait_for(reader.read(), SECONDS)
            writer.close()
        except (OSError, asyncio.TimeoutError):
            return 0
        status = int(text.split(b" ")[1]) if text.startswith(b"HTTP") else 0
        return status if status == 200 or b'"error"' in text else 0

    tasks = [asyncio.create_task(one()) for _ in range(AT_ONCE)]
    await asyncio.sleep(2.0)
    ready.set()
    return list(await asyncio.gather(*tasks))


def _stalled(server: Server) -> dict[str, Any]:
    """Clients that send half an image and hold the line, then go away."""

    async def stall() -> None:
        writers = []
        for _ in range(100):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n" + bytes(500_000))
            writers.append(writer)
        await asyncio.sleep(1.0)
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(1.0)

    _, seconds, megabytes = server.measured(lambda: asyncio.run(stall()))
    ok = server.lives and megabytes < MEGABYTES
    return _case("100 uploads that stop half-way", "requests at once", ok, "it lives", seconds=seconds, megabytes=megabytes)


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, count), hard), hard))


# --------------------------------------------------------------------------------------------------------------- predict


def _predicted(model: Path, images: Mapping[str, bytes], work: Path) -> dict[str, Any]:
    """All images, and an ordinary one, in one call: each is answered or named; memory stays near that of the ordinary one."""
    folder = work / "images"
    folder.mkdir()
    (folder / "ordinary.png").write_bytes(_saved(photos(1)[0], "PNG"))
    _, _, alone = _run_predict(model, [folder / "ordinary.png"])
    files = [folder / "ordinary.png"]
    for number, content in enumerate(images.values()):
        files.append(folder / f"{number}.png")
        files[-1].write_bytes(content)
    begun = time.perf_counter()
    status, lines, all_of_them = _run_predict(model, files)
    seconds, megabytes = time.perf_counter() - begun, (all_of_them - alone) / 1e6
    told = len(lines) == len(files) and all("labels" in line or line["error"] for line in lines)
    refused = sum("error" in line for line in lines)
    detail = f"exit status {status}; {len(lines)} of {len(files)} told, {refused} of them refused in words"
    ok = status == 0 and told and megabytes < MEGABYTES
    return _case("all images in one call of p3b predict", "p3b predict", ok, detail, seconds=seconds, megabytes=megabytes)


_PREDICT = """
import sys
from pathlib import Path
from p3b.commands.command_line import main
status = main(sys.argv[1:])
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], file=sys.stderr)
sys.exit(status)
"""
"""The peak that the system reports of a process that has ended counts what its parent held."""


def _run_predict(model: Path, files: list[Path]) -> tuple[int, list[dict[str, Any]], int]:
    """Exit status, answers, and peak memory of a call with two workers, in bytes."""
    arguments = ["predict", str(model), *map(str, files), "--format", "jsonl", "--workers", "2"]
    done = subprocess.run([sys.executable, "-c", _PREDICT, *arguments], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, lines, 1024 * int(done.stderr.split()[-1])


def _case(name: str, kind: str, ok: bool, detail: str, *, seconds: float, megabytes: float) -> dict[str, Any]:
    figures = {"seconds": round(seconds, 3), "megabytes": round(megabytes, 1)}
    return {"part": "server", "case": name, "kind": kind, "ok": ok, "detail": detail[:300], **figures}
