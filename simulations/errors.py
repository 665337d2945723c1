"""The root of the errors that this package raises.

The tree (each leaf stands beside the noun that raises it)::

    SimulationError
    ├── ScenarioError     simulations.scenario   a scenario or an override that says nonsense
    ├── DatasetError      simulations.datasets   data that is not there or lacks its columns
    │   └── PartitionError  simulations.partition  a split with, say, an empty client
    ├── GridError         simulations.grid       the simulated network can't be started
    └── RunError          simulations.run        a run folder that is another run's, or not writable
"""


class SimulationError(Exception):
    """Any error of the simulated world; the message says what, where, and what to do."""
