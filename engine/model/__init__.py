"""transformers' model around the experts: how it is opened and placed."""
from engine.files import skeleton  # noqa: F401  says so when transformers is too old, before a name of it is missing
