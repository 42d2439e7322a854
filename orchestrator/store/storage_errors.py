"""What a failed read or write means: a reason that passes, or one that stays.

Pure but for `patiently`, which waits.
"""

import errno
import re
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

TRIES = 4
FIRST_WAIT_SECONDS = 0.5
_STAYS = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EFBIG,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.EPERM,
        errno.EROFS,
    }
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|Bucket '.*' not found|ContainerNotFound")
_DENIED = re.compile(
    r"ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN"
    r"|ExpiredToken|INVALID_CLIENT_TOKEN_ID|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|AuthorizationFailure|AuthenticationFailed"
    r"|HTTP status 40[13]"
)


def waits(tries: int = TRIES) -> tuple[float, ...]:
    """Seconds to wait before each try but the first: half a second, then three times as long."""
    return tuple(FIRST_WAIT_SECONDS * 3.0**each for each in range(tries - 1))


def is_no_bucket(error: OSError) -> bool:
    """Whether an object store says that the bucket does not exist."""
    return _NO_BUCKET.search(str(error)) is not None


def is_denied(error: OSError) -> bool:
    """Whether an object store knows no credentials of ours, or does not let them in."""
    return error.errno in (errno.EACCES, errno.EPERM) or _DENIED.search(str(error)) is not None


def is_passing(error: OSError) -> bool:
    """Whether the same call may succeed a little later: a connection lost, a server at its limit.

    Not so where a disk is full, something is not there, or the access is refused.
    """
    return error.errno not in _STAYS and not is_denied(error) and not is_no_bucket(error)


def patiently(action: Callable[[], Result]) -> Result:
    """What the action gives; it is repeated, after growing waits, while its error may pass.

    Raises:
        OSError: The last one, or the first that stays.
    """
    for wait in waits(TRIES):
        try:
            return action()
        except OSError as error:
            if not is_passing(error):
                raise
        time.sleep(wait)
    return action()
