"""How connections end."""

from enum import StrEnum


class Ending(StrEnum):
    """How a connection ended."""

    FINISHED = "finished"  # both ends had said all they had to say
    NEAR_RESET = "near_reset"  # the near end broke it off
    FAR_RESET = "far_reset"  # the far end closed, and had not read all
    IDLE = "idle"  # nothing was moved for too long
    HALF_CLOSED = "half_closed"  # one end had ended, and nothing was moved for too long
    CUT = "cut"  # by us
