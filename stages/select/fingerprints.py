"""The pictures that pass all else, by what tells whether two are one: 41 bytes of memory for each."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stages.select.duplicates import near_duplicates, repeated
from stages.select.tables import Batch, column

PAIRS_SHOWN = 8


@dataclass(frozen=True)
class Doubles:
    """What was found: positions among all rows, ascending."""

    same_file: NDArray[np.int64]
    same_picture: NDArray[np.int64]
    examples: tuple[tuple[int, int, int], ...]
    """(dropped, kept, Hamming distance of their perceptual hashes), the first few, as many of each kind as there are."""


@dataclass
class Fingerprints:
    """Gathered batch by batch."""

    row: list[NDArray[np.int64]] = field(default_factory=list)
    content: list[NDArray[np.uint64]] = field(default_factory=list)
    """(N, 2): the first 128 bits of the file's SHA-256, which no two of a trillion files share by chance."""
    phash: list[NDArray[np.uint64]] = field(default_factory=list)
    hashed: list[NDArray[np.bool_]] = field(default_factory=list)
    pixels: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, batch: Batch, passed: NDArray[np.bool_]) -> None:
        """Add those of a batch that passed."""
        rows = batch.rows.filter(pa.array(passed))
        digests = b"".join(bytes.fromhex(digest[:32]) for digest in column(rows, "sha256").to_pylist())
        phash = column(rows, "phash")
        self.row.append(batch.first + np.flatnonzero(passed))
        self.content.append(np.frombuffer(digests, np.uint64).reshape(-1, 2))
        self.phash.append(pc.fill_null(phash, 0).to_numpy().view(np.uint64))
        self.hashed.append(pc.is_valid(phash).to_numpy(zero_copy_only=False))
        self.pixels.append(column(rows, "width").to_numpy() * column(rows, "height").to_numpy())

    def doubles(self, max_hash_distance: int | None) -> Doubles:
        """Find files that are equal to one before them, then pictures within `max_hash_distance` bits of a better one.

        Better is the one of more pixels, or the earlier one of as many; null looks for equal files only.
        """
        if not self.row:
            return Doubles(*(np.empty(0, np.int64),) * 2, ())
        row, content, pixels = np.concatenate(self.row), np.concatenate(self.content), np.concatenate(self.pixels)
        phash, hashed = np.concatenate(self.phash), np.concatenate(self.hashed)
        same_file = repeated(content)
        same_picture = np.zeros(len(row), bool)
        if max_hash_distance is not None:
            looked_at = np.flatnonzero(~same_file & hashed)
            by_preference = looked_at[np.lexsort((looked_at, -pixels[looked_at]))]
            same_picture[by_preference[near_duplicates(phash[by_preference], max_hash_distance)]] = True
        kept = np.flatnonzero(~same_file & ~same_picture)
        examples = [self._file_pair(one, content) for one in np.flatnonzero(same_file)[:PAIRS_SHOWN]]
        examples += [_nearest(one, kept[hashed[kept]], phash, pixels) for one in np.flatnonzero(same_picture)[:PAIRS_SHOWN]]
        return Doubles(row[same_file], row[same_picture], tuple((int(row[a]), int(row[b]), bits) for a, b, bits in examples))

    @staticmethod
    def _file_pair(one: int, content: NDArray[np.uint64]) -> tuple[int, int, int]:
        return one, int(np.flatnonzero((content == content[one]).all(axis=1))[0]), 0


def _nearest(one: int, kept: NDArray[np.intp], phash: NDArray[np.uint64], pixels: NDArray[np.int64]) -> tuple[int, int, int]:
    """The kept picture that makes this one superfluous: the nearest of those that are no worse."""
    better = kept[pixels[kept] >= pixels[one]]
    distances = np.bitwise_count(phash[better] ^ phash[one])
    found = int(np.argmin(distances))
    return one, int(better[found]), int(distances[found])
