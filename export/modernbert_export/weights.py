"""Do the stored weights fit the configuration? Read from the files' headers, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.model import ModernBertModel, ModernBertPreTrainedModel

# What checkpoints hold beside the encoder: heads, and tables that older versions stored.
_OTHERS = ("head.", "decoder.", "classifier.", "qa_outputs.", "lm_head.")
_BUFFER = "inv_freq"


def check_weights(
    name: str,
    files: Sequence[Path],
    config: ModernBertConfig,
    model: type[ModernBertPreTrainedModel] = ModernBertModel,
) -> None:
    """Compares names and shapes of weights with what the configuration asks for.

    Args:
        name: of the checkpoint, for messages.
        files: its safetensors files.
        config: its configuration.
        model: the encoder, or a class with the head that is needed too. Weights of other heads may be there.

    Raises:
        InputError: some are missing, too many or of another shape; all are listed, in one line.
    """
    try:
        with torch.device("meta"):
            whole = model(config)
    except KeyError as error:  # of the activation's name, which transformers looks up
        raise InputError(f"model {name!r} cannot be loaded: its config.json names {error}, which is unknown") from error
    tied = whole.all_tied_weights_keys  # not stored
    wanted = {
        key.removeprefix("model."): list(value.shape) for key, value in whole.state_dict().items() if key not in tied
    }
    stored: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                stored |= {key.removeprefix("model."): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"model {name!r}: {path.name} cannot be loaded: {' '.join(str(error).split())}") from error
    unused = {key for key in stored if key not in wanted and (key.startswith(_OTHERS) or _BUFFER in key)}
    found = {key: shape for key, shape in stored.items() if key not in unused}
    faults = {
        "missing": sorted(wanted.keys() - found.keys()),
        "not part of a ModernBERT": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{key} {found[key]} instead of {wanted[key]}"
            for key in sorted(wanted.keys() & found.keys())
            if found[key] != wanted[key]
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in faults.items() if keys)
        raise InputError(f"model {name!r} does not have the weights that its config.json describes: {listed}")
