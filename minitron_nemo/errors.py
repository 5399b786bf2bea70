"""The one exception that means "your input is wrong": the CLI prints it as one line and exits with 2."""


class UserError(Exception):
    """Names the file, the key, what is wrong and what to do, in one line."""
