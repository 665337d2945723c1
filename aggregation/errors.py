"""The root of the errors that this package raises.

The tree (each leaf stands beside the noun that raises it)::

    AggregationError
    ├── SpecError         aggregation.module_spec  a specification contradicts itself
    ├── AdapterError      aggregation.adapter      tensors that do not fit their specification
    │   └── LayoutError   aggregation.peft_layout  a folder that is not a readable PEFT adapter
    ├── TensorFileError   aggregation.tensor_file  bytes that are not acceptable safetensors
    ├── CodecError        aggregation.codec        numbers or bytes that a codec cannot carry
    │   └── RingError     aggregation.ring         what would overflow in a secure sum
    ├── PayloadError      aggregation.payload      bytes that do not decode within their limits
    ├── GuardError        aggregation.guard        an adapter that must not be loaded; has a reason
    ├── UpdateError       aggregation.update       one client's update refused; has a reason
    ├── ClipError         aggregation.clipped_sum  a vector that is none: it cannot be clipped
    ├── StateError        aggregation.state        bytes that are not a global state
    ├── RecipeError       (here)                   an unsound or impossible combination of pieces
    ├── OfflineError      aggregation.offline      folders that cannot be combined
    └── StorageError      aggregation.durable      a write that did not reach the disk
"""


class AggregationError(Exception):
    """Any error of the ground floor; the message says what, where, and what to do."""


class RecipeError(AggregationError):
    """Pieces that do not go together; the message gives the reason and the nearest sound choice."""
