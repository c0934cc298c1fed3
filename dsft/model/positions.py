"""How far a model's positions reach, against the longest piece of a document that a pack can hold."""

from __future__ import annotations

from typing import Any

from torch import nn

from dsft.errors import ModelError


def first_position(table: nn.Embedding) -> int:
    """Row of a document's first token: RoBERTa and its kin keep one for padding, and begin behind it."""
    return 0 if table.padding_idx is None else table.padding_idx + 1


def check_positions(hf: Any, pack_tokens: int) -> None:
    """Refuse packs that are longer than the model's positions.

    Two kinds of models have an end: those with a table of positions, and those whose rotary frequencies depend on the
    longest position of the whole forward (``dynamic``, ``longrope``), where beyond that end a long document would
    change the positions of the short ones beside it.

    Raises:
        ModelError: names the model type and the most that ``data.pack_tokens`` may be.
    """
    name = str(hf.config.model_type)
    for path, module in hf.named_modules():
        leaf = path.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not ("pos" in leaf or leaf == "wpe"):
            continue
        reach = module.num_embeddings - first_position(module)
        if reach < pack_tokens:
            raise ModelError(
                f"{name}: its table of positions ({path}) has {reach:,} rows, and data.pack_tokens is {pack_tokens:,}. "
                f"Set it to {reach:,} or less."
            )
    config = hf.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters] if "rope_type" in parameters else parameters.values():
        kind = str(rope["rope_type"])
        if kind == "longrope":
            reach = int(rope["original_max_position_embeddings"])
        elif "dynamic" in kind:
            reach = int(config.max_position_embeddings)
        else:
            continue
        if reach < pack_tokens:
            raise ModelError(
                f"{name}: beyond {reach:,} tokens its rotary frequencies ({kind}) depend on the longest document of a "
                f"pack, so the documents in it would change each other. Set data.pack_tokens (now {pack_tokens:,}) to "
                f"{reach:,} or less."
            )
