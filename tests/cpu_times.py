"""CPU seconds of each test file and its dearest tests, with the processes that they start, as a plugin of pytest:

launch/test.sh -n0 -p tests.cpu_times tests/test_vit.py
"""

import collections
import os

import pytest

_by_file: collections.Counter[str] = collections.Counter()
_by_test: collections.Counter[str] = collections.Counter()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    before = sum(os.times()[:4])
    yield
    used = sum(os.times()[:4]) - before
    _by_file[item.nodeid.partition("::")[0]] += used
    _by_test[item.nodeid] += used


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("CPU seconds")
    for name, used in [*_by_file.most_common(), *_by_test.most_common(20)]:
        terminalreporter.line(f"{used:8.1f}  {name}")
