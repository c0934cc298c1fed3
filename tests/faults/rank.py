"""``python -m tests.faults.rank train …``: dsft as it is, in a process that may be told to die at a point of a save."""

from __future__ import annotations

from tests.faults import crash_points

if __name__ == "__main__":
    crash_points.install()
    from dsft.cli.main import main

    main()
