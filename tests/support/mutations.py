"""Hostile QED images, each from a few bytes: a small sound image, and what is done to its header, tables and length.

It shares no code with what it is used to test.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

CLUSTER = 4096
TABLE_BYTES = 2 * CLUSTER
ENTRIES = TABLE_BYTES // 8
L1, L2, L2_BEHIND = CLUSTER, 3 * CLUSTER, 13 * CLUSTER
"""Where the tables are: the second L2 table maps what lies behind the first 1024 clusters."""
CLUSTERS = ENTRIES + 4
INTERESTING = [*range(12), ENTRIES - 1, *range(ENTRIES, ENTRIES + 4)]
"""Clusters of the disk that are worth reading: all that have data, and some that have none."""

_U32_FIELDS = (4, 8, 12, 56, 60)
"""cluster_size, table_size, header_size, backing_filename_offset and -size (qed_spec)."""
_U64_FIELDS = (16, 24, 32, 40, 48)
"""features, compat_features, autoclear_features, l1_table_offset, image_size."""


def sound_image() -> bytearray:
    """Return an image with data in clusters 0 to 7, zeroes in 8, and data in the first two of the second table.

    Every data cluster is filled with a byte of its own.
    """
    image = bytearray(17 * CLUSTER)
    struct.pack_into("<4sIIIQQQQQII", image, 0, b"QED\0", CLUSTER, 2, 1, 0, 0, 0, L1, CLUSTERS * CLUSTER - 512, 0, 0)
    struct.pack_into("<QQ", image, L1, L2, L2_BEHIND)
    struct.pack_into("<9Q", image, L2, *(place * CLUSTER for place in range(5, 13)), 1)
    struct.pack_into("<2Q", image, L2_BEHIND, 15 * CLUSTER, 16 * CLUSTER)
    for number, place in enumerate([*range(5, 13), 15, 16]):
        image[place * CLUSTER : (place + 1) * CLUSTER] = bytes([0x10 + number]) * CLUSTER
    return image


class Change(NamedTuple):
    """Four bytes of a seed: what is changed, and to what."""

    where: int
    which: int
    how: int
    value: int

    def apply(self, image: bytearray) -> None:
        """Do it."""
        where = self.where % 16
        if where < 2:
            self._put(image, _U32_FIELDS[self.which % len(_U32_FIELDS)], "<I")
        elif where < 4:
            self._put(image, _U64_FIELDS[self.which % len(_U64_FIELDS)], "<Q")
        elif where < 7:
            self._put(image, L1 + 8 * (self.which % 4), "<Q")
        elif where < 11:
            self._put(image, L2 + 8 * (self.which % 12), "<Q")
        elif where < 13:
            self._put(image, L2_BEHIND + 8 * (self.which % 6), "<Q")
        elif where == 13:
            del image[self.value * 512 :]
        elif where == 14:
            image += bytes(self.value * 512)
        else:
            at = (self.which << 8 | self.how) % max(1, len(image))
            image[at : at + 1] = bytes([self.value])

    def _put(self, image: bytearray, at: int, form: str) -> None:
        if at + 8 <= len(image):
            struct.pack_into(form, image, at, self._number(len(image)) % (1 << 8 * struct.calcsize(form)))

    def _number(self, length: int) -> int:
        value = self.value
        whole = length // CLUSTER * CLUSTER
        return (
            value % 20 * CLUSTER,
            value % 20 * CLUSTER,
            value % 20 * CLUSTER + 512,
            value,
            whole + (value % 4 - 2) * CLUSTER,
            (1 << 64) - value * CLUSTER,
            1 << value % 64,
            (1 << value % 64) - 512,
        )[self.how % 8]


def mutated(seed: bytes) -> bytes:
    """Return the image that these bytes stand for."""
    image = sound_image()
    for at in range(0, len(seed) - 3, 4):
        Change(*seed[at : at + 4]).apply(image)
    return bytes(image)


def readable(image: bytes | bytearray) -> dict[int, bytes]:
    """Return what can be read, cluster by cluster, of an image whose header is as it was.

    Left out is what an entry leads nowhere for, and what lies over tables or the header.
    """
    found: dict[int, bytes] = {}
    tables = [place for place in struct.unpack_from("<4Q", image, L1) if _holds(image, place, TABLE_BYTES)]
    taken = {0, *(place // CLUSTER + i for place in [L1, *tables] for i in (0, 1))}
    for index, place in enumerate(struct.unpack_from("<4Q", image, L1)):
        if place not in tables or tables.count(place) > 1:
            continue
        for number, entry in enumerate(struct.unpack_from(f"<{ENTRIES}Q", image, place)):
            if entry == 1:
                found[index * ENTRIES + number] = bytes(CLUSTER)
            elif _holds(image, entry, CLUSTER) and entry // CLUSTER not in taken:
                found[index * ENTRIES + number] = bytes(image[entry : entry + CLUSTER])
    return found


def _holds(image: bytes | bytearray, place: int, length: int) -> bool:
    return place >= CLUSTER and place % CLUSTER == 0 and place + length <= len(image)
