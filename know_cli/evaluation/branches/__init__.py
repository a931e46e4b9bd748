"""What fusing several continuations of one network is worth, for ``know eval``."""
