"""Write a model that p3b saved as ONNX, in the layout that is the quickest one in ONNX Runtime on this machine.

python examples/export_onnx.py run/pruned small.onnx --batch-size 1     (needs pip install ".[onnx]")
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch

import p3b

LAYOUTS = ("index", "folded", "balanced", "zeros")
CLOSE = 1e-3  # relative difference of logits that rounding in float32 explains, with room to spare


def main(folder: Path, file: Path, batch_size: int, rounds: int) -> None:
    model = p3b.load(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    images = torch.rand(max(batch_size, 2), model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    with torch.inference_mode():
        expected = model(images)[:batch_size]  # two at least are exported: a single one would fix the batch size
    feed = {"images": images[:batch_size].numpy()}
    sessions, seconds = {}, {layout: [] for layout in LAYOUTS}
    with tempfile.TemporaryDirectory(dir=file.absolute().parent) as scratch:
        for layout in LAYOUTS:
            torch.onnx.export(
                p3b.with_layout(model, layout), (images,), Path(scratch) / layout, dynamo=True, verbose=False,
                external_data=False, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
            sessions[layout] = onnxruntime.InferenceSession(Path(scratch) / layout, providers=["CPUExecutionProvider"])
            logits = torch.from_numpy(sessions[layout].run(None, feed)[0])
            off = ((logits - expected).abs().max() / expected.abs().max()).item()
            if not off < CLOSE:
                raise SystemExit(f"{layout}: the logits of ONNX Runtime differ from those of PyTorch by {off:.1e}, relative.")
        for _ in range(rounds):  # in turns, so that what else the machine does meets all of them
            for layout, session in sessions.items():
                start = time.perf_counter()
                session.run(None, feed)
                seconds[layout].append(time.perf_counter() - start)
        middle = {layout: statistics.median(taken) for layout, taken in seconds.items()}
        best = min(LAYOUTS, key=lambda layout: middle[layout])
        (Path(scratch) / best).replace(file)
    print(", ".join(f"{layout} {1000 * taken:.2f} ms" for layout, taken in middle.items()))
    print(f"{file}: layout {best}, the logits of PyTorch")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time that speed is measured with")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    main(given.folder, given.file, given.batch_size, given.rounds)
