"""The subcommands of ``session-watch``, a module each."""
