"""`python -m sim.cli` is `kvproof`."""

from sim.cli import main

main()
