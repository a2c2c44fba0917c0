"""How connections end."""

from enum import StrEnum, auto


class Ending(StrEnum):
    """How a connection ended."""

    FINISHED = auto()  # both ends had said all they had to say
    NEAR_RESET = auto()  # the near end broke it off
    FAR_RESET = auto()  # the far end closed, and had not read all
    IDLE = auto()  # nothing was moved for too long
    HALF_CLOSED = auto()  # one end had ended, and nothing was moved for too long
    CUT = auto()  # by us
