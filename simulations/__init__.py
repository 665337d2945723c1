"""The world around the product: scenarios, simulated fleets, bad links, attackers."""
