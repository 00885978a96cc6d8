"""`snaploader doctor`: exercises the cache folder (`local.py`) and the remote cache (`remote.py`)."""
