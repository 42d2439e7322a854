"""Number formats of stored values: how many bytes a number of values takes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Codec:
    """Format of the values that a form stores; an index is no value and has its own dtype."""

    name: str
    """Name of the dtype, `bfloat16`."""
    itemsize: int
    """Bytes of one value."""

    def bytes(self, values: int) -> int:
        """Bytes of a number of values."""
        return values * self.itemsize


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("bfloat16", 2),
        Codec("float16", 2),
        Codec("float32", 4),
        Codec("float64", 8),
    )
}


def itemsize_of(dtype: str, otherwise: int) -> int:
    """Bytes of a value of a dtype by its name; `otherwise` for `auto` and unknown names."""
    return CODECS[dtype].itemsize if dtype in CODECS else otherwise
