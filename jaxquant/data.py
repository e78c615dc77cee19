"""The embedded corpus: source text of the Python standard library on this very machine.

No download: the library is where the interpreter is. One token is one byte (vocabulary 256); byte
0, which no source file holds, separates documents. Files, not windows, are split into train,
validation and test, by a hash of their path, so no held-out text has a twin in training.

Every batch is a pure function of (corpus, split, seed, step): resuming needs the step and nothing
else. Letters: B batch, T time.
"""

import functools
import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

VOCAB = 256
SEPARATOR = 0

# Left out: what is not the library (site-packages, build leftovers), its tests (twice its size, and
# repetitive), and tables (character maps, help topics), which a model can only memorize.
_SKIPPED = frozenset(
  ["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"]
)
_GENERATED = ("_sysconfigdata", "config-")


class Corpus(NamedTuple):
  """Byte tokens, uint8 [n], of each split; every document ends with `SEPARATOR`."""

  train: np.ndarray
  validation: np.ndarray
  test: np.ndarray


def encode(text: str) -> np.ndarray:
  """Text -> its UTF-8 bytes, int32 [T]."""
  return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


def decode(tokens) -> str:
  """Tokens [T] -> text; a broken UTF-8 sequence becomes the replacement character."""
  return np.asarray(tokens).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def _included(path: pathlib.PurePath) -> bool:
  return not any(part in _SKIPPED or part.startswith(_GENERATED) for part in path.parts)


def _split_of(name: str) -> str:
  """90 / 5 / 5 by the path alone: a file stays in its split when other files come or go."""
  bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 20
  return {0: "validation", 1: "test"}.get(bucket, "train")


@functools.cache
def load(root: str | None = None) -> Corpus:
  """Reads all `.py` files below `root` (default: the standard library), in sorted order."""
  base = pathlib.Path(root or sysconfig.get_paths()["stdlib"])
  names = sorted(p.relative_to(base).as_posix() for p in base.rglob("*.py"))
  parts: dict[str, list[bytes]] = {split: [] for split in Corpus._fields}
  for name in names:
    if _included(pathlib.PurePath(name)):
      text = (base / name).read_bytes().replace(b"\r\n", b"\n").replace(b"\0", b"")
      parts[_split_of(name)].append(text + bytes([SEPARATOR]))
  return Corpus(**{k: np.frombuffer(b"".join(v), np.uint8) for k, v in parts.items()})


def fingerprint(corpus: Corpus) -> str:
  """sha256 of all splits: equal fingerprints mean equal batches (another Python, another one)."""
  digest = hashlib.sha256()
  for tokens in corpus:
    digest.update(len(tokens).to_bytes(8, "big") + tokens.tobytes())
  return digest.hexdigest()


def _windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
  """Windows of seq_len + 1 tokens (inputs and targets overlap by seq_len), int32 [B, T+1]."""
  return tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def _order(seed: int, epoch: int, n: int) -> np.ndarray:
  """A permutation of n windows, and one number more for the offset of the whole grid, [n + 1].

  Raw Philox bits and a stable sort: unlike `Generator.permutation`, numpy guarantees that stream
  across versions.
  """
  bits = np.random.Philox(key=[seed, epoch]).random_raw(n + 1)
  return np.append(np.argsort(bits[:n], kind="stable"), bits[n] >> np.uint64(1)).astype(np.int64)


def batch(
  corpus: Corpus, seed: int, step: int, batch_size: int, seq_len: int, split: str = "train"
) -> np.ndarray:
  """The batch of one step, int32 [B, T+1]; inputs are [:, :-1] and targets [:, 1:].

  Each epoch cuts the split into adjacent windows at a random offset and visits each once, in
  random order, so that nothing is repeated before everything was seen.

  Raises:
    ValueError: the split holds less than two windows.
  """
  tokens = getattr(corpus, split)
  n = (len(tokens) - 1) // seq_len - 1  # one window is kept free for the offset
  if n < 1:
    raise ValueError(
      f"{split}: {len(tokens)} tokens hold no window of seq_len={seq_len} at every offset.\n"
      f"  Choose seq_len < {len(tokens) // 2}, or a larger corpus."
    )
  index = step * batch_size + np.arange(batch_size)
  starts = np.empty(batch_size, np.int64)
  for epoch in np.unique(index // n):
    here = index // n == epoch
    order = _order(seed, int(epoch), n)
    starts[here] = order[index[here] % n] * seq_len + order[n] % seq_len
  return _windows(tokens, starts, seq_len)


def eval_batches(
  corpus: Corpus, batch_size: int, seq_len: int, n: int | None = None, split: str = "validation"
) -> Iterator[np.ndarray]:
  """`n` batches of disjoint windows spread evenly over the split (None: all full batches).

  Yields:
    int32 [B, T+1], the same ones on every call.

  Raises:
    ValueError: the split does not hold that many windows.
  """
  tokens = getattr(corpus, split)
  windows = (len(tokens) - 1) // seq_len
  n = windows // batch_size if n is None else n
  if not 0 < n * batch_size <= windows:
    raise ValueError(
      f"{split}: {windows} windows of seq_len={seq_len}, but {n} batches of {batch_size} asked."
    )
  starts = np.arange(n * batch_size) * windows // (n * batch_size) * seq_len
  for rows in starts.reshape(n, batch_size):
    yield _windows(tokens, rows, seq_len)


class Packed(NamedTuple):
  """Rows of several documents behind one anchor token.

  Attributes:
    tokens: int32 [B, T+1]; inputs are [:, :-1] and targets [:, 1:].
    documents: int32 [B, T+1], for `Transformer(..., documents=)`: 0 is the anchor, -1 padding.
    trained: bool [B, T], targets that continue the document of their input, or the anchor.
  """

  tokens: np.ndarray
  documents: np.ndarray
  trained: np.ndarray


def pack_documents(
  documents: Sequence[np.ndarray], seq_len: int, anchor: int = SEPARATOR
) -> Packed:
  """Documents one after the other behind an anchor in every row (arXiv:2411.13476).

  A document that does not fit is cut, and goes on in the next row; only the last row is padded.

  Args:
    documents: int [T_i] each, without a beginning-of-sequence token of their own.
    seq_len: T, tokens of documents in a row.
    anchor: the beginning-of-sequence token, at position 0 of each row; also the padding.

  Raises:
    ValueError: no token at all.

  Example:
    >>> pack_documents([np.array([5, 6]), np.array([7, 8])], 3, anchor=1).documents.tolist()
    [[0, 1, 1, 2], [0, 2, -1, -1]]
  """
  lengths = [len(d) for d in documents]
  size = sum(lengths)
  if not size:
    raise ValueError(f"{len(lengths)} documents without a token; there is nothing to pack.")
  rows = -(-size // seq_len)
  tokens = np.full(rows * seq_len, anchor, np.int32)
  which = np.full(rows * seq_len, -1, np.int32)
  tokens[:size] = np.concatenate(documents)
  which[:size] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  behind = lambda x, first: np.pad(x.reshape(rows, -1), ((0, 0), (1, 0)), constant_values=first)
  which = behind(which, 0)
  inputs, targets = which[:, :-1], which[:, 1:]
  trained = (targets > 0) & ((targets == inputs) | (inputs == 0))
  return Packed(behind(tokens, anchor), which, trained)
