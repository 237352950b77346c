"""What of transformers only one thread at a time may do: its first import, and building a model.

At the end of its import it puts another module in its own place; a thread that asks for it meanwhile waits, and then
gets the first one, which has no names. While it builds a model, the type of new tensors is that model's for all
threads. Seen: a page that looked a model up while another thread opened one.
"""
from __future__ import annotations

import threading

one_thread = threading.RLock()
