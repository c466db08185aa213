"""Progress where there is no terminal: a line for each piece of work, and signs of life while one takes long."""

from __future__ import annotations

from kedge.cli.progress import Lines


def test_a_line_for_each_piece_of_work_and_every_ten_seconds() -> None:
    now, lines = [0.0], []
    tell = Lines(lines.append, clock=lambda: now[0])
    tell("rpi4", "int8 lower", 0, 0)
    for step in range(1, 101):
        now[0] = step / 4
        tell("rpi4", "int8 evaluate", step, 100)
    tell("intel-cpu", "int8 lower", 0, 0)
    tell("rpi4", "done", 1, 1)
    told = [line.split("s  ")[1] for line in lines]
    assert told == [
        "rpi4: int8 lower",
        "rpi4: int8 evaluate 1 of 100",
        "rpi4: int8 evaluate 41 of 100",
        "rpi4: int8 evaluate 81 of 100",
        "intel-cpu: int8 lower",
        "rpi4: done 1 of 1",
    ]
    assert [float(line.split(" s")[0]) for line in lines] == [0.0, 0.2, 10.2, 20.2, 25.0, 25.0]
