"""The device side of the wire: training, verifying, running adapters, reporting."""
