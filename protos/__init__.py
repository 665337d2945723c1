"""What goes over the wire: messages, channels, and their conversion to domain nouns."""
