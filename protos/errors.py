"""The root of the errors of the wire.

The tree (each leaf stands beside the noun that raises it)::

    WireError                  protos.errors      a message that is out of bounds or malformed
    ├── AddressInUseError      protos.channel     a port that another process holds
    └── RecordError            protos.fields      a Flower record that is not what it should be
        └── MissingStart       protos.fields      it builds on an adapter that is not here
"""


class WireError(Exception):
    """A message that must not be acted on; the text names the field, the value and the bound."""
