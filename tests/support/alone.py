"""The control group of a run of one rank, without torch: for code that only talks to ``Groups``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


class Alone:
    rank, size = 0, 1
    world = SimpleNamespace(rank=0, size=1)

    def sum(self, values: Any) -> Any:
        return values

    def all_gather_object(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value))]

    def broadcast_object(self, value: Any) -> Any:
        return self.all_gather_object(value)[0]

    def agree(self, error: Exception | None) -> None:
        if error is not None:
            raise error

    @contextmanager
    def together(self) -> Iterator[None]:
        yield

    def barrier(self) -> None:
        pass


ALONE: Any = Alone()
