"""The commands ``know`` and ``know-predict``: arguments in, text out, nothing else.

Nothing here imports torch or numpy before a command has started its work, so that help,
``--version`` and usage errors answer at once.
"""
