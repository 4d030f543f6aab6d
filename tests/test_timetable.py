"""Each stop is the end of a chunk, and no chunk is longer than steps_per_call."""

from cnn_spmd.training.timetable import Chunk, make_timetable, split_into_chunks


def test_chunks_end_at_every_stop():
    ends = [3, 4, 7, 8, 10]
    assert [chunk.end for chunk in split_into_chunks(0, [4, 8, 10], 3)] == ends
    assert split_into_chunks(5, [4, 8, 10], 100) == [Chunk(5, 8), Chunk(8, 10)]
    assert split_into_chunks(10, [10], 3) == []


def test_stops_are_the_steps_to_evaluate_or_save_after(config):
    """64 images in batches of 16 are 4 steps per epoch."""
    config.update(dict(steps=30, steps_per_call=100))
    config.eval.every_epochs, config.checkpoint.every_epochs = 2, 3
    timetable = make_timetable(config, 64, 8)
    assert [*timetable.evaluations] == [8, 16, 24]
    assert [*timetable.saves] == [12, 24]
    assert timetable.stops == [12, 16, 24, 30]
    assert [chunk.end for chunk in timetable.chunks] == timetable.stops
    config.eval.every_epochs = config.checkpoint.every_epochs = 0
    assert make_timetable(config, 64, 8).stops == [30]
    assert make_timetable(config, 64, 30).stops == []
