"""The advice that a run follows, kept in its folder, so that its report can say why the run was made."""

from __future__ import annotations

import json
from pathlib import Path

from dsft.errors import ConfigError
from dsft.fsio import write_bytes

ADVICE_NAME = "advice.json"


def keep_advice(source: str | None, run_dir: Path) -> None:
    """Copy ``source`` (``run.advice``) to the run's folder; one that is there already stays.

    Raises:
        ConfigError: there is no such file, or it was not written by ``dsft advise``.
    """
    target = run_dir / ADVICE_NAME
    if source is None or target.is_file():
        return
    try:
        content = Path(source).read_bytes()
        advice = json.loads(content)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"run.advice: {source} cannot be read ({error}; looked from {Path.cwd()}). It is the advice.json that dsft "
            "advise wrote beside the YAML; correct the path, or remove the key: only the report needs it."
        ) from error
    if not isinstance(advice, dict) or not {"verdict", "factors", "evidence"} <= advice.keys():
        raise ConfigError(f"run.advice: {source} is not the advice.json of dsft advise; correct or remove the key.")
    write_bytes(target, content)
