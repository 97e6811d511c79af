"""`python -m polygpt` is the command `polygpt`."""

from polygpt.cli import main

main()
