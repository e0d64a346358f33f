"""Groups of subcommands of `gmsa`, one file each. The parsers are built at start-up, so nothing heavy is imported."""
