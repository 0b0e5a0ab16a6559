"""`python -m dagman` is the `dagman` command."""

from dagman.cli import main

main()
