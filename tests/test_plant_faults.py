"""The faults that `plant_faults.py` plants can still be planted."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_text_of_every_fault_stands_once_in_its_file_and_its_tests_exist(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")  # as `python tests/plant_faults.py` has it
    spec = importlib.util.spec_from_file_location("plant_faults", ROOT / "tests/plant_faults.py")
    planter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planter)
    for fault in planter.FAULTS:
        text = (ROOT / "polygpt" / fault.file).read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, fault
        assert all((ROOT / "tests" / name.partition("::")[0]).exists() for name in fault.tests.split()), fault
