"""The audit itself: a check that cannot fail would prove nothing about the daemon."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pickle_audit import PickleAudit

FIND_CLASS = "import pickle, collections; pickle.loads(pickle.dumps(collections.OrderedDict()))"
MARSHAL = "import marshal; marshal.loads(marshal.dumps([1]))"
IMPORTS_ONLY = "import pickle, json, email.message, numpy"
IN_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {FIND_CLASS!r}], check=True)"
IN_A_CHILD_OF_FEW_VARIABLES = IN_A_CHILD.replace("check=True", "env={'PYTHONPATH': sys.path[1]}, check=True")


def run(audit: PickleAudit, program: str) -> None:
    subprocess.run([sys.executable, "-c", program], env=audit.environment(), check=True, timeout=60)


@pytest.mark.parametrize(
    ("program", "event"),
    [
        (FIND_CLASS, "pickle.find_class"),
        (MARSHAL, "marshal.loads"),
        (IN_A_CHILD, "pickle.find_class"),
        (IN_A_CHILD_OF_FEW_VARIABLES, "pickle.find_class"),
    ],
    ids=["pickle", "marshal", "pickle in a child", "pickle in a child of few variables"],
)
def test_a_use_is_noted(pickle_audit: PickleAudit, program: str, event: str) -> None:
    run(pickle_audit, program)
    assert pickle_audit.offences()
    assert all(line.startswith(event) for line in pickle_audit.offences())
    with pytest.raises(AssertionError, match=event):
        pickle_audit.check()


def test_imports_are_no_offence(pickle_audit: PickleAudit) -> None:
    run(pickle_audit, IMPORTS_ONLY)
    pickle_audit.check(processes=1)


def test_an_unwatched_process_is_an_error_and_not_a_clean_bill(pickle_audit: PickleAudit) -> None:
    subprocess.run([sys.executable, "-I", "-c", "pass"], env=pickle_audit.environment(), check=True, timeout=60)
    with pytest.raises(AssertionError, match="wanted 1 watched"):
        pickle_audit.check()
