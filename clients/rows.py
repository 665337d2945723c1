"""A client's examples, read once: from values, or from a file that may change between rounds."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from clients.data import DataError, DataSource, Examples, held_out

FILES_KEPT = 256


class Rows:
    """Examples by where they are; a file that has changed is read again."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[Any, ...], Examples] = OrderedDict()

    def all(self, data: Examples | DataSource, labels: tuple[str, ...]) -> Examples:
        """All examples.

        Args:
            data: the examples, or where they are.
            labels: names of the adapter's classes, in order.

        Raises:
            DataError: if the file cannot be used, the classes are others, or there is no example.
        """
        if isinstance(data, Examples):
            if data.label_names != labels:
                raise DataError(
                    f"the data's classes are {', '.join(data.label_names)}, the adapter's are "
                    f"{', '.join(labels)}: they must be the same, in the same order"
                )
            examples = data
        else:
            examples = self._read(data, labels)
        if not len(examples):
            raise DataError("there are no examples to work with: the partition is empty")
        return examples

    def to_train(
        self, data: Examples | DataSource, labels: tuple[str, ...], client: str, holdout: float
    ) -> Examples:
        """The examples that train.

        Raises:
            DataError: as :meth:`all`; or if all are held out.
        """
        examples = self.all(data, labels)
        kept, _ = held_out(examples, client, holdout)
        if not len(kept):
            raise DataError(
                f"all {len(examples)} examples are held out (holdout={holdout}): "
                "choose a smaller share, or take part with more examples"
            )
        return kept

    def to_measure(
        self, data: Examples | DataSource, labels: tuple[str, ...], client: str, holdout: float
    ) -> Examples:
        """The examples that never train; all, if none are held out.

        Raises:
            DataError: as :meth:`all`; or if the share came out as nothing.
        """
        examples = self.all(data, labels)
        if not holdout:
            return examples
        _, own = held_out(examples, client, holdout)
        if not len(own):
            raise DataError(
                f"none of the {len(examples)} examples is held out (holdout={holdout}): "
                "there is nothing to measure on; choose a larger share"
            )
        return own

    def _read(self, source: DataSource, labels: tuple[str, ...]) -> Examples:
        try:
            state = source.path.stat()
        except OSError:
            raise DataError(f"{source.path}: there is no such file") from None
        key = (source, labels, state.st_size, state.st_mtime_ns)
        if key not in self._files:
            self._files[key] = source.read(labels)
            if len(self._files) > FILES_KEPT:
                self._files.popitem(last=False)
        return self._files[key]
