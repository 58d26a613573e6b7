"""`python -m octoc`, the same as `octoc`."""

from octoc.cli import main

main()
