from __future__ import annotations

import copy
import json

from dsft.sampling.types import Cursor
from dsft.train.state import TrainState, state_from_json

CURSOR = Cursor(0, 0, None, 0, 0, (0,), ())


def state() -> TrainState:
    return TrainState(CURSOR, step=7, first_bias={"swaps": [0.5]}, train_loss={"text": [3.0, 2.0]})


def test_json_and_back() -> None:
    assert state_from_json(json.loads(json.dumps(state().to_json()))) == state()


def test_what_a_save_writes_stays_as_it_was_while_training_goes_on() -> None:
    trained = state()
    written = trained.to_json()
    before = copy.deepcopy(written)
    trained.train_loss["text"][0] += 1.0
    trained.first_bias["swaps"].append(0.25)
    trained.overfit["best"] = 1.0
    assert written == before
