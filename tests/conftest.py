"""What keeps the suite the same in every run, on machines of any speed.

Hypothesis takes the same examples each time and looks at no clock: what it has found fails
everywhere at once, and a slow machine fails nothing. To look further, with other examples in each
run: ``pytest --hypothesis-profile=explore``.

Some tests fork, to kill the child. gRPC would stop and start its threads around that, and dies in
the child of a process that has a server or a channel open; it is told to leave a fork alone.

Whatever the environment says about terminals, colours, proxies and AirPEFT's own settings is taken
away, for the tests and for the processes that they start.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Before anything imports gRPC, Typer or Rich, which look at these when they are imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
_TERMINAL = {"columns", "lines", "terminal_width", "force_color", "py_colors", "github_actions"}
_PROXIES = {"http_proxy", "https_proxy", "all_proxy", "grpc_proxy"}
for _name in tuple(os.environ):
    if _name.lower() in _TERMINAL | _PROXIES or _name.startswith("AIRPEFT_"):
        del os.environ[_name]

_NO_CLOCK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}

settings.register_profile("suite", derandomize=True, **_NO_CLOCK)  # type: ignore[arg-type]
settings.register_profile("explore", **_NO_CLOCK)  # type: ignore[arg-type]
settings.load_profile("suite")
