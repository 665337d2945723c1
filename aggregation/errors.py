"""The root of the errors that this package raises.

The tree (each leaf stands beside the noun that raises it)::

    AggregationError
    ├── SpecError            aggregation.spec       a specification contradicts itself or its tensors
    ├── AdapterError         aggregation.adapter    tensors that do not fit their specification
    │   └── LayoutError      aggregation.peft_layout  a folder that is not a readable PEFT adapter
    ├── PayloadError         aggregation.payload    bytes that do not decode within their limits
    ├── GuardError           aggregation.guard      an adapter that must not be loaded; has a reason
    ├── UpdateError          aggregation.update     one client's update refused; has a reason
    ├── RecipeError          aggregation.recipe     an unsound or impossible combination of pieces
    └── StorageError         aggregation.durable    a write that did not reach the disk
"""


class AggregationError(Exception):
    """Any error of the ground floor; the message says what, where, and what to do."""
