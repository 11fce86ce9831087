"""Imported before PyTorch: says so on a terminal if importing takes more than a second."""

import os
import sys
import threading

_timer = threading.Timer(1, print, ["importing PyTorch ..."], {"file": sys.stderr})
_timer.daemon = True
if sys.stderr.isatty() and "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
    _timer.start()


def over():
    """What took long has been imported."""
    _timer.cancel()
