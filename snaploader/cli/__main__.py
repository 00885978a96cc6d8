"""`python -m snaploader.cli`."""

from snaploader.cli import main

main()
