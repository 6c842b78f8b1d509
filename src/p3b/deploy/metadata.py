"""What an exported model says of itself: class names, preprocessing, provenance, and what it takes.

An ONNX file keeps it as `metadata_props`, a `.pt2` as the extra file `p3b.json`: plain JSON in both, so that whoever holds the
file needs neither p3b nor the run folder that it came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from p3b import __version__
from p3b.data.transforms import Preprocessing
from p3b.errors import ConfigError, WeightsError
from p3b.storage.model_config import TRAINING_IMAGES
from p3b.storage.untrusted import first_line, parse_json

FORMAT = "p3b-export"
Takes = Literal["tensors", "images"]
Precision = Literal["fp32", "fp16", "int8 static", "int8 dynamic"]


@dataclass(frozen=True)
class Metadata:
    """What travels inside an export.

    Attributes:
        class_names: one for each output; None where the saved model has none.
        preprocessing: how images are prepared; None where the saved model does not say.
        provenance: where the model comes from (plain JSON values).
        takes: "tensors": (N, C, H, W) float32, prepared and normalised; "images": (N, C, H, W) uint8 of any size.
        precision: of the weights, and what most of the products are computed in.
        layout: how the pruned blocks are carried out (`p3b.deploy.layouts`).
    """

    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    provenance: Mapping[str, Any] | None = None
    takes: Takes = "tensors"
    precision: Precision = "fp32"
    layout: str = "index"

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Metadata:
        """From the config of a saved model."""
        names, preprocessing = config["class_names"], config["preprocessing"]
        provenance = config["provenance"]
        if provenance is not None:
            provenance = {key: value for key, value in provenance.items() if key != TRAINING_IMAGES}
        return cls(
            None if names is None else tuple(names),
            None if preprocessing is None else Preprocessing.from_dict(preprocessing),
            provenance,
        )

    def to_text(self) -> dict[str, str]:
        """Each entry as JSON, and the format and version; `from_text` is the way back."""
        entries = {**asdict(self), "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict()}
        return {"format": FORMAT, "p3b_version": __version__, **{key: json.dumps(value) for key, value in entries.items()}}

    @classmethod
    def from_text(cls, texts: Mapping[str, str], origin: str) -> Metadata:
        """What `to_text` gave.

        Args:
            texts: entries by name; others than ours are left alone.
            origin: the file, for messages.

        Raises:
            WeightsError: the file was not exported by p3b, or its description is damaged.
        """
        if texts.get("format") != FORMAT:
            raise WeightsError(f"{origin} was not written by `p3b export`: it has no entry format = {FORMAT}.")
        try:
            values = {name: parse_json(texts[name]) for name in cls.__dataclass_fields__}
            names, preprocessing = values["class_names"], values["preprocessing"]
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ValueError("class_names is no list of names")
            if values["takes"] not in ("tensors", "images"):
                raise ValueError(f"takes is {str(values['takes'])[:40]!r}")
            values["class_names"] = None if names is None else tuple(names)
            values["preprocessing"] = None if preprocessing is None else Preprocessing.from_dict(preprocessing)
            return cls(**values)
        except (KeyError, ValueError, TypeError, ConfigError) as error:
            raise WeightsError(
                f"{origin}: its description is damaged ({first_line(error)}). Export the model again."
            ) from error
