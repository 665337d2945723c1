"""The root of the errors that this package raises.

The tree (each leaf stands beside the noun that raises it)::

    PrivacyError
    ├── AuditError           privacy.audit_bound  an audit that was asked for something impossible
    ├── BudgetError          privacy.budget       a budget or a mechanism that makes no sense
    │   └── BudgetExceeded   privacy.budget       the next step would overspend; nothing was spent
    ├── CalibrationError     privacy.calibration  no noise level meets the target
    ├── LedgerError          privacy.ledger_file  a ledger damaged, locked, absent or contradicted
    │   └── LedgerEdited     privacy.ledger       its chain of hashes does not hold
    ├── KeyFileError         privacy.randomness   the file of the device's secret is damaged
    ├── MechanismError       privacy.local        a model that cannot be trained privately as it is
    └── StatementError       privacy.statement    a statement that is not one of ours
"""


class PrivacyError(Exception):
    """Any error of this package; the message says what, where, and what to do."""
