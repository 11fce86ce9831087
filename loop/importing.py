"""Says so on a terminal if importing PyTorch takes more than a second.

Import this before torch: importing it starts the timer that prints the line. `done()` stops it.
"""

import os
import sys
import threading

_timer = threading.Timer(1, print, ["importing PyTorch ..."], {"file": sys.stderr})
_timer.daemon = True
if sys.stderr.isatty() and "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
    _timer.start()


def done():
    """Call this once everything is imported."""
    _timer.cancel()
