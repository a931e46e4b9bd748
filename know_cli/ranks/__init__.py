"""The processes that work on one output together."""
