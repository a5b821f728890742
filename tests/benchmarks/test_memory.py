"""The table of memory modes, on a shape for a CPU; figures need a GPU."""

from benchmarks.memory import main


def test_a_row_for_each_mode(capsys):
    main(["--shape", "tiny", "--data.num_samples=4", "--data.seq_len=16", "--data.batch_size=2", "--solver.epochs=1",
          "--trainer.accelerator=cpu"])  # fmt: skip
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert header[:2] == ["shape", "memory"]
    assert [row[:2] for row in rows] == [["tiny", "auto"], ["tiny", "low"]]
    assert all(float(row[-1]) > 0 for row in rows)
