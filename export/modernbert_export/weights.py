"""Do the stored weights fit the configuration? Read from the files' headers, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.model import ModernBertModel

# What checkpoints hold beside the encoder: heads, and tables that older versions stored.
_OTHERS = ("head.", "decoder.", "classifier.", "qa_outputs.", "lm_head.")
_BUFFER = "inv_freq"


def check_weights(name: str, files: Sequence[Path], config: ModernBertConfig) -> None:
    """Compares names and shapes of the encoder's weights with what the configuration asks for.

    Raises:
        InputError: some are missing, too many or of another shape; all are listed, in one line.
    """
    try:
        with torch.device("meta"):
            wanted = {key: list(value.shape) for key, value in ModernBertModel(config).state_dict().items()}
    except KeyError as error:  # of the activation's name, which transformers looks up
        raise InputError(f"model {name!r} cannot be loaded: its config.json names {error}, which is unknown") from error
    stored: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                stored |= {key.removeprefix("model."): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"model {name!r}: {path.name} cannot be loaded: {' '.join(str(error).split())}") from error
    encoder = {key: shape for key, shape in stored.items() if not key.startswith(_OTHERS) and _BUFFER not in key}
    faults = {
        "missing": sorted(wanted.keys() - encoder.keys()),
        "not part of a ModernBERT": sorted(encoder.keys() - wanted.keys()),
        "of another shape": [
            f"{key} {encoder[key]} instead of {wanted[key]}"
            for key in sorted(wanted.keys() & encoder.keys())
            if encoder[key] != wanted[key]
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in faults.items() if keys)
        raise InputError(f"model {name!r} does not have the weights that its config.json describes: {listed}")
