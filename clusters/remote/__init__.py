"""A cluster of another machine: a link to it, Fleetune's own code sent there, and requests that it answers."""
