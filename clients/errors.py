"""The root of the errors that this package raises.

Some leaves of the tree (each stands beside the noun that raises it)::

    ClientError
    ├── BaseNotFound     clients.base      no base model under that name; lists the known ones
    ├── BaseUnsupported  clients.base      an architecture that the sentence classifier cannot hold
    ├── BaseMismatch     clients.base      an adapter made for another base
    ├── DataError        clients.data      a file that is not usable training data
    ├── PlanError        clients.training  a training plan that contradicts itself or its data
    └── TrainerError     clients.trainer_process  the resident trainer cannot be reached
"""


class ClientError(Exception):
    """Any error of the device side; the message says what, where, and what to do."""
