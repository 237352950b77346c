"""The verb that talks."""
