"""The exceptions of which the command line prints one line: wrong input exits with 2, what failed elsewhere with 1."""


class UserError(Exception):
    """Names the file, the key, what is wrong and what to do, in one line."""


class SaidByRankZero(UserError):
    """What the other ranks raise for a UserError of rank 0, which is the one to say it."""


class Failed(Exception):
    """A process or job that was started did not end well. Names it, its log and what to do, in one line."""
