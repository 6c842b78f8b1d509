"""Export a model that p3b saved from Python, then run the file with ONNX Runtime alone, as a deployment does.

python examples/export_onnx.py run/pruned small.onnx     (needs pip install ".[onnx]"; on the command line: p3b export)
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime

from p3b.commands.export import export_saved
from p3b.run.deploy_options import ExportConfig


def main(folder: Path, file: Path, layout: str, batch_size: int, rounds: int) -> None:
    export_saved(
        ExportConfig(folder, file, layout=layout, batch_size=batch_size)
    )  # checked in ONNX Runtime before it is written

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    inside = session.get_modelmeta().custom_metadata_map  # class names, preprocessing, where the model comes from
    given = session.get_inputs()[0]
    images = np.random.default_rng(0).random((batch_size, *given.shape[1:]), dtype=np.float32)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        session.run(None, {given.name: images})
        seconds.append(time.perf_counter() - start)
    print(f"{file}: {1000 * statistics.median(seconds):.2f} ms for {batch_size} image(s); it also holds {', '.join(inside)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layout", default="auto", help="how pruned blocks are executed; auto measures")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30, help="timed calls")
    given = parser.parse_args()
    main(given.folder, given.file, given.layout, given.batch_size, given.rounds)
