"""`python -m orchestrator`: the command line, where its script is not on the path."""

from fleetune_start import main

main()
