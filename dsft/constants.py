"""Numbers that several layers must agree on. Imports nothing."""

IGNORE_INDEX = -100
"""Label of a position that teaches nothing (torch's and transformers' convention)."""

ORDER_VERSION = 2
"""Version of the data order. Raised by every change that would make the same seed draw other documents."""

STORE_VERSION = 1
"""Version of the token store's files."""

CHECKPOINT_VERSION = 2
"""Version of the checkpoint folder's layout."""

MODEL_PREFIX = "hf."
"""What stands before a Hugging Face parameter name inside ``PackedCausalLM``; checkpoints, logs and exports drop it."""

EXIT_OK = 0
EXIT_RUN_FAILED = 1
EXIT_USAGE = 2
EXIT_CANNOT_SAVE = 74
EXIT_STOPPED_EARLY = 75
"""Stopped on request with everything saved: the scheduler may requeue (EX_TEMPFAIL of sysexits.h)."""
