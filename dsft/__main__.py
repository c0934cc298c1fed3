"""``python -m dsft``."""

from dsft.cli.main import main

main()
