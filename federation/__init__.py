"""The server side of the wire: rounds, releases, rollouts, and the fleet."""
