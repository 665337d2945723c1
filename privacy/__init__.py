"""What may leave a device: differential privacy, its accounting and its statement."""
