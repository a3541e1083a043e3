"""The experiments of the GSM paper: `python -m examples.paper --help`."""
