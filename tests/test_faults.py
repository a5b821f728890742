"""A sample of `make faults`, another one each time; a failure prints its seed."""

from tests import faults


def test_a_sample_of_faults(capsys):
    assert faults.main(["--kills=8", "--every=31"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].strip(":") for line in lines] == ["seed", "kills", "ENOSPC", "EIO", "damage", "damage"]
    assert int(lines[1].split()[1]) >= 8
