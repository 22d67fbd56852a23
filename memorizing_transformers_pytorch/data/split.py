"""Which documents are trained on and which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from memorizing_transformers_pytorch.data.document import Split, TextDocument, text_bytes
from memorizing_transformers_pytorch.data.duplicates import near_duplicate_leaders


@dataclass(frozen=True, kw_only=True)
class Splitter:
    """The side of a document: by a hash of its name, so that it depends on no other document, order or seed.

    The hash, SHA-256 as a fraction of its range, puts a document into the test split below `test`, into the validation
    split in the next `valid`, else into training. A document that its corpus assigns itself stays there. Near-identical
    documents follow the one among them that `leaders` names.
    """

    valid: float
    test: float
    leaders: dict[str, str] = field(default_factory=dict)

    def __call__(self, document: TextDocument) -> Split:
        if document.split is not None:
            return document.split
        name = self.leaders.get(document.name, document.name)
        share = int.from_bytes(hashlib.sha256(text_bytes(name)).digest()[:8], "big") / 2**64
        if share < self.test:
            return "test"
        return "valid" if share < self.test + self.valid else "train"


def make_splitter(
    documents: Iterable[TextDocument], *, valid: float, test: float, near_duplicates: float | None
) -> Splitter:
    """The sides of these documents. They are read once to find near-identical ones, unless that is None.

    near_duplicates: Jaccard similarity of the sets of five words in a row (see duplicates.py), from which documents are
    kept on one side.
    """
    free = (document for document in documents if document.split is None)
    leaders = {} if near_duplicates is None else near_duplicate_leaders(free, near_duplicates)
    return Splitter(valid=valid, test=test, leaders=leaders)
