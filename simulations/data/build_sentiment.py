"""Builds ``sentiment.tsv``: 19 thousand sentences rated by people, negative or positive.

The ratings come with VADER (Hutto and Gilbert, ICWSM 2014): twenty people rated each sentence from
-4 to 4, in tweets, film reviews, product reviews and newspaper editorials. Sentences whose mean
rating is within 0.5 of neutral are left out, and so are repeated texts. The source distribution of
the package ``vaderSentiment`` holds them (the wheel does not)::

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python simulations/data/build_sentiment.py vaderSentiment-3.3.2.tar.gz

The licence of the package (MIT) stands beside the file.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
DOMAINS = {
    "tweets": "tweets",
    "movieReviewSnippets": "movie",
    "amazonReviewSnippets": "amazon",
    "nytEditorialSnippets": "nyt",
}
NEUTRAL = 0.5
FOLDER = Path(__file__).parent


def rows(inner: tarfile.TarFile) -> Iterator[tuple[str, str, str]]:
    """Text, label and domain of every sentence that is kept, in the order of the source."""
    seen = set()
    for stem, domain in DOMAINS.items():
        member = inner.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
        if member is None:
            raise SystemExit(f"{stem}_GroundTruth.txt is not in the archive")
        raw = member.read()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("cp1252", "replace")
        for line in text.splitlines():
            parts = line.split("\t")
            if len(parts) < 3 or abs(float(parts[1])) < NEUTRAL:
                continue
            sentence = " ".join(html.unescape(parts[2]).split())
            if sentence and sentence not in seen:
                seen.add(sentence)
                yield sentence, "positive" if float(parts[1]) > 0 else "negative", domain


def main(sdist: Path) -> None:
    """Write ``sentiment.tsv`` and its licence beside this script.

    Args:
        sdist: the source distribution; its digest is checked.
    """
    data = sdist.read_bytes()
    if hashlib.sha256(data).hexdigest() != SDIST_SHA256:
        raise SystemExit(f"{sdist}: not the source distribution of vaderSentiment 3.3.2")
    with tarfile.open(fileobj=io.BytesIO(data)) as outer:
        root = "vaderSentiment-3.3.2"
        licence = outer.extractfile(f"{root}/LICENSE.txt")
        archive = outer.extractfile(f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz")
        if licence is None or archive is None:
            raise SystemExit(f"{sdist}: the licence or the ratings are missing")
        (FOLDER / "sentiment.LICENSE.txt").write_bytes(licence.read().replace(b"\r\n", b"\n"))
        with tarfile.open(fileobj=io.BytesIO(archive.read())) as inner:
            kept = list(rows(inner))
    with (FOLDER / "sentiment.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("text", "label", "domain"))
        writer.writerows(kept)
    sys.stdout.write(f"{len(kept)} sentences\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
