"""The run-time type checker of the tests: beartype, with an int accepted where a float is asked for (PEP 484)."""

import random

from beartype import BeartypeConf, beartype
from beartype._check.code import codemain

# Of a list it checks one item, drawn from Python's own generator, also in the threads that read data. Hypothesis takes
# that for a test that draws past it. The module is not public; where it has gone, `test_type_checker` says so.
codemain.getrandbits = random.Random(0).getrandbits

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
