"""The root of the errors that the server's side raises.

The tree (each leaf stands beside the noun that raises it)::

    FederationError
    ├── StoreError          federation.store      the database cannot be opened or migrated
    ├── EnrolmentError      federation.permits    token or certificate request refused; has a reason
    ├── ReportError         federation.reports    a report that is not what it claims to be
    ├── UnknownDeviceError  federation.fleet      no such device
    ├── RolloutError        federation.waves      impossible rollout, or a verb in the wrong state
    ├── ServerError         federation.first_start  the server cannot start; says what to do
    ├── MirrorError         federation.mirror     a mirror that cannot be made or served
    └── OperatorError       federation.client     the server answered no, or not at all

and those of training (strategy, rounds, checkpoint) and of release (keys, repository, registry),
which stand in their modules.
"""


class FederationError(Exception):
    """Any error of the server's side; the message says what, where, and what to do."""
