"""Live page of a run, in the style of its report: read from the run directory while it grows.

`state` folds the events of the journal, `page` composes sections from the state, `feed` reads the
directory for all clients, `server` answers them. Nothing is written.
"""

from orchestrator.pages.live.feed import check_watchable
from orchestrator.pages.live.server import is_loopback, live_server, url_of

__all__ = ["check_watchable", "is_loopback", "live_server", "url_of"]
