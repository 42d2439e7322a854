"""Classification of failed reads and writes as transient or permanent.

Pure functions, except `patiently`, which waits.
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
    """Seconds to wait before each retry: half a second, then three times as long."""
    return tuple(FIRST_WAIT_SECONDS * 3.0**each for each in range(tries - 1))


def is_no_bucket(error: OSError) -> bool:
    """Return True if an object store reports that the bucket does not exist."""
    return _NO_BUCKET.search(str(error)) is not None


def is_denied(error: OSError) -> bool:
    """Return True if an object store reports missing or rejected credentials."""
    return error.errno in (errno.EACCES, errno.EPERM) or _DENIED.search(str(error)) is not None


def is_passing(error: OSError) -> bool:
    """Return True for transient errors: a lost connection, an overloaded server.

    False if a disk is full, the object does not exist, or access is denied.
    """
    return error.errno not in _STAYS and not is_denied(error) and not is_no_bucket(error)


def patiently(action: Callable[[], Result]) -> Result:
    """Return the result of the action, which is repeated after growing waits on transient errors.

    Raises:
        OSError: The last error, or the first permanent one.
    """
    for wait in waits(TRIES):
        try:
            return action()
        except OSError as error:
            if not is_passing(error):
                raise
        time.sleep(wait)
    return action()
