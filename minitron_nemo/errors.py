"""The exceptions that mean "your input is wrong": the CLI prints one line and exits with 2."""


class UserError(Exception):
    """Names the file, the key, what is wrong and what to do, in one line."""


class SaidByRankZero(UserError):
    """What the other ranks raise for a UserError of rank 0, which is the one to say it."""
