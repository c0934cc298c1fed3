from __future__ import annotations

import math

from dsft.evaluate.forgetting import forgetting


def test_fires_above_the_limit_only() -> None:
    assert forgetting("general", 2.0, 2.1, None) is None
    assert forgetting("general", 2.0, 2.1, 0.1000001) is None
    assert forgetting("general", 2.0, 1.0, 0.0) is None
    assert forgetting("general", 2.0, math.nan, 0.0) is None
    found = forgetting("general", 2.0, 2.5, 0.1)
    assert found is not None
    assert found.set_name == "general"
    for said in ("'general'", "0.5000 above the 2.0000", "max_rise 0.1", "x 1.65"):
        assert said in found.message
