"""`python -m varscale`: the command line."""

from varscale.cli import main

main()
