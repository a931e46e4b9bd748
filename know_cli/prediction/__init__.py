"""The main flow: from paths and options to a written checkpoint, and back to check one."""
