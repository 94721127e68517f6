"""Writes tosa_jax/data/imagenet_classes.txt: what WordNet calls the 1000 classes of ImageNet (ILSVRC 2012).

    python tests/golden/make_imagenet_classes.py /usr/share/wordnet/data.noun

Their numbers and order are those of TFDS's "imagenet2012". The argument is WordNet 3.0's file of nouns (Debian:
package wordnet-base): a class "n01440764" is the synonym set at offset 01440764 of that file.
"""

import sys
from pathlib import Path

import tensorflow_datasets as tfds

HEADER = """\
The 1000 classes of ImageNet (ILSVRC 2012) in their order: WordNet id, tab, the words of that synonym set.
Made by tests/golden/make_imagenet_classes.py from WordNet 3.0 under this licence:

This software and database is being provided to you, the LICENSEE, by Princeton University under the following
license. By obtaining, using and/or copying this software and database, you agree that you have read, understood, and
will comply with these terms and conditions.:

Permission to use, copy, modify and distribute this software and database and its documentation for any purpose and
without fee or royalty is hereby granted, provided that you agree to comply with the following copyright notice and
statements, including the disclaimer, and that the same appear on ALL copies of the software, database and
documentation, including modifications that you make for internal use or for distribution.

WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.

THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES, EXPRESS
OR IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES OF
MERCHANTABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE OF THE LICENSED SOFTWARE, DATABASE OR
DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS.

The name of Princeton University or Princeton may not be used in advertising or publicity pertaining to distribution
of the software and/or database. Title to copyright in this software, database and any associated documentation shall
at all times remain with Princeton University and LICENSEE agrees to preserve same.
"""


def words(line: str) -> str:
    """The synonyms of a line of data.noun: offset, file, type, their number in hex, then word and sense of each."""
    fields = line.split(" ")
    return ", ".join(fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16)))


def main(nouns: str) -> None:
    sets = {line[:8]: line for line in Path(nouns).read_text().splitlines() if line[:8].isdigit()}
    ids = tfds.builder_cls("imagenet2012")(data_dir="/none").info.features["label"].names
    lines = [f"{wnid}\t{words(sets[wnid[1:]])}\n" for wnid in ids]
    target = Path(__file__).parents[2] / "tosa_jax/data/imagenet_classes.txt"
    notice = "".join(f"# {line}".rstrip() + "\n" for line in HEADER.splitlines())
    target.write_text(notice + "".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
